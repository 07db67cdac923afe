"""What the loop costs beyond the compiled step."""

import itertools
import time
from collections.abc import Callable

import jax

from effjax.train import config as train_config
from effjax.train import loop as loop_lib
from effjax.train import state as state_lib
from effjax.train import step as step_lib


def measure(
  step: step_lib.Step,
  make_state: Callable[[], state_lib.TrainState],
  batch: step_lib.Batch,
  config: train_config.TrainConfig,
  repeats: int = 5,
) -> dict[str, float]:
  """Times the bare compiled step against the same steps in the loop, interleaved.

  The loop runs as in a training: it moves batches to the device, fetches metrics every
  step and logs at `config.log_every`, with no folder to write to.

  Args:
    step: the compiled step.
    make_state: gives a fresh state, since each run donates its own.
    batch: one batch of host arrays, used for every step.
    config: `num_steps` and `log_every` are used.
    repeats: runs of each kind; the fastest counts, since noise only adds.

  Returns:
    `raw_secs` and `loop_secs` a step, and `overhead`, the loop's share beyond the raw
    step (0.01 is 1 %).
  """
  placed = step.put(batch)
  jax.block_until_ready(step(make_state(), placed))
  raw, looped = [], []
  for _ in range(repeats):
    state = jax.block_until_ready(make_state())
    start = time.perf_counter()
    for _ in range(config.num_steps):
      state, metrics = step(state, placed)
    jax.block_until_ready((state, metrics))
    raw.append(time.perf_counter() - start)
    loop = loop_lib.Loop(
      step, jax.block_until_ready(make_state()), itertools.repeat(batch), config
    )
    start = time.perf_counter()
    jax.block_until_ready(loop.run())
    looped.append(time.perf_counter() - start)
  best_raw, best_loop = min(raw), min(looped)
  return {
    "raw_secs": best_raw / config.num_steps,
    "loop_secs": best_loop / config.num_steps,
    "overhead": best_loop / best_raw - 1,
  }
