"""Multi-scale retention (RetNet): linear attention with one fixed decay per head.

Source: Sun et al. 2023, arXiv:2307.08621, eq. 5 to 8; values twice as wide as keys and
swish gate as there. The norm of each head is the authors' code (torchscale): root mean
square, no scale of its own, eps 1e-6; the paper writes GroupNorm, and
flash-linear-attention gives its RMS norm a scale and eps 1e-5.
Deviations: rotary positions as everywhere here (halves rotated, exponents -2i / K; the
xPos of the paper reduces to them and the decay; torchscale turns neighbours by
exponents -i / (K / 2 - 1)); the normalizations of section 2.3 in front of the norm,
which it undoes, are left out; weights are initialized as in the other mixers, not by
Xavier with gain 2^-2.5; heads of 64 by default, as in the other mixers, where the
paper's have 256, which at small widths would leave a single decay.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike

from effjax.core import errors
from effjax.nn import norm
from effjax.nn.caches import recurrent
from effjax.nn.mixers import _linear_heads, _recurrent
from effjax.ops.attention import rope as rope_lib
from effjax.ops.linear_attention import api as linear_ops


@dataclasses.dataclass(frozen=True, kw_only=True)
class RetNetOptions:
  """Options of multi-scale retention.

  Attributes:
    num_heads: H; head h = 0, 1, ... decays by 1 - 2^(-5 - h) a token.
    head_dim: K, size of a head of queries and keys (even, for the rotation).
    value_dim: P, size of a head of values; None for twice `head_dim`.
    rope_theta: base of the rotary wavelengths.
    norm_eps: added to mean squares in the norm of each head.
    chunk: tokens processed by matrix products at a time; does not change results.
  """

  num_heads: int = 4
  head_dim: int = 64
  value_dim: int | None = None
  rope_theta: float = 10_000.0
  norm_eps: float = 1e-6
  chunk: int = 64

  def __post_init__(self):
    _linear_heads.check_options(self)

  def narrowed(self, axis: str, count: int, embed_dim: int) -> "RetNetOptions":
    """Raises InputError: a head without its number has another decay."""
    raise errors.InputError(
      "heads of retnet cannot be removed: the decay of a head is that of its number"
    )

  @property
  def value_head_dim(self) -> int:
    """P, with its default."""
    return self.value_dim or 2 * self.head_dim


class RetNet(_recurrent.RecurrentMixer):
  """Multi-scale retention; causal by construction."""

  options_cls = RetNetOptions

  def _mix(
    self,
    x_BLD: jax.Array,
    state: recurrent.RecurrentState | None,
    positions: jax.Array,
    segments: jax.Array,
  ) -> _recurrent.Mixed:
    opts = self.options
    cos_sin = rope_lib.angles(positions, opts.head_dim, opts.rope_theta)
    q_BLHK, k_BLHK = (
      rope_lib.rotate(
        _linear_heads.project(self, x_BLD, name, opts.num_heads, opts.head_dim),
        *cos_sin,
      )
      for name in ("q", "k")
    )
    v_BLHP, gate_BLHP = (
      _linear_heads.project(
        self, x_BLD, name, opts.num_heads, opts.value_head_dim, "inner"
      )
      for name in ("v", "gate")
    )
    y_BLHP, memory_BHPK = linear_ops.retention(
      q_BLHK,
      k_BLHK,
      v_BLHP,
      segments_BL=segments,
      initial_state_BHPN=_recurrent.memory(state),
      chunk=opts.chunk,
    )
    one_P = jnp.ones((opts.value_head_dim,), jnp.float32)
    y_BLHP = nn.silu(gate_BLHP) * norm.rms_norm(y_BLHP, one_P, opts.norm_eps)
    # The norm and the gate stand between v and o: no one weight's outputs are read.
    return _linear_heads.output(self, y_BLHP, "inner", None), memory_BHPK, {}

  @nn.nowrap
  def init_state(
    self, batch: int, max_len: int, dtype: DTypeLike
  ) -> recurrent.RecurrentState:
    """An empty float32 state; its size does not depend on `max_len`."""
    del max_len, dtype
    opts = self.options
    return _linear_heads.init_state(
      batch, opts.num_heads, opts.value_head_dim, opts.head_dim
    )


TECHNIQUE = RetNet
