"""Bytes: held in memory, per weight, and on disk, with everything that belongs to them.

Scales, zero points, masks and indices count like any other array.
"""

import json
import os
import pathlib
import tempfile
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from safetensors import numpy as safetensors_numpy

from effjax.core import tree as tree_lib
from effjax.measure import leaves


def held_bytes(params: Mapping[str, Any]) -> int:
  """Bytes of all arrays of all parameters, each counted once over all devices."""
  return sum(int(array.nbytes) for array in _arrays(params).values())


def num_params(params: Mapping[str, Any]) -> int:
  """Logical weights of a tree (count)."""
  return sum(leaves.size(leaf) for leaf in tree_lib.flatten(params).values())


def num_nonzero(params: Mapping[str, Any]) -> int:
  """Weights that are not exactly zero (count)."""
  return leaves.num_nonzero(params)


def bits_per_weight(params: Mapping[str, Any], num_weights: int) -> float:
  """Bits held for each weight of the model as it was before compression.

  Args:
    params: the tree as it is now.
    num_weights: logical parameters before compression, such as the sum of the sizes
      of its specs.
  """
  return 8 * held_bytes(params) / num_weights


def save_packed(path: str | os.PathLike, params: Mapping[str, Any]) -> int:
  """Writes every array as it is held to a safetensors file, uncompressed.

  Arrays are named by the path of their parameter and their field inside it
  ("layer_0/mlp/up.values.codes"); kinds and static metadata stand in the header.

  Args:
    path: the file to write.
    params: the tree.

  Returns:
    Bytes of the file.
  """
  tensors = {
    name: np.ascontiguousarray(array) for name, array in _arrays(params).items()
  }
  kinds = {
    path: _describe(leaf)
    for path, leaf in tree_lib.flatten(params).items()
    if any(leaves.nested(leaf))
  }
  # One entry: the order of several differs from process to process.
  metadata = {"effjax": json.dumps(kinds, sort_keys=True)}
  safetensors_numpy.save_file(tensors, os.fspath(path), metadata=metadata)
  return os.stat(path).st_size


def bytes_on_disk(params: Mapping[str, Any]) -> int:
  """Bytes of the file `save_packed` writes; a temporary one, removed again.

  Values do not change the size, so zeros stand for what only other processes hold.
  """
  known = lambda array: getattr(array, "is_fully_addressable", True)
  here = jax.tree.map(
    lambda array: array if known(array) else np.zeros(array.shape, array.dtype), params
  )
  with tempfile.TemporaryDirectory(prefix="effjax-") as folder:
    return save_packed(pathlib.Path(folder) / "params.safetensors", here)


def _arrays(params: Mapping[str, Any]) -> dict[str, Any]:
  return {
    name: array
    for path, leaf in tree_lib.flatten(params).items()
    for name, array in leaves.arrays(leaf, path)
  }


def _describe(leaf: Any) -> dict[str, Any]:
  """Kind, version and static fields of a leaf, and of the leaves inside it."""
  inner = {
    name: _describe(getattr(leaf, name))
    for name in leaf.data_fields
    if any(leaves.nested(getattr(leaf, name)))
  }
  static = {name: getattr(leaf, name) for name in leaf.static_fields}
  return {"kind": leaf.kind, "version": leaf.version, "static": static, "inner": inner}
