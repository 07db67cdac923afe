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
from effjax.models import encoder


@dataclasses.dataclass(frozen=True, kw_only=True)
class Latency:
  """Wall times of one model.

  Attributes:
    prefill_ms: median time to read the prompt, in milliseconds.
    decode_ms_p50: median time of a decoded token (of a whole batch); None, as are the
      next two, of an encoder, which decodes nothing.
    decode_ms_p90: 90th percentile.
    tokens_per_sec: decoded tokens over the time all of them took, batch included.
  """

  prefill_ms: float
  decode_ms_p50: float | None = None
  decode_ms_p90: float | None = None
  tokens_per_sec: float | None = None


def measure(
  model: Any,
  params: Mapping[str, Any],
  config: config_lib.MeasureConfig,
  seed: int = 0,
) -> Latency:
  """Times prefill and decoding with the state donated from step to step.

  Of an encoder it times reading the prompts, with everything it puts out.

  Args:
    model: a Decoder or Encoder.
    params: its parameters, of any leaf kinds.
    config: lengths, batch and repeats.
    seed: of the random tokens that are fed.

  Raises:
    InputError: prompt, warm-up and timed tokens are more than the model was made for.
  """
  rng = np.random.default_rng(seed)
  vocab = model.config.vocab_size
  if isinstance(model, encoder.Encoder):
    tokens_BL = rng.integers(0, vocab, (config.batch, config.prompt_tokens), np.int32)
    return _measure_encoder(model, params, tokens_BL, config.prefill_repeats)
  decoding = engine.Decoding(model, params, config.batch, config.needed_len)
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


def _measure_encoder(
  model: encoder.Encoder,
  params: Mapping[str, Any],
  tokens_BL: np.ndarray,
  repeats: int,
) -> Latency:
  forward = jax.jit(lambda params, tokens: model.apply({"params": params}, tokens)[0])
  tokens_BL = jax.device_put(tokens_BL)
  jax.block_until_ready(forward(params, tokens_BL))
  taken_ns = []
  for _ in range(repeats):
    start = time.perf_counter_ns()
    jax.block_until_ready(forward(params, tokens_BL))
    taken_ns.append(time.perf_counter_ns() - start)
  return Latency(prefill_ms=float(np.median(taken_ns)) / 1e6)


def summarize(prefill_ns: list[int], decode_ns: list[int], batch: int) -> Latency:
  """Percentiles of timings given in nanoseconds, one entry a call."""
  p50, p90 = np.percentile(decode_ns, [50, 90])
  return Latency(
    prefill_ms=float(np.median(prefill_ns)) / 1e6,
    decode_ms_p50=float(p50) / 1e6,
    decode_ms_p90=float(p90) / 1e6,
    tokens_per_sec=batch * len(decode_ns) * 1e9 / sum(decode_ns),
  )
