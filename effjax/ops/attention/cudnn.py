"""Attention by cuDNN's flash attention, for CUDA devices.

It masks padding by the length of a row, not by segments. A row of one document with its
padding on the right is therefore all it is given: where segments could pack several
documents, a condition at run time sends the batch to `blockwise` if they do.

Checked on an H200 (JAX 0.11.2): 18 cases of causal, full and windowed attention, heads
of 32 to 256, grouped queries, padding and packed rows, in bfloat16 and one in float16:
outputs and gradients are within 3.4e-3 of the float32 definition, in norm, as those of
`blockwise` are. JAX builds the kernel's graph while it captures a stream: two threads
that first run such programs at the same time make each other fail.

Local letter: W size of a value head.
"""

import functools

import jax
import jax.numpy as jnp

from effjax.ops.attention import blockwise, masks, patterns


def attention(
  q_BLHK: jax.Array,
  k_BSGK: jax.Array,
  v_BSGW: jax.Array,
  *,
  pattern: patterns.Pattern = patterns.CAUSAL,
  q_positions_BL: None = None,
  kv_positions_BS: None = None,
  q_segments_BL: jax.Array | None = None,
  kv_segments_BS: jax.Array | None = None,
  slopes_H: None = None,
  logit_cap: None = None,
  scale: float | None = None,
) -> jax.Array:
  """Self-attention; see `api.attention`, and `choice` for what it is not given."""
  del q_positions_BL, kv_positions_BS, slopes_H, logit_cap
  run = functools.partial(_run, pattern=pattern, scale=scale)
  if q_segments_BL is None and kv_segments_BS is None:
    return run(q_BLHK, k_BSGK, v_BSGW, None)
  q_seg = kv_segments_BS if q_segments_BL is None else q_segments_BL
  kv_seg = q_seg if kv_segments_BS is None else kv_segments_BS
  packed = functools.partial(blockwise.attention, pattern=pattern, scale=scale)
  return jax.lax.cond(
    _one_document(q_seg, kv_seg),
    lambda q, k, v: run(q, k, v, q_seg > 0),
    lambda q, k, v: packed(q, k, v, q_segments_BL=q_seg, kv_segments_BS=kv_seg),
    q_BLHK,
    k_BSGK,
    v_BSGW,
  )


def _one_document(q_seg_BL: jax.Array, kv_seg_BL: jax.Array) -> jax.Array:
  """Whether every row is one document, the same on both sides, then padding."""
  places_BL, _ = masks.documents(q_seg_BL)
  index_1L = jnp.arange(q_seg_BL.shape[1])[None]
  fits_BL = (places_BL == index_1L) | (q_seg_BL == 0)
  return jnp.all(fits_BL & (q_seg_BL == kv_seg_BL))


def _run(
  q_BLHK: jax.Array,
  k_BSGK: jax.Array,
  v_BSGW: jax.Array,
  valid_BL: jax.Array | None,
  *,
  pattern: patterns.Pattern,
  scale: float | None,
) -> jax.Array:
  window = pattern.window if isinstance(pattern, patterns.Window) else None
  arrays, lengths_B = (q_BLHK, k_BSGK, v_BSGW), None
  if valid_BL is not None:
    # What the kernel leaves at padding, in outputs and gradients, is not defined.
    keep = valid_BL[:, :, None, None]
    arrays = [jnp.where(keep, x, 0) for x in arrays]
    lengths_B = jnp.maximum(jnp.sum(valid_BL, axis=1, dtype=jnp.int32), 1)
  y_BLHW = jax.nn.dot_product_attention(
    *arrays,
    scale=scale,
    is_causal=pattern.causal,
    query_seq_lengths=lengths_B,
    key_value_seq_lengths=lengths_B,
    local_window_size=None if window is None else (window - 1, 0),
    implementation="cudnn",
  )
  return y_BLHW if valid_BL is None else jnp.where(keep, y_BLHW, 0)
