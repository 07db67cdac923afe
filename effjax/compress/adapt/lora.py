"""Low-rank adapters that train beside weights that stay (LoRA, rsLoRA, QLoRA).

    y = x W + scale (x A) B

Source: Hu et al. 2021, arXiv:2106.09685, section 4.1: one factor starts random, the
other at zero, so that nothing changes before training; scale = alpha / R. Kalajdzievski
2023, arXiv:2312.03732: alpha / sqrt(R) (`rank_stabilized`), with which gradients do not
vanish as R grows. On quantized weights it is QLoRA (Dettmers et al. 2023,
arXiv:2305.14314), on pruned ones their recovery. The random factor is uniform within
1 / sqrt(inputs), as in the authors' code and in PEFT; the paper says Gaussian.

A "train" stage that follows trains the adapters alone, unless its `where` says
otherwise; `merge_lora` adds them to the weights afterwards.

On a pruned weight what is added is pruned alike (`keep_zeros`): a `Masked` leaf over
the `Adapted` one. So the model that trains is the sparse one, merging is exact, and no
zero wakes up; as in LoSA (Huang et al. 2025, arXiv:2501.14713). The sum is
formed for it, and so is its gradient, as in full fine-tuning: beside optimizer state
and checkpoints, which are those of LoRA, a step costs what it costs there, and decoding
before merging far more. With `keep_zeros=False` the sparse weight is the base: a step
costs two thin products more than a forward pass and its gradient to activations, but
the sum is dense, and merging gives up either the zeros or a part of what was learned.
"""

import dataclasses
import functools
import zlib
from collections.abc import Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from effjax.core import config, errors, select, technique
from effjax.core import tree as tree_lib
from effjax.weights import leaf as leaf_lib
from effjax.weights.leaves import adapted, fake_quantized, masked

_KINDS = ("matrix", "embedding", "router")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoRAOptions:
  """Options of low-rank adapters; their factors are float32.

  Attributes:
    rank: R of every selected parameter; the smaller of its two sides where that is
      less.
    alpha: numerator of the scale.
    rank_stabilized: whether the scale is alpha / sqrt(rank) instead of alpha / rank.
    keep_zeros: whether what is added to a pruned weight is pruned alike.
    seed: of the random factors; those of a parameter depend on nothing else but its
      path.
  """

  rank: int = 8
  alpha: float = 16.0
  rank_stabilized: bool = False
  keep_zeros: bool = True
  seed: int = 0

  def __post_init__(self):
    config.require(self.rank >= 1, f"rank={self.rank} must be at least 1")
    config.require(self.alpha > 0, f"alpha={self.alpha} must be positive")
    config.require(self.seed >= 0, f"seed={self.seed} must not be negative")

  @property
  def scale(self) -> float:
    """What the product of the factors is multiplied by."""
    return self.alpha / (self.rank**0.5 if self.rank_stabilized else self.rank)


def adapt(
  params: Mapping[str, Any],
  specs: Mapping[str, Any],
  stats: Any,
  paths: Collection[str],
  options: LoRAOptions,
) -> dict[str, Any]:
  """Puts `Adapted` leaves in place of the selected parameters; nothing else changes.

  Raises:
    InputError: a parameter that is no matrix, or is adapted already.
  """
  del stats
  key = jax.random.key(options.seed)

  def one(path: str, leaf: Any, spec: Any) -> Any:
    if path not in paths:
      return leaf
    if spec.kind not in _KINDS:
      raise errors.InputError(
        f"lora cannot adapt {path} of kind {spec.kind!r}; it takes {', '.join(_KINDS)}"
      )
    if adapted.is_adapted(leaf):
      raise errors.InputError(
        f"{path} is already adapted; start this stage after a merge_lora"
      )
    own = jax.random.fold_in(key, zlib.crc32(path.encode()))
    make = functools.partial(_adapted, own, options, spec.kind == "embedding")
    mask = _mask(leaf) if options.keep_zeros else None
    if mask is None:
      return make(leaf)
    if isinstance(leaf, masked.Masked):
      return dataclasses.replace(leaf, values=make(leaf.values))
    return masked.Masked.create(make(leaf), mask)

  return tree_lib.map_leaves(one, params, specs)


def _adapted(
  key: jax.Array, options: LoRAOptions, is_embedding: bool, base: Any
) -> adapted.Adapted:
  """Random numbers on the side of the D channels, zeros on that of the V tokens."""
  *stack, rows, columns = base.shape
  rank = min(options.rank, rows, columns)
  inputs = columns if is_embedding else rows
  shapes = (*stack, rows, rank), (*stack, rank, columns)
  zeros = jnp.zeros(shapes[0 if is_embedding else 1], jnp.float32)
  bound = inputs**-0.5
  drawn = jax.random.uniform(
    key, shapes[1 if is_embedding else 0], minval=-bound, maxval=bound
  )
  down, up = (zeros, drawn) if is_embedding else (drawn, zeros)
  return adapted.Adapted.create(base, down, up, options.scale)


def _mask(leaf: Any) -> jax.Array | None:
  """What a pruned weight keeps, bool; None for any other."""
  if leaf_lib.is_leaf_kind(leaf) and leaf.pruned:
    return leaf.mask()
  return _mask(leaf.values) if isinstance(leaf, fake_quantized.FakeQuantized) else None


TECHNIQUE = technique.Transform(
  fn=adapt,
  options_cls=LoRAOptions,
  default_where=select.Where(kind=("matrix",)),
  equivalent=True,
)
