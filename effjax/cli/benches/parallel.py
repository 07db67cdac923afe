"""Every preset on a TPU slice: what a chip holds and sends, compiled without one.

The real train step is compiled for eight chips by XLA's TPU compiler (the extra
`plan`). `state` is what a chip holds of parameters and optimizer, `temp` what the step
needs besides; `sent` is what a chip sends in one step, by the usual ring algorithms,
and how much of it is of which kind. The second table is attention alone, its sequence
split: memory of a chip against length over chips.
"""

from typing import Any

import jax
import jax.numpy as jnp

from effjax.cli import timing
from effjax.core import precision
from effjax.models import config as model_config
from effjax.models import decoder
from effjax.ops.attention import api as attention_ops
from effjax.optim import config as optim_config
from effjax.parallel import collectives, topology
from effjax.parallel import mesh as mesh_lib
from effjax.parallel import spread as spread_lib
from effjax.train import config as train_config
from effjax.train import lowering

TOPOLOGY = "v5e:2x4"
# Preset, sizes of its mesh, and the MLP of the model.
LANES = (
  ("dp", {}, "swiglu"),
  ("zero1", {}, "swiglu"),
  ("zero2", {}, "swiglu"),
  ("fsdp", {}, "swiglu"),
  ("hsdp", {"data": 2}, "swiglu"),
  ("tp", {}, "swiglu"),
  ("tps", {}, "swiglu"),
  ("fsdp+tp", {"tensor": 2}, "swiglu"),
  ("ring", {}, "swiglu"),
  ("ulysses", {}, "swiglu"),
  ("fsdp+ring", {"context": 2}, "swiglu"),
  ("dp+pp", {"stage": 2}, "swiglu"),
  ("fsdp+pp", {"stage": 4}, "swiglu"),
  ("fsdp", {}, "moe"),
  ("ep", {}, "moe"),
  ("ep+fsdp", {"fsdp": 2}, "moe"),
)
_QUICK = (("fsdp", {}, "swiglu"),)
_KINDS = {
  "all-gather": "gather",
  "reduce-scatter": "scatter",
  "all-reduce": "reduce",
  "all-to-all": "exchange",
  "collective-permute": "permute",
}
_MB = 1e6


def bench(quick: bool = False) -> list[timing.Table]:
  """Compiles a step a preset, then attention for lengths and numbers of chips.

  Args:
    quick: a tiny model and one preset, to see that it works.

  Raises:
    InputError: libtpu is not installed.
  """
  size = _Size(*((2, 256, 256, 8) if quick else (8, 1024, 2048, 16)))
  rows = [_step(size, *lane) for lane in (_QUICK if quick else LANES)]
  steps = timing.Table(
    title=f"one training step on {TOPOLOGY}, bfloat16, AdamW",
    rows=rows,
    notes=[
      f"{size.num_layers} layers of width {size.width}, batch {size.batch_size} x "
      f"{size.length}, each layer recomputed in the backward pass",
      "MB a chip; compiled for a TPU slice, not run; sent: (n-1)/n of a gathered, "
      "scattered or exchanged array, twice that of one that is reduced",
      "moe: 8 experts, two a token, capacity factor 1.25",
    ],
  )
  lengths = (4096,) if quick else (16384, 32768)
  return [steps, _attention(lengths, (8,) if quick else (1, 4, 8))]


class _Size:
  """Of the model and its batch (counts)."""

  def __init__(self, num_layers: int, width: int, length: int, batch_size: int):
    self.num_layers, self.width = num_layers, width
    self.length, self.batch_size = length, batch_size


def _step(size: _Size, preset: str, shape: dict[str, int], mlp: str) -> dict[str, Any]:
  heads = {"num_heads": 8, "num_kv_heads": 8, "head_dim": size.width // 8}
  hidden = {"hidden_dim": 4 * size.width}
  moe = {"num_experts": 8, "dispatch": "capacity", "hidden_dim": 2 * size.width}
  model = decoder.Decoder(
    model_config.DecoderConfig(
      vocab_size=32 * size.width,
      embed_dim=size.width,
      num_layers=size.num_layers,
      max_len=size.length,
      remat="full",
      mlp=mlp,
      mixer_options={"attention": heads},
      mlp_options={mlp: moe if mlp == "moe" else hidden},
    )
  )
  config = train_config.TrainConfig(
    num_steps=10,
    optimizer=optim_config.OptimizerConfig(name="adamw", learning_rate=1e-3),
    precision=precision.PrecisionConfig(compute="bfloat16"),
  )
  spread = topology.spread(TOPOLOGY, mesh_lib.MeshConfig(preset=preset, shape=shape))
  steps = lowering.Steps(
    training=lowering.of_model(model),
    config=config,
    batch_size=size.batch_size,
    length=size.length,
  )
  compiled = topology.compiled(steps.lower(spread), countable=True)
  held, sent = compiled.memory_analysis(), collectives.find(compiled.as_text())
  by_kind = collectives.totals(sent)
  used = {axis: n for axis, n in spread.mesh.shape.items() if n > 1}
  return {
    "preset": preset,
    "mesh": " ".join(f"{axis} {n}" for axis, n in used.items()),
    "mlp": mlp,
    "state_mb": held.argument_size_in_bytes / _MB,
    "temp_mb": held.temp_size_in_bytes / _MB,
    "sent_mb": sum(one.wire_bytes for one in sent) / _MB,
    **{
      f"{name}_mb": by_kind.get(kind, {"wire_bytes": 0.0})["wire_bytes"] / _MB
      for kind, name in _KINDS.items()
    },
  }


def _attention(lengths: tuple[int, ...], ways: tuple[int, ...]) -> timing.Table:
  rows = []
  for length in lengths:
    for num_chips in ways:
      for preset in ("ring", "ulysses") if num_chips > 1 else ("dp",):
        rows.append(_attention_alone(length, num_chips, preset))
  return timing.Table(
    title=f"attention and its gradients, causal, on chips of {TOPOLOGY}",
    rows=rows,
    notes=[
      "batch 1, 8 heads of 128, bfloat16; temp: MB a chip, compiled, not run",
      "what fits into the memory of the cores (VMEM) is not counted",
    ],
  )


def _attention_alone(length: int, num_chips: int, preset: str) -> dict[str, Any]:
  config = mesh_lib.MeshConfig(preset=preset, num_devices=num_chips)
  spread = topology.spread(TOPOLOGY, config)
  temp = _attention_temp(spread, length)
  return {
    "tokens": length,
    "chips": num_chips,
    "preset": preset if num_chips > 1 else "whole",
    "tokens_per_chip": length // num_chips,
    "temp_mb": temp / _MB,
  }


def _attention_temp(spread: spread_lib.Spread, length: int) -> int:
  """Bytes that the compiled gradients of attention need on a chip."""
  heads = spread.abstract((1, length, 8, 128), jnp.bfloat16)

  def loss(q_BLHK, k_BLHK, v_BLHK):
    with spread.active():
      y_BLHK = attention_ops.attention(q_BLHK, k_BLHK, v_BLHK)
    return jnp.sum(y_BLHK.astype(jnp.float32))

  grad = jax.jit(jax.grad(loss, argnums=(0, 1, 2)), out_shardings=(heads.sharding,) * 3)
  compiled = topology.compiled(grad.lower(heads, heads, heads))
  return compiled.memory_analysis().temp_size_in_bytes


TECHNIQUE = bench
