"""Prefill and decode latency, as a user waits for them: one call, then wait for it.

Sampling is left out: tokens are drawn beforehand, and only the model's step is timed.
"""

import dataclasses
import time
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from effjax.infer import engine
from effjax.measure import config as config_lib


@dataclasses.dataclass(frozen=True, kw_only=True)
class Latency:
  """Wall times of one model.

  Attributes:
    prefill_ms: median time to read the prompt, in milliseconds.
    decode_ms_p50: median time of a decoded token (of a whole batch).
    decode_ms_p90: 90th percentile.
    tokens_per_sec: decoded tokens over the time all of them took, batch included.
  """

  prefill_ms: float
  decode_ms_p50: float
  decode_ms_p90: float
  tokens_per_sec: float


def measure(
  model: Any,
  params: Mapping[str, Any],
  config: config_lib.MeasureConfig,
  seed: int = 0,
) -> Latency:
  """Times prefill and decoding with the state donated from step to step.

  Args:
    model: a Decoder.
    params: its parameters, of any leaf kinds.
    config: lengths, batch and repeats.
    seed: of the random tokens that are fed.

  Raises:
    InputError: prompt, warm-up and timed tokens are more than the model was made for.
  """
  decoding = engine.Decoding(model, params, config.batch, config.needed_len)
  rng = np.random.default_rng(seed)
  vocab = model.config.vocab_size
  num_steps = config.warmup_tokens + config.decode_tokens
  prompt_BL = rng.integers(0, vocab, (config.batch, config.prompt_tokens), np.int32)
  tokens_LB = rng.integers(0, vocab, (num_steps, config.batch), np.int32)
  prompt_BL = jax.device_put(prompt_BL)
  tokens = [jax.device_put(token_B) for token_B in tokens_LB]

  _, state = jax.block_until_ready(decoding.prefill(prompt_BL))
  prefill_ns = []
  for _ in range(config.prefill_repeats):
    del state
    start = time.perf_counter_ns()
    _, state = jax.block_until_ready(decoding.prefill(prompt_BL))
    prefill_ns.append(time.perf_counter_ns() - start)

  if not config.warmup_tokens:
    # Compilation is never part of a timed step.
    jax.block_until_ready(decoding.step(tokens[0], decoding.init_state()))
  decode_ns = []
  for token_B in tokens:
    start = time.perf_counter_ns()
    _, state = jax.block_until_ready(decoding.step(token_B, state))
    decode_ns.append(time.perf_counter_ns() - start)
  return summarize(prefill_ns, decode_ns[config.warmup_tokens :], config.batch)


def summarize(prefill_ns: list[int], decode_ns: list[int], batch: int) -> Latency:
  """Percentiles of timings given in nanoseconds, one entry a call."""
  p50, p90 = np.percentile(decode_ns, [50, 90])
  return Latency(
    prefill_ms=float(np.median(prefill_ns)) / 1e6,
    decode_ms_p50=float(p50) / 1e6,
    decode_ms_p90=float(p90) / 1e6,
    tokens_per_sec=batch * len(decode_ns) * 1e9 / sum(decode_ns),
  )
