"""Trained adapters are added to the weights that they stand beside.

Source: Hu et al. 2021, arXiv:2106.09685, section 4.1: `W + scale A B` serves at the
cost of W. What becomes of a weight depends on what it was before `lora`:

- plain: the sum.
- pruned, the default of `lora`: the sum, under the same mask or packed alike. Nothing
  was added to what is pruned, so this is exact.
- pruned, after `lora` with keep_zeros=False: the sum is dense. With `keep_zeros` its
  mask is applied, which keeps the sparsity and changes what the model computes (a log
  line says so); without it the weight is dense again and computes the same.
- low-rank: rank + R; rotated: rotated.
- codes: refused, because rounding the sum again would change the outputs (as reported
  in huggingface/peft#2321). Serve the adapters beside the codes, or merge with
  `dequantize` into floats, exactly, and quantize those anew.
"""

import dataclasses
import functools
import logging
from collections.abc import Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from effjax.core import errors, select, technique
from effjax.core import tree as tree_lib
from effjax.weights import leaf as leaf_lib
from effjax.weights.leaves import (
  adapted,
  block_sparse,
  compressed,
  low_rank,
  masked,
  n_of_m,
  rotated,
)

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MergeLoRAOptions:
  """Options of merging.

  Attributes:
    keep_zeros: whether a pruned weight stays pruned where what was added to it is
      dense.
    dequantize: whether codes are multiplied out, to take up what was added.
  """

  keep_zeros: bool = True
  dequantize: bool = False


def merge(
  params: Mapping[str, Any],
  specs: Mapping[str, Any],
  stats: Any,
  paths: Collection[str],
  options: MergeLoRAOptions,
) -> dict[str, Any]:
  """Replaces every adapted leaf of the selection by the sum that it stands for.

  Raises:
    InputError: there is none; or one is over codes, without `dequantize`.
  """
  del specs, stats
  flat = tree_lib.flatten(params)
  chosen = [path for path in sorted(paths) if adapted.is_adapted(flat[path])]
  if not chosen:
    raise errors.InputError(
      "merge_lora found no adapted weight among those selected; start this stage after "
      "'lora', or after its training"
    )
  cut = [path for path in chosen if _is_cut(flat[path], options)]
  for path in chosen:
    if not options.dequantize and not _takes_floats(_base(flat[path])):
      raise errors.InputError(
        f"{path} is adapted over codes, which cannot take up what was added; keep it "
        "as it is, or merge with dequantize=True into floats and quantize those anew"
      )
    flat[path] = _merge(flat[path], options)
  if cut:
    log.warning(
      "merge_lora applies the masks of %d weights to dense additions: the model no "
      "longer computes what it was trained to; lora with keep_zeros=True avoids it",
      len(cut),
    )
  return tree_lib.unflatten(flat)


@functools.partial(jax.jit, static_argnames=("options",))
def _merge(leaf: Any, options: MergeLoRAOptions) -> Any:
  """One parameter, under jit so that it keeps its sharding and needs no second copy."""
  base = _base(leaf)
  mask = leaf.mask() if isinstance(leaf, masked.Masked) else None
  if mask is None and _is_pruned(base) and options.keep_zeros:
    mask = base.mask()
  if mask is not None:
    return _pruned(base, leaf.dense(), mask)
  if isinstance(base, low_rank.LowRank) and _takes_floats(base):
    # One product after the other, next to each other: no rank is spent twice.
    left = (base.left, (leaf.down * leaf.scale).astype(base.left.dtype))
    right = (base.right, leaf.up.astype(base.right.dtype))
    return low_rank.LowRank.create(
      jnp.concatenate(left, axis=-1), jnp.concatenate(right, axis=-2)
    )
  if isinstance(base, rotated.Rotated) and _takes_floats(base):
    return rotated.Rotated.create(leaf.dense(), base.block)
  return leaf.dense()


def _pruned(base: Any, w: jax.Array, mask: jax.Array) -> leaf_lib.Leaf:
  """What stays of w, held as the base holds what stays of it."""
  w = jnp.where(mask, w, jnp.zeros((), w.dtype))
  if isinstance(base, n_of_m.NOfM):
    return n_of_m.NOfM.create(w, mask, keep=base.keep, of=base.of, axis=base.axis)
  if isinstance(base, block_sparse.BlockSparse):
    count = base.rows.shape[-1]
    return block_sparse.BlockSparse.create(w, mask, base.block, count, axis=base.axis)
  if isinstance(base, compressed.Compressed):
    return base.refill(w)
  return masked.Masked.create(w, mask)


def _is_pruned(leaf: Any) -> bool:
  return leaf_lib.is_leaf_kind(leaf) and leaf.pruned


def _base(leaf: Any) -> Any:
  """What an adapted leaf, perhaps one under a mask, was made of."""
  return leaf.base if isinstance(leaf, adapted.Adapted) else leaf.values.base


def _is_cut(leaf: Any, options: MergeLoRAOptions) -> bool:
  """Whether merging takes away a part of what was added."""
  if not (options.keep_zeros and isinstance(leaf, adapted.Adapted)):
    return False
  # A plan traces this on shapes, of which there is nothing to say.
  return _is_pruned(leaf.base) and not isinstance(leaf.up, jax.core.Tracer)


def _takes_floats(base: Any) -> bool:
  """Whether the sum can be held like the base: in its values, or its factors."""
  if not leaf_lib.is_leaf_kind(base):
    return True
  if isinstance(base, low_rank.LowRank):
    parts = (base.left, base.right)
  elif isinstance(base, compressed.Compressed):
    return base.is_array
  elif base.pruned or isinstance(base, rotated.Rotated):
    parts = (base.values,)
  else:
    return False
  return not any(map(leaf_lib.is_leaf_kind, parts))


TECHNIQUE = technique.Transform(
  fn=merge,
  options_cls=MergeLoRAOptions,
  default_where=select.Where(),
  after="lora",
)
