"""Attention by JAX's Pallas kernel for TPUs ("splash": sparse flash attention).

The kernel skips blocks that causality or a window hides, knows segments and caps
scores. Lengths are padded to its blocks of 128 tokens; any head size goes (the last
dimension is padded to 128 lanes by the compiler, so 128 wastes nothing). Under active
sharding rules it runs inside `shard_map`, split over batch and heads: the compiler
cannot split a kernel by itself.

Local letter: W size of a value head.
"""

import functools
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp

from effjax.core import shard
from effjax.core.config import require
from effjax.ops.attention import patterns

# The kernel's lanes: lengths are multiples of this.
_LANES = 128
_BLOCKS = (512, 256, _LANES)


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
  logit_cap: float | None = None,
  scale: float | None = None,
  interpret: bool = False,
) -> jax.Array:
  """Self-attention; see `api.attention`, and `choice.splash_refusal` for the limits.

  Args:
    interpret: runs the kernel as ordinary operations, on any platform.
  """
  require(
    (q_positions_BL, kv_positions_BS, slopes_H) == (None, None, None),
    "splash attention takes neither explicit positions nor linear biases",
  )
  length, head_dim = q_BLHK.shape[1], q_BLHK.shape[3]
  scale = head_dim**-0.5 if scale is None else scale
  segments_BL = q_segments_BL if q_segments_BL is not None else kv_segments_BS
  kv_segments_BS = segments_BL if kv_segments_BS is None else kv_segments_BS
  extra = -length % _LANES
  if extra and segments_BL is None:
    segments_BL = kv_segments_BS = jnp.ones(q_BLHK.shape[:2], jnp.int32)
  run = functools.partial(
    _run, pattern=pattern, logit_cap=logit_cap, interpret=interpret
  )
  heads = [
    _pad_length(x, extra).transpose(0, 2, 1, 3)
    for x in ((q_BLHK * scale).astype(q_BLHK.dtype), k_BSGK, v_BSGW)
  ]
  sides = None
  if segments_BL is not None:
    sides = tuple(_pad_length(x, extra) for x in (segments_BL, kv_segments_BS))
  y_BHLW = _on_mesh(run, heads, sides)
  y_BLHW = y_BHLW.transpose(0, 2, 1, 3)[:, :length]
  if segments_BL is not None:
    # The kernel lets padding see padding.
    y_BLHW = jnp.where((segments_BL > 0)[:, :, None, None], y_BLHW, 0)
  return y_BLHW.astype(q_BLHK.dtype)


def _run(
  q_BHLK: jax.Array,
  k_BGSK: jax.Array,
  v_BGSW: jax.Array,
  segments: tuple[jax.Array, jax.Array] | None,
  *,
  pattern: patterns.Pattern,
  logit_cap: float | None,
  interpret: bool,
) -> jax.Array:
  """The kernel on what one device holds."""
  # Imported late: Pallas takes as long to import as a third of JAX.
  from jax.experimental.pallas.ops.tpu import splash_attention as lib

  num_heads, length = q_BHLK.shape[1:3]
  block = next(b for b in _BLOCKS if length % b == 0)
  names = ("q", "kv", "kv_compute", "q_dkv", "kv_dkv", "kv_dkv_compute", "q_dq")
  sizes = {f"block_{name}": block for name in (*names, "kv_dq")}
  kernel = lib.make_splash_mha(
    lib.MultiHeadMask([_mask(lib, pattern, length)] * num_heads),
    block_sizes=lib.BlockSizes(**sizes),
    head_shards=1,
    q_seq_shards=1,
    attn_logits_soft_cap=logit_cap,
    interpret=interpret,
  )
  ids = () if segments is None else (lib.SegmentIds(*segments),)
  # A compiled program shows nothing of a kernel but the name it runs under.
  with jax.named_scope(visits(pattern, length, block)):
    return jax.vmap(kernel)(q_BHLK, k_BGSK, v_BGSW, *ids)


def visits(pattern: patterns.Pattern, length: int, block: int) -> str:
  """How many blocks of scores the kernel forms, as "visits_10_of_16".

  Args:
    pattern: one that the kernel knows.
    length: tokens, a multiple of the block.
    block: tokens along either side of a block.
  """
  num = length // block
  before, after = num * block, num * block
  if isinstance(pattern, patterns.Causal):
    after = 0
  elif isinstance(pattern, patterns.Window):
    before = pattern.window - 1 if pattern.causal else pattern.window // 2
    after = 0 if pattern.causal else pattern.window // 2
  seen = 0
  for i in range(num):
    first = max(0, i * block - before) // block
    last = min(num * block - 1, (i + 1) * block - 1 + after) // block
    seen += last - first + 1
  return f"visits_{seen}_of_{num * num}"


def _mask(lib: ModuleType, pattern: patterns.Pattern, length: int) -> Any:
  shape = (length, length)
  if isinstance(pattern, patterns.Causal):
    return lib.CausalMask(shape)
  if isinstance(pattern, patterns.Window):
    near = (pattern.window - 1, 0)
    if not pattern.causal:
      near = (pattern.window // 2, pattern.window // 2)
    return lib.LocalMask(shape, near, offset=0)
  require(
    isinstance(pattern, patterns.Full),
    f"splash attention has no {type(pattern).__name__} pattern",
  )
  return lib.FullMask(shape)


def _on_mesh(
  run: functools.partial,
  heads: list[jax.Array],
  segments: tuple[jax.Array, jax.Array] | None,
) -> jax.Array:
  """`run` on every device of the active mesh, over its rows and heads."""
  active = shard.current()
  if active is None or active[0].size == 1:
    return run(*heads, segments)
  mesh, rules = active
  # Queries and keys must be cut alike, so the kv heads decide.
  kv_axes, kv_shape = ("batch", "kv", None, None), heads[1].shape
  spec = shard.partition_spec(kv_axes, kv_shape, mesh, rules)
  rows = shard.partition_spec(("batch", None), kv_shape[:2], mesh, rules)
  return jax.shard_map(
    run,
    mesh=mesh,
    in_specs=(spec, spec, spec, None if segments is None else (rows, rows)),
    out_specs=spec,
    check_vma=False,
  )(*heads, segments)


def _pad_length(x_BL: jax.Array, extra: int) -> jax.Array:
  return jnp.pad(x_BL, ((0, 0), (0, extra), *[(0, 0)] * (x_BL.ndim - 2)))
