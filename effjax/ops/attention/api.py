"""The entry to attention: one function, the implementation picked by facts.

`attention` is for whole sequences, see `choice` for its implementations, and `context`
for what runs where the active rules split their length between devices;
`cached_attention` and `decode_attention` are for queries over a cache.
"""

import functools
from typing import Any

import jax

from effjax.core import counting, shard
from effjax.ops.attention import (
  blockwise,
  choice,
  context,
  cudnn,
  decode,
  patterns,
  reference,
  splash,
  xla,
)

IMPLEMENTATIONS = {
  "xla": xla.attention,
  "blockwise": blockwise.attention,
  "splash": splash.attention,
  "cudnn": cudnn.attention,
  "reference": reference.attention,
}
NAMES = ("auto", *IMPLEMENTATIONS)
_KERNELS = ("splash", "cudnn")

Problem = choice.Problem
choose = choice.choose
cached_attention = decode.cached_attention
decode_attention = decode.decode_attention


def attention(
  q_BLHK: jax.Array,
  k_BSGK: jax.Array,
  v_BSGW: jax.Array,
  *,
  pattern: patterns.Pattern = patterns.CAUSAL,
  implementation: str = "auto",
  q_positions_BL: jax.Array | None = None,
  kv_positions_BS: jax.Array | None = None,
  q_segments_BL: jax.Array | None = None,
  kv_segments_BS: jax.Array | None = None,
  slopes_H: jax.Array | None = None,
  logit_cap: float | None = None,
  scale: float | None = None,
) -> jax.Array:
  """Softmax attention of every query over the keys it may see.

  Packed documents need segments only: positions in a document are counted from them.
  Explicit positions are for sequences in another order than that of the indices; they
  cost most implementations their savings.

  Args:
    q_BLHK, k_BSGK, v_BSGW: queries, keys and values, float32 or bfloat16; H is a
      multiple of G; W, the size of a value head, may differ from K.
    pattern: who sees whom inside a document.
    implementation: "auto" or a name in IMPLEMENTATIONS.
    q_positions_BL, kv_positions_BS: int32 from 0 in each document; one of them alone
      serves both if L == S.
    q_segments_BL, kv_segments_BS: int32; a query sees keys of its own segment, and
      segment 0 (padding) neither sees nor is seen; q's serves both if L == S. Equal
      segments are neighbours.
    slopes_H: m of the bias -m |q_pos - k_pos| on the scores (ALiBi), without gradient.
    logit_cap: c of `c * tanh(scores / c)`, before bias and mask.
    scale: factor of the scores, default K ** -0.5.

  Returns:
    y_BLHW in the dtype of q. Scores, softmax and sums are float32. Rows that see no key
    are zero and have zero gradients.

  Raises:
    InputError: an unknown implementation, or one that cannot do what is asked (it says
      what); H not a multiple of G; segments or positions of one side only with L != S;
      a length or heads that the devices do not divide which the rules split them over.
  """
  xla.check_heads(q_BLHK, k_BSGK)
  problem = choice.Problem(
    **device_facts(),
    q_shape=q_BLHK.shape,
    k_shape=k_BSGK.shape,
    v_shape=v_BSGW.shape,
    dtype=q_BLHK.dtype,
    pattern=pattern,
    segments=q_segments_BL is not None or kv_segments_BS is not None,
    positions=q_positions_BL is not None or kv_positions_BS is not None,
    slopes=slopes_H is not None,
    logit_cap=logit_cap is not None,
  )
  options = {
    "implementation": implementation,
    "q_positions_BL": q_positions_BL,
    "kv_positions_BS": kv_positions_BS,
    "q_segments_BL": q_segments_BL,
    "kv_segments_BS": kv_segments_BS,
    "slopes_H": slopes_H,
    "logit_cap": logit_cap,
    "scale": scale,
  }
  run = _on_one_device
  if problem.length_ways > 1:
    run = functools.partial(context.attention, run=run)
  return run(q_BLHK, k_BSGK, v_BSGW, problem, **options)


def _on_one_device(
  q_BLHK: jax.Array,
  k_BSGK: jax.Array,
  v_BSGW: jax.Array,
  problem: choice.Problem,
  *,
  implementation: str,
  **options: Any,
) -> jax.Array:
  """Attention over whole sequences."""
  name = choice.explain(implementation, problem).name
  # A trace shows no products of a kernel.
  if counting.active() and name in _KERNELS:
    name = "blockwise"
  return IMPLEMENTATIONS[name](
    q_BLHK, k_BSGK, v_BSGW, pattern=problem.pattern, **options
  )


def explain(implementation: str, problem: choice.Problem) -> choice.Choice:
  """What `attention` would run: the choice, or the given name if it can.

  Raises:
    InputError: the named implementation is unknown or cannot, or the length cannot be
      split as the problem says.
  """
  if problem.length_ways > 1:
    return context.explain(implementation, problem)
  return choice.explain(implementation, problem)


def device_facts() -> dict[str, Any]:
  """Platform and compute capability of the active mesh or the default device.

  And what of attention the active rules split.
  """
  return _platform() | context.facts()


def _platform() -> dict[str, Any]:
  device = shard.device()
  if device.platform == "tpu":
    return {"platform": "tpu"}
  if device.platform not in ("gpu", "cuda"):
    # Any other device gets the forms in plain XLA, as the CPU does.
    return {"platform": "rocm" if device.platform == "rocm" else "cpu"}
  if "rocm" in device.client.platform_version:
    return {"platform": "rocm"}
  capability = tuple(int(n) for n in str(device.compute_capability).split("."))
  return {"platform": "cuda", "capability": capability}
