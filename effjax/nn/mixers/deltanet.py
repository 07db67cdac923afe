"""DeltaNet: a linear attention whose memory is corrected, not added to.

Source: Yang et al. 2024, arXiv:2406.06484, sections 3 and 3.3; defaults of
flash-linear-attention's `DeltaNet` (4 heads as wide as the model together, 4 taps
without bias and SiLU on queries, keys and values, queries and keys of length 1, a norm
per head, no output gate). `allow_neg_eigval` is Grazzi et al. 2024, arXiv:2411.12537.
No deviations. K and V are the sizes of a key and of a value head.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike

from effjax.core import config
from effjax.nn import norm
from effjax.nn.caches import recurrent
from effjax.nn.mixers import _head_sizes, _recurrent
from effjax.ops.recurrence import api as recurrence_ops


@dataclasses.dataclass(frozen=True, kw_only=True)
class DeltaNetOptions(_head_sizes.HeadSizes):
  """Options of DeltaNet: the sizes of its heads, and these.

  Attributes:
    conv_taps: length of the short causal convolutions (tokens).
    chunk: tokens processed by matrix products at a time, rounded up to a power of two;
      does not change results.
    allow_neg_eigval: corrections of up to twice the error (beta in 0 to 2), with which
      the memory can track states that alternate.
    output_gate: whether the output is multiplied by the SiLU of a projection.
  """

  mixer = "deltanet"

  conv_taps: int = 4
  chunk: int = 64
  allow_neg_eigval: bool = False
  output_gate: bool = False

  def __post_init__(self):
    self.check_positive("chunk")
    config.require(self.conv_taps > 1, f"conv_taps={self.conv_taps} must be at least 2")


class DeltaNet(_recurrent.RecurrentMixer):
  """DeltaNet mixer; causal by construction."""

  options_cls = DeltaNetOptions

  def _mix(
    self,
    x_BLD: jax.Array,
    state: recurrent.RecurrentState | None,
    positions: jax.Array,
    segments: jax.Array,
  ) -> _recurrent.Mixed:
    del positions  # the recurrence knows order
    opts = self.options
    _, value_dim = opts.sizes(self.embed_dim)
    heads = opts.num_heads
    own = {"inner": _recurrent.one_each(heads, "heads")}
    streams, conv = {}, {}
    for name, (size, axis) in self._streams().items():
      stream_BLI = self._project(
        x_BLD, name, heads * size, axis, size, own.get(axis, {})
      )
      stream_BLI, conv[name] = self._convolve(
        stream_BLI, name, axis, state, segments, bias=False
      )
      streams[name] = _recurrent.split_heads(stream_BLI, size, axis)
    beta_BLH = self._project(
      x_BLD, "beta", heads, "ssm_heads", grouping=_recurrent.one_each(heads)
    )
    beta_BLH = nn.sigmoid(beta_BLH.astype(jnp.float32))
    o_BLHV, memory_BHKV = recurrence_ops.delta_rule(
      recurrence_ops.unit(streams["q"]),
      recurrence_ops.unit(streams["k"]),
      streams["v"],
      2 * beta_BLH if opts.allow_neg_eigval else beta_BLH,
      segments_BL=segments,
      initial_state_BHKV=_recurrent.memory(state),
      chunk=opts.chunk,
    )
    o_BLHV = norm.RMSNorm(axis="head", name="norm")(o_BLHV)
    if opts.output_gate:
      width = heads * value_dim
      gate_BLI = self._project(x_BLD, "gate", width, "inner", value_dim)
      o_BLHV *= nn.silu(_recurrent.split_heads(gate_BLI, value_dim, "inner"))
    o_BLI = o_BLHV.reshape(*x_BLD.shape[:2], -1)
    return self._output(o_BLI, "o", "norm", value_dim), memory_BHKV, conv

  @nn.nowrap
  def _streams(self) -> dict[str, tuple[int, str]]:
    """Size of a head and axis of each stream that is convolved."""
    key_dim, value_dim = self.options.sizes(self.embed_dim)
    return {"q": (key_dim, "heads"), "k": (key_dim, "heads"), "v": (value_dim, "inner")}

  @nn.nowrap
  def init_state(
    self, batch: int, max_len: int, dtype: DTypeLike
  ) -> recurrent.RecurrentState:
    """An empty state; its size does not depend on `max_len`."""
    del max_len
    heads = self.options.num_heads
    return recurrent.init(
      batch,
      (heads, *self.options.sizes(self.embed_dim)),
      self.options.conv_taps,
      {name: heads * size for name, (size, _) in self._streams().items()},
      jnp.dtype(dtype),
    )


TECHNIQUE = DeltaNet
