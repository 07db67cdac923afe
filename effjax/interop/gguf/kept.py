"""Quantized tensors of a GGUF file as quantized leaves, and back, without rounding.

A matrix lies in the file as rows of blocks, one row an output, and so does the leaf. So
whatever a rule does to rows (part of a fused matrix, pairs of a rotation) is done to
rows of bytes.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.typing import DTypeLike

from effjax.core import layers
from effjax.core import specs as specs_lib
from effjax.core import tree as tree_lib
from effjax.interop import assemble
from effjax.interop.gguf import formats, leaves, reader, writer
from effjax.parallel import spread as spread_lib

# Codes that are unpacked at a time, a byte each: it takes several times that.
_UNPACKED_BYTES = 2**22
# Kinds of parameters that are products of rows; all others are decoded.
_KINDS = ("matrix", "embedding")


def type_in(place: assemble.Place, file: reader.File) -> str | None:
  """The quantized type that all tensors of a parameter have, None to decode them."""
  types = {file.tensors[piece.name].type for piece in place.pieces}
  (first, *others) = types
  if others or first not in leaves.QUANTIZED or not _by_rows(place):
    return None
  return first


def scanned(
  model: Any, places: Sequence[assemble.Place], file: reader.File
) -> tuple[layers.Run, ...]:
  """The runs of a model whose layers are equal only with equal types.

  Args:
    model: a Layered model.
    places: of the model unrolled.
    file: where the tensors are.
  """
  types: dict[str, list[tuple[str, str | None]]] = {}
  for place in places:
    layer, _, below = place.path.partition("/")
    types.setdefault(layer, []).append((below, type_in(place, file)))
  keys = [(key, tuple(types[f"layer_{k}"])) for k, key in enumerate(model.layer_keys)]
  return layers.find_runs(keys, model.layer_groups)


def read(
  places: Sequence[assemble.Place],
  file: reader.File,
  source: Any,
  dtype: DTypeLike | None = np.float32,
  spread: spread_lib.Spread | None = None,
) -> dict[str, Any]:
  """The parameter tree, with quantized leaves where the file is quantized.

  Args:
    places: of all parameters, checked.
    file: where the tensors are.
    source: decodes those that are not kept; see interop.rules.Source.
    dtype, spread: see assemble.read; dtype is that of what is decoded.
  """
  flat: dict[str, Any] = {}
  decoded = []
  # The largest first, while little else is held.
  for place in sorted(places, key=lambda place: -place.spec.size):
    type = type_in(place, file)
    if type is None:
      decoded.append(place)
      continue
    leaf = _leaf(place, file, type)
    if spread is not None:
      specs, tree = {"leaf": place.spec}, {"leaf": leaf}
      tree = jax.device_put(tree, spread.params(specs, tree))
      leaf = tree["leaf"]
    flat[place.path] = leaf
  if decoded:
    plain = assemble.read(decoded, source, dtype, spread)
    flat |= tree_lib.flatten(plain)
  return tree_lib.unflatten(flat)


def _leaf(place: assemble.Place, file: reader.File, type: str) -> Any:
  """A parameter of one layer after the other, whose tensors are read one by one."""
  first = place.pieces[0]
  (*rows, size) = (*_lead(place), *first.rule.turned(first.shape))
  embedding = place.spec.kind == "embedding"
  parts: list[np.ndarray] = []
  filled = 0
  for piece in place.pieces:
    raw = piece.rule.rows(file.read(piece.name))
    step = max(1, _UNPACKED_BYTES // size)
    for start in range(0, len(raw), step):
      some = raw[start : start + step]
      leaf = leaves.to_leaf(some, type, (len(some), size), embedding=embedding)
      arrays = [np.asarray(array) for array in jax.tree.leaves(leaf)]
      parts = parts or [
        np.empty((math.prod(rows), *array.shape[1:]), array.dtype) for array in arrays
      ]
      for part, array in zip(parts, arrays, strict=True):
        part[filled : filled + len(some)] = array
      filled += len(some)
  del raw, some
  # Not jnp.asarray, which makes two copies of what it is given.
  whole = jax.device_put([part.reshape(*rows, *part.shape[1:]) for part in parts])
  leaf = jax.tree.unflatten(jax.tree.structure(leaf), whole)
  return jax.block_until_ready(leaf)


def abstract(
  specs: Mapping[str, Any],
  places: Sequence[assemble.Place],
  file: reader.File,
  dtype: DTypeLike | None,
) -> dict[str, Any]:
  """Shapes of the tree that `read` returns."""
  flat = tree_lib.flatten(assemble.abstract(specs, dtype))
  for place in places:
    type = type_in(place, file)
    if type is not None:
      (*_, size) = place.pieces[0].rule.turned(place.pieces[0].shape)
      empty = np.zeros(formats.raw_shape(formats.find(type), (1, size)), np.uint8)
      embedding = place.spec.kind == "embedding"
      row = leaves.to_leaf(empty, type, (1, size), embedding=embedding)
      rows = place.spec.shape[:-1] if embedding else _rows(place)
      flat[place.path] = jax.tree.map(
        lambda a, rows=rows: jax.ShapeDtypeStruct((*rows, a.shape[-1]), a.dtype), row
      )
  return tree_lib.unflatten(flat)


def _rows(place: assemble.Place) -> tuple[int, ...]:
  """Stack and outputs of a matrix `[*stack, in, out]`."""
  (*lead, _, outputs) = place.spec.shape
  return (*lead, outputs)


def split(
  places: Sequence[assemble.Place], params: Mapping[str, Any]
) -> tuple[list[writer.Tensor], list[assemble.Place]]:
  """Tensors of leaves that a GGUF type holds exactly, and the places of all others.

  Args:
    places: of all parameters.
    params: leaves of any kind.
  """
  flat = tree_lib.flatten(params)
  shared = _shared(places)
  tensors: list[writer.Tensor] = []
  others = []
  for place in places:
    leaf = flat[place.path]
    type = leaves.type_of(leaf)
    fused = any(piece.name in shared for piece in place.pieces)
    if type is None or fused or not _by_rows(place):
      others.append(place)
    else:
      tensors += _tensors(place, leaf, type)
  return tensors, others


def _tensors(place: assemble.Place, leaf: Any, type: str) -> Iterator[writer.Tensor]:
  """One tensor a layer, its bytes taken out of the leaf when its turn comes."""
  for number, piece in enumerate(place.pieces):
    lead = _lead(place)
    index = tuple(map(int, np.unravel_index(number, lead))) if lead else ()
    shape = piece.rule.foreign_shape(piece.shape)

    def raw(piece=piece, index=index, shape=shape) -> np.ndarray:
      own = jax.tree.map(lambda a: a[index], leaf)
      rows = leaves.to_raw(own, type)
      whole = np.empty(formats.raw_shape(formats.find(type), shape), np.uint8)
      part = whole if piece.rule.view is None else piece.rule.view(whole)
      part[...] = rows.reshape(part.shape)
      return whole

    yield writer.Tensor(name=piece.name, type=type, shape=shape, raw=raw)


def _by_rows(place: assemble.Place) -> bool:
  """Whether rows of the foreign tensors are outputs, or entries of an embedding."""
  spec: specs_lib.ParamSpec = place.spec
  rule = place.pieces[0].rule
  turned = rule.transposed if spec.kind == "matrix" else not rule.transposed
  return spec.kind in _KINDS and turned and rule.decode is None and not rule.stacked


def _lead(place: assemble.Place) -> tuple[int, ...]:
  """Axes of a parameter in front of those that its tensors have."""
  return place.spec.shape[: len(place.spec.shape) - len(place.pieces[0].shape)]


def _shared(places: Sequence[assemble.Place]) -> set[str]:
  """Names of tensors that several parameters are parts of."""
  seen: set[str] = set()
  shared = set()
  for place in places:
    for piece in place.pieces:
      (shared if piece.name in seen else seen).add(piece.name)
  return shared
