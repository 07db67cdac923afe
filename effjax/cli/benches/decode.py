"""Decoding speed of each leaf kind: fp32, int8, dynamic int8 and int4, side by side.

Every variant is the same random model, quantized; only its leaves differ. Variants take
turns, a few tokens each, so that a slow moment of the machine hits all of them; the
median is over all tokens. Ratios are to fp32, above 1 is faster.
"""

import dataclasses
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from effjax.cli import timing
from effjax.compress import registry as transforms
from effjax.core import specs as specs_lib
from effjax.infer import engine
from effjax.models import config as model_config
from effjax.models import decoder
from effjax.ops.matmul import native

VARIANTS = {
  "fp32": None,
  "int8 weight-only": {"bits": 8},
  "int8 dynamic": {"bits": 8, "activations": "int8"},
  "int4 group 32": {"bits": 4, "group": 32},
}
_PROMPT_TOKENS = 128
_WARM_UP_TOKENS = 8


@dataclasses.dataclass
class _Lane:
  """One variant while it is being timed."""

  decoding: engine.Decoding
  token_B: Any
  state: Any
  secs: list[float]


def bench(quick: bool = False) -> timing.Table:
  """Times one decoding step for each width, batch and variant.

  Args:
    quick: a tiny model and few tokens, to see that it works; the numbers mean nothing.
  """
  widths, num_layers, rounds, turn = (
    ((64,), 2, 2, 4) if quick else ((512, 1024), 8, 8, 8)
  )
  rows = []
  for embed_dim in widths:
    for batch in (1, 8):
      rows += _compare(embed_dim, num_layers, batch, rounds, turn)
  return timing.Table(
    title="one decoding step after a prompt of 128 tokens",
    rows=rows,
    notes=[
      f"attention decoder, {num_layers} layers, vocabulary 2048, float32 activations",
      f"medians of {rounds * turn} tokens a variant, taking turns of {turn}",
      f"device: {jax.devices()[0].device_kind}",
      f"int8 dynamic: {_integer_product()}",
    ],
  )


def _integer_product() -> str:
  """Which product the dynamic variant executed, and why."""
  if jax.default_backend() != "cpu":
    return "XLA's own integer product"
  status = native.status()
  if status.available:
    return f"native integer product, {status.reason}"
  return f"XLA's own integer product ({status.reason})"


def _compare(
  embed_dim: int, num_layers: int, batch: int, rounds: int, turn: int
) -> list[dict[str, Any]]:
  max_len = _PROMPT_TOKENS + _WARM_UP_TOKENS + rounds * turn
  lanes = {
    name: _lane(embed_dim, num_layers, batch, max_len, options)
    for name, options in VARIANTS.items()
  }
  for lane in lanes.values():
    _decode(lane, _WARM_UP_TOKENS)
    lane.secs.clear()
  for _ in range(rounds):
    for lane in lanes.values():
      _decode(lane, turn)
  base = np.median(lanes["fp32"].secs)
  return [
    {
      "embed_dim": embed_dim,
      "batch": batch,
      "variant": name,
      "ms_p50": 1e3 * float(np.median(lane.secs)),
      "ms_p90": 1e3 * float(np.quantile(lane.secs, 0.9)),
      "tokens_per_sec": batch / float(np.median(lane.secs)),
      "speedup": float(base / np.median(lane.secs)),
    }
    for name, lane in lanes.items()
  ]


def _lane(
  embed_dim: int, num_layers: int, batch: int, max_len: int, options: Any
) -> _Lane:
  model = decoder.Decoder(
    model_config.DecoderConfig(
      vocab_size=2048,
      embed_dim=embed_dim,
      num_layers=num_layers,
      mixer_options={
        "attention": {
          "num_heads": embed_dim // 64,
          "num_kv_heads": -(-embed_dim // 256),
        }
      },
      max_len=max_len,
    )
  )
  params = jax.jit(model.init)(jax.random.key(0), *model.example_inputs())["params"]
  if options is not None:
    everything = {"kind": ("matrix", "embedding")}
    params = transforms.find("rtn")(
      params, specs_lib.specs(model), where=everything, options=options
    )
  decoding = engine.Decoding(model, params, batch, max_len)
  tokens_BL = jnp.zeros((batch, _PROMPT_TOKENS), jnp.int32)
  logits_BV, state = decoding.prefill(tokens_BL)
  token_B = jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
  return _Lane(decoding, token_B, state, [])


def _decode(lane: _Lane, num_tokens: int) -> None:
  for _ in range(num_tokens):
    start = time.perf_counter()
    logits_BV, lane.state = lane.decoding.step(lane.token_B, lane.state)
    jax.block_until_ready(logits_BV)
    lane.secs.append(time.perf_counter() - start)


TECHNIQUE = bench
