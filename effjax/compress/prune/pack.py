"""Masked weights become what stays of them and its places, of any pattern.

The function is the same, bit for bit; bytes in memory and on disk are really fewer.
Places are held as a bitmap (a bit a weight) or as compressed rows (8, 16 or 32 bits a
kept weight), whichever is smaller for the matrix; see weights.leaves.compressed.
Pruned weights that were quantized, before or after, keep the codes of what stays and
all scales.
"""

import dataclasses
import functools
from collections.abc import Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from effjax.core import config, errors, select, technique
from effjax.core import tree as tree_lib
from effjax.ops.matmul import places
from effjax.weights import leaf as leaf_lib
from effjax.weights.leaves import compressed, fake_quantized, masked

SMALLEST = "smallest"


@dataclasses.dataclass(frozen=True, kw_only=True)
class PackOptions:
  """Options of packing.

  Attributes:
    layout: "bitmap", "csr", or "smallest" for the smaller one, for each parameter.
  """

  layout: str = SMALLEST

  def __post_init__(self):
    if self.layout not in (SMALLEST, *places.LAYOUTS):
      raise errors.unknown("layout", self.layout, (SMALLEST, *places.LAYOUTS))


def pack(
  params: Mapping[str, Any],
  specs: Mapping[str, Any],
  stats: Any,
  paths: Collection[str],
  options: PackOptions,
) -> dict[str, Any]:
  """Replaces every `Masked` parameter of the selection by a `Compressed` one.

  Matrices that are stacked hold as much as the fullest of them.

  Raises:
    InputError: there is none, or one over values that cannot be taken apart.
  """
  del specs, stats
  flat = tree_lib.flatten(params)
  chosen = [path for path in sorted(paths) if isinstance(flat[path], masked.Masked)]
  if not chosen:
    raise errors.InputError(
      "pack found no masked weight among those selected; start this stage after one "
      "that prunes, such as 'magnitude', with packed=False"
    )
  layout = None if options.layout == SMALLEST else options.layout
  for path in chosen:
    values = flat[path].values
    _require_single(path, values)
    count = _most(flat[path])
    flat[path] = _packed(flat[path], layout=layout, count=count)
  return tree_lib.unflatten(flat)


def _require_single(path: str, values: Any) -> None:
  """Raises InputError for values of which single ones are not held."""
  config.require(
    not isinstance(values, fake_quantized.FakeQuantized),
    f"{path} is a mask over a fake_quantized leaf; harden it first",
  )
  config.require(
    not leaf_lib.is_leaf_kind(values) or isinstance(values, compressed.CODED),
    f"{path} is a mask over a {getattr(values, 'kind', '')} leaf, whose weights are "
    "not held one by one; pack takes masks over arrays and codes (quantized, coded)",
  )


def _most(leaf: masked.Masked) -> int:
  """The most weights that are kept of a matrix; of shapes, all there are."""
  kept = _num_kept(leaf)
  if isinstance(kept, jax.core.Tracer):
    return leaf.shape[-1] * leaf.shape[-2]
  return int(kept)


@jax.jit
def _num_kept(leaf: masked.Masked) -> jax.Array:
  return jnp.max(jnp.sum(leaf.mask(), axis=(-1, -2), dtype=jnp.int32))


@functools.partial(jax.jit, static_argnames=("layout", "count"))
def _packed(
  leaf: masked.Masked, *, layout: str | None, count: int
) -> compressed.Compressed:
  """One parameter, under jit so that it needs no second copy."""
  return compressed.Compressed.create(
    leaf.values, leaf.mask(), layout=layout, count=count
  )


TECHNIQUE = technique.Transform(
  fn=pack,
  options_cls=PackOptions,
  default_where=select.Where(),
  after="magnitude",
  depends_on_values=True,
)
