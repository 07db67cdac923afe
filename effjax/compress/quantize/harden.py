"""Fake-quantized weights become the leaves that they were used as in training.

Codes and scales are those of the last forward pass: every use of a fake-quantized
weight made this leaf already, so that the model computes what it did before, and no
floats are left.
"""

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

import jax

from effjax.core import errors, select, technique
from effjax.core import tree as tree_lib
from effjax.weights.leaves import fake_quantized


@dataclasses.dataclass(frozen=True, kw_only=True)
class HardenOptions:
  """There is nothing to choose: the leaves know their formats."""


def harden(
  params: Mapping[str, Any],
  specs: Mapping[str, Any],
  stats: Any,
  paths: Collection[str],
  options: HardenOptions,
) -> dict[str, Any]:
  """Replaces every fake-quantized leaf of the selection, also inside other leaves.

  Raises:
    InputError: there is none.
  """
  del specs, stats, options
  flat = tree_lib.flatten(params)
  chosen = [path for path in sorted(paths) if _is_fake_somewhere(flat[path])]
  if not chosen:
    raise errors.InputError(
      "harden found no fake-quantized weight among those selected; start this stage "
      "after one of 'qat' or 'lsq', or after their training"
    )
  return tree_lib.unflatten(flat | {path: _serve(flat[path]) for path in chosen})


@jax.jit
def _serve(leaf: Any) -> Any:
  """One parameter, under jit so that it keeps its sharding and needs no second copy."""
  serve = lambda part: part.served() if _is_fake(part) else part
  return jax.tree.map(serve, leaf, is_leaf=_is_fake)


def _is_fake(value: Any) -> bool:
  return isinstance(value, fake_quantized.FakeQuantized)


def _is_fake_somewhere(leaf: Any) -> bool:
  return any(map(_is_fake, jax.tree.leaves(leaf, is_leaf=_is_fake)))


TECHNIQUE = technique.Transform(
  fn=harden,
  options_cls=HardenOptions,
  default_where=select.Where(),
  after="qat",
)
