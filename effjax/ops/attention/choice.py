"""Which implementation of attention runs, decided from facts, with the reason.

| name        | what it is                                                   | where |
|-------------|--------------------------------------------------------------|-------|
| "xla"       | scores held in memory: fastest for short sequences           | all   |
| "blockwise" | memory linear in the length, skips unseen blocks             | all   |
| "splash"    | the Pallas kernel of JAX for TPUs                            | TPU   |
| "cudnn"     | cuDNN's flash attention                                      | CUDA  |
| "reference" | the naive definition, float32, slow: for tests and debugging | all   |

Nothing here computes or looks at a device: all are functions of a `Problem`. Of one
whose length is split between devices, `context` says what runs on each.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
from jax.typing import DTypeLike

from effjax.core import errors
from effjax.ops.attention import blockwise, patterns, xla

PLATFORMS = ("cpu", "cuda", "rocm", "tpu")

# Between the two forms in plain XLA, by forward and backward passes on a CPU (causal,
# heads of 64): up to SHORT tokens holding the scores is faster. From LONG on blocks
# take about as long (0.66 to 1.14 times) in a small part of the memory. Between them,
# and for patterns, blocks are taken where they compute FEWER times fewer pairs. On an
# H200, at 4,096 tokens in float32, blocks take 2.1 times as long in a quarter of the
# memory; half precision takes cuDNN's kernel there.
SHORT = 1024
LONG = 2048
FEWER = 1.5


@dataclasses.dataclass(frozen=True, kw_only=True)
class Problem:
  """What is known of a call before it runs.

  Attributes:
    platform: one of PLATFORMS.
    q_shape: [B, L, H, K].
    k_shape: [B, S, G, K].
    v_shape: [B, S, G, W].
    dtype: of the queries, keys and values.
    pattern: who sees whom.
    segments: whether there are segments, which may pack documents into a row.
    positions: whether there are explicit positions.
    slopes: whether there are linear biases.
    logit_cap: whether scores are capped.
    capability: compute capability of a CUDA device, such as (9, 0).
    length_ways: devices that the length is split over; the shapes are whole.
    head_ways: devices that the heads are split over, if they divide them.
    whole_heads: whether heads are split in place of the length; see `context`.
  """

  platform: str
  q_shape: tuple[int, ...]
  k_shape: tuple[int, ...]
  v_shape: tuple[int, ...]
  dtype: DTypeLike
  pattern: patterns.Pattern = patterns.CAUSAL
  segments: bool = False
  positions: bool = False
  slopes: bool = False
  logit_cap: bool = False
  capability: tuple[int, int] = (8, 0)
  length_ways: int = 1
  head_ways: int = 1
  whole_heads: bool = False

  def __post_init__(self):
    if self.platform not in PLATFORMS:
      raise errors.unknown("platform", self.platform, PLATFORMS)

  @property
  def self_attention(self) -> bool:
    """Whether there are as many queries as keys."""
    return self.q_shape[1] == self.k_shape[1]


class Choice(NamedTuple):
  """An implementation and why it was taken, as the end of "because ..."."""

  name: str
  reason: str


def choose(problem: Problem) -> Choice:
  """The fastest implementation that computes exactly what is asked."""
  kernel = {"tpu": "splash", "cuda": "cudnn"}.get(problem.platform)
  refused = ""
  if kernel is not None:
    why = refusal(kernel, problem)
    if why is None:
      return Choice(kernel, _KERNEL_REASONS[kernel](problem))
    refused = f"{kernel} cannot: {why}; "
  return _choose_xla(problem, refused)


def explain(implementation: str, problem: Problem) -> Choice:
  """The choice, or the given name if it can.

  Raises:
    InputError: the named implementation is unknown or cannot.
  """
  if implementation == "auto":
    return choose(problem)
  why = refusal(implementation, problem)
  if why is not None:
    raise errors.InputError(f"attention implementation={implementation!r}: {why}")
  return Choice(implementation, "it is asked for")


def refusal(name: str, problem: Problem) -> str | None:
  """Why an implementation cannot do this exactly, or None if it can.

  Raises:
    InputError: there is no implementation of that name.
  """
  if name not in REFUSALS:
    raise errors.unknown("attention implementation", name, ("auto", *REFUSALS))
  return REFUSALS[name](problem)


def _choose_xla(problem: Problem, refused: str) -> Choice:
  """Between the two forms in plain XLA, by what they execute and hold."""
  q_len, kv_len = problem.q_shape[1], problem.k_shape[1]
  in_order = problem.self_attention and not problem.positions
  whole = xla.computed_pairs(q_len, kv_len, problem.pattern, in_order=in_order)
  if max(q_len, kv_len) <= SHORT:
    reason = f"the sequence is short ({q_len} x {kv_len}, at most {SHORT})"
    return Choice("xla", refused + reason)
  block = blockwise.block_size(problem.pattern, q_len, kv_len, problem.platform)
  blocks = blockwise.computed_pairs(q_len, kv_len, problem.pattern, block)
  if problem.positions:
    blocks = max(blocks, whole)
  if blocks * FEWER <= whole:
    share = 100 * blocks / (q_len * kv_len)
    reason = f"it computes {share:.0f} % of all pairs"
    if problem.segments and not problem.pattern.relative:
      reason += " where every row of a batch is one document"
    return Choice("blockwise", refused + reason)
  if max(q_len, kv_len) >= LONG:
    reason = f"the sequence is long ({q_len} x {kv_len}, at least {LONG})"
    return Choice("blockwise", refused + reason)
  return Choice("xla", refused + f"the sequence is under {LONG}")


def _refuse_nothing(problem: Problem) -> str | None:
  del problem
  return None


def _refuse_splash(problem: Problem) -> str | None:
  if problem.platform != "tpu":
    return f"it needs a TPU, this is {problem.platform}"
  return splash_refusal(problem)


def splash_refusal(problem: Problem) -> str | None:
  """What the kernel cannot do wherever it runs."""
  if not isinstance(problem.pattern, patterns.Full | patterns.Causal | patterns.Window):
    return f"it has no {type(problem.pattern).__name__} pattern"
  if not problem.self_attention:
    q_len, kv_len = problem.q_shape[1], problem.k_shape[1]
    return f"it needs as many queries as keys, got {q_len} and {kv_len}"
  if problem.positions:
    return "it takes no explicit positions"
  if problem.slopes:
    return "it has no linear biases (ALiBi)"
  if np.dtype(problem.dtype).name not in ("float32", "bfloat16"):
    return f"it takes float32 and bfloat16, not {np.dtype(problem.dtype)}"
  return None


def _refuse_cudnn(problem: Problem) -> str | None:
  if problem.platform != "cuda":
    return f"it needs a CUDA device, this is {problem.platform}"
  return _cudnn_limits(problem) or _cudnn_features(problem)


def _cudnn_limits(problem: Problem) -> str | None:
  """Devices, types and sizes."""
  if problem.capability < (8, 0):
    version = ".".join(map(str, problem.capability))
    return f"it needs compute capability 8.0, this is {version}"
  if np.dtype(problem.dtype).name not in ("float16", "bfloat16"):
    return f"it takes float16 and bfloat16, not {np.dtype(problem.dtype)}"
  head_dim, value_dim = problem.q_shape[3], problem.v_shape[3]
  largest = 256 if problem.capability >= (9, 0) else 128
  if head_dim % 8 or head_dim > largest:
    return f"it needs a head_dim of at most {largest} in steps of 8, got {head_dim}"
  if value_dim != head_dim:
    return f"it needs value heads of the size of key heads, got {value_dim}, {head_dim}"
  return None


def _cudnn_features(problem: Problem) -> str | None:
  pattern = problem.pattern
  if not isinstance(pattern, patterns.Full | patterns.Causal | patterns.Window):
    return f"it has no {type(pattern).__name__} pattern"
  if isinstance(pattern, patterns.Window) and not pattern.causal:
    return "its windows look back only"
  if not problem.self_attention:
    q_len, kv_len = problem.q_shape[1], problem.k_shape[1]
    return f"it is used for as many queries as keys, got {q_len} and {kv_len}"
  if problem.positions:
    return "it takes no explicit positions"
  if problem.slopes:
    return "it would hold linear biases (ALiBi) as a matrix of all pairs"
  if problem.logit_cap:
    return "it cannot cap scores"
  return None


REFUSALS: Mapping[str, Callable[[Problem], str | None]] = {
  "xla": _refuse_nothing,
  "blockwise": _refuse_nothing,
  "splash": _refuse_splash,
  "cudnn": _refuse_cudnn,
  "reference": _refuse_nothing,
}


def _why_splash(problem: Problem) -> str:
  return f"the TPU kernel does {type(problem.pattern).__name__} exactly"


def _why_cudnn(problem: Problem) -> str:
  reason = f"the CUDA kernel does {type(problem.pattern).__name__} exactly"
  if problem.segments:
    reason += "; batches with packed rows take blockwise at run time"
  return reason


_KERNEL_REASONS = {"splash": _why_splash, "cudnn": _why_cudnn}
