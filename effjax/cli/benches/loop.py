"""The training loop's cost outside the compiled step: fetching, feeding, logging.

The same compiled step runs bare and in the loop, in turns; the fastest of each counts,
since noise only adds. The goal is an overhead under 2 %.
"""

import jax
import numpy as np

from effjax.cli import timing
from effjax.core import select
from effjax.core import specs as specs_lib
from effjax.models import config as model_config
from effjax.models import decoder
from effjax.optim import config as optim_config
from effjax.parallel import spread as spread_lib
from effjax.train import config as train_config
from effjax.train import overhead
from effjax.train import state as state_lib
from effjax.train import step as step_lib

_VOCAB = 2048


def bench(quick: bool = False) -> timing.Table:
  """Times steps of a small decoder, bare and in the loop.

  Args:
    quick: a tiny model and few steps, to see that it works; the numbers mean nothing.
  """
  embed_dim, num_layers, length, batch_size = (
    (32, 1, 32, 4) if quick else (128, 4, 256, 8)
  )
  num_steps, repeats = (4, 1) if quick else (10, 3)
  config = train_config.TrainConfig(num_steps=num_steps)
  model = decoder.Decoder(
    model_config.DecoderConfig(
      vocab_size=_VOCAB,
      embed_dim=embed_dim,
      num_layers=num_layers,
      pattern=("mamba2", "attention"),
      mixer_options={"mamba2": {"state_dim": 32, "chunk": 32}},
      max_len=length,
    )
  )
  make_state, step = _prepare(model, config)
  rows = np.random.default_rng(0).integers(0, _VOCAB, (batch_size, length + 1))
  batch = {
    "inputs": rows[:, :-1].astype(np.int32),
    "targets": rows[:, 1:].astype(np.int32),
    "weights": np.ones((batch_size, length), np.float32),
    "segments": np.ones((batch_size, length), np.int32),
    "positions": np.tile(np.arange(length, dtype=np.int32), (batch_size, 1)),
  }
  found = overhead.measure(step, make_state, batch, config, repeats)
  return timing.Table(
    title="one training step, bare and in the loop",
    rows=[
      {
        "step_ms": 1e3 * found["raw_secs"],
        "in_loop_ms": 1e3 * found["loop_secs"],
        "overhead_percent": 100 * found["overhead"],
      }
    ],
    notes=[
      f"{num_layers} layers of width {embed_dim}, batch {batch_size} x {length}",
      f"best of {repeats} runs of {num_steps} steps each, taking turns",
      f"device: {jax.devices()[0].device_kind}",
    ],
  )


def _prepare(model, config):
  """A function that makes fresh states, and the step."""
  spread = spread_lib.over("dp", num_devices=1)
  specs = specs_lib.specs(model)
  params = jax.jit(model.init)(jax.random.key(0), *model.example_inputs())["params"]
  paths = select.select(specs, select.Where())
  tx, lr_fn = optim_config.build(config.optimizer, specs, config.num_steps)

  def place():
    key = jax.random.key(1)
    return state_lib.place(model, params, specs, paths, tx, key, spread)

  _, frozen, shardings = place()
  step = step_lib.make(
    model,
    config.make_loss(),
    tx,
    lr_fn,
    frozen,
    shardings,
    specs=specs,
    spread=spread,
  )
  return (lambda: place()[0]), step


TECHNIQUE = bench
