"""The one training loop.

The device is never kept waiting: step n is dispatched before the metrics of step n - 1
are fetched, and only one step is ever ahead. Before anything that must see the latest
numbers (an evaluation, a checkpoint, the end) the step under way is waited for, so that
a state whose numbers are not finite is never saved, and a saved step has its metrics
written. Everything random is a function of the key and the step, so a run that was
killed and resumed equals one that never was.
"""

import contextlib
import dataclasses
import pathlib
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
from flax import linen as nn

from effjax.core import config as config_lib
from effjax.core import errors, partition
from effjax.core import select as select_lib
from effjax.optim import config as optim_config
from effjax.optim import sparse
from effjax.optim import sparsity as sparsity_lib
from effjax.parallel import spread as spread_lib
from effjax.train import adapters, checkpoint, masks, signals, timing, writers
from effjax.train import config as train_config
from effjax.train import console as console_lib
from effjax.train import device as device_lib
from effjax.train import state as state_lib
from effjax.train import step as step_lib
from effjax.train.losses import base

Evaluate = Callable[[dict[str, Any]], Mapping[str, float]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trained:
  """What a training hands back.

  Attributes:
    params: the whole parameter tree, leaf kinds as they came.
    metrics: metrics of the last update; `{}` if this start had nothing left to do.
    evaluation: what the last evaluation returned; `{}` without one.
    tokens: targets trained on, over all starts.
    wall_secs: time spent, over all starts.
    num_compilations: how often this start compiled the step; 1 unless it had nothing
      to do.
  """

  params: dict[str, Any]
  metrics: dict[str, float]
  evaluation: dict[str, float]
  tokens: int
  wall_secs: float
  num_compilations: int


def train(
  model: nn.Module,
  params: Mapping[str, Any],
  specs: Mapping[str, Any],
  batches: Any,
  config: train_config.TrainConfig,
  *,
  spread: spread_lib.Spread,
  key: jax.Array,
  where: Any = None,
  evaluate: Evaluate | None = None,
  workdir: pathlib.Path | None = None,
  stage: str = "train",
  flops_per_token: float | None = None,
  teacher: base.Teacher | None = None,
) -> Trained:
  """Trains to `config.num_steps`, or resumes and finishes.

  Args:
    model: Linen module following the decoder's calling convention.
    params: parameter tree, left as it is.
    specs: tree of ParamSpecs of the same structure.
    batches: grain iterator of dicts of host arrays (see data); its position is saved
      and restored.
    config: options of the stage.
    spread: the devices, and what lies where.
    key: random key of this stage.
    where: which parameters train (see core.select); None for all of them, or for the
      adapters alone where there are any (see train.adapters).
    evaluate: `evaluate(params) -> {name: number}`, called at `config.eval_every`; it
      may be left at any point when a stop is asked for (with several processes where
      it calls signals.check), and is then repeated.
    workdir: the run folder: `metrics.jsonl`, `tb/<stage>`, `checkpoints/<stage>`; None
      writes nothing.
    stage: name in metrics and folders.
    flops_per_token: forward and backward FLOPs a token, for MFU.
    teacher: the model that `config.teacher` names.

  Raises:
    InputError: the selection, the data, a checkpoint or the teacher do not fit.
    DivergedError: a loss, gradient or parameter is not finite; `diverged-<stage>.json`
      says where, and no such state was saved.
    StoppedError: SIGTERM or SIGINT came, and the state was saved.
    OSError: the disk is full (ENOSPC); the checkpoint before is whole.
  """
  config_lib.require(
    (teacher is None) == (config.teacher is None),
    f"teacher={config.teacher!r} of the config, and "
    f"{'no' if teacher is None else 'a'} model passed as the teacher",
  )
  where = select_lib.parse(where, select_lib.Where())
  paths = adapters.trained(params, specs, where)
  plain, kept = masks.take_out(params, paths)
  tx, lr_fn = optim_config.build(
    config.optimizer,
    specs,
    config.num_steps,
    masks=kept,
    sparsifier=_sparsifier(config, params, specs, paths, key),
  )
  state, frozen, shardings = state_lib.place(
    model, plain, specs, paths, tx, key, spread
  )
  step = step_lib.make(
    model,
    config.make_loss(),
    tx,
    lr_fn,
    frozen,
    shardings,
    specs=specs,
    spread=spread,
    micro_batches=config.micro_batches,
    policy=config.precision,
    teacher=teacher,
  )
  loop = Loop(step, state, batches, config, evaluate, workdir, stage, flops_per_token)
  state = loop.run()
  trained = partition.merge(state.params, frozen)
  made_sparse = sparse.find(state.opt_state)
  if made_sparse is not None:
    kept = masks.join(kept, made_sparse.masks, trained)
  return Trained(
    params=masks.put_back(trained, kept, params),
    metrics=loop.metrics,
    evaluation=loop.notes["evaluation"],
    tokens=round(loop.notes["tokens"]),
    wall_secs=loop.chrono.wall_secs,
    num_compilations=step.num_compilations(),
  )


def _sparsifier(
  config: train_config.TrainConfig,
  params: Mapping[str, Any],
  specs: Mapping[str, Any],
  paths: frozenset[str],
  key: jax.Array,
) -> sparsity_lib.Sparsifier | None:
  if config.sparsity is None:
    return None
  return sparsity_lib.Sparsifier(
    config=config.sparsity,
    target=sparsity_lib.choose(config.sparsity, params, specs, paths),
    num_steps=config.num_steps,
    key=key,
  )


class Loop:
  """One training under way; `run` is called once."""

  def __init__(
    self,
    step: step_lib.Step,
    state: state_lib.TrainState,
    batches: Any,
    config: train_config.TrainConfig,
    evaluate: Evaluate | None = None,
    workdir: pathlib.Path | None = None,
    stage: str = "train",
    flops_per_token: float | None = None,
  ):
    self._step, self._state, self._batches = step, state, batches
    self._config, self._evaluate = config, evaluate
    self._workdir, self._stage = workdir, stage
    self._flops_per_token = flops_per_token
    self._plain_config = config_lib.to_dict(config)
    self._pending: tuple[int, dict[str, jax.Array]] | None = None
    self._checkpoints: checkpoint.Checkpoints | None = None
    self._saved = -1
    self._writers: list[Any] = []
    self.metrics: dict[str, float] = {}
    # What outlives a restart beside the state: step evaluated last and what it gave,
    # targets trained on, the stopwatch.
    self.notes: dict[str, Any] = {"evaluated": -1, "evaluation": {}, "tokens": 0.0}
    self.chrono = timing.Chrono(config.num_steps)
    self._console = console_lib.Console(stage, config.num_steps)

  def run(self) -> state_lib.TrainState:
    """Trains to the last step and returns the state; see `train` for errors."""
    try:
      with signals.StopRequest() as stop:
        step = self._start()
        self._pause_at(step, stop)
        while step < self._config.num_steps:
          if stop.at():
            self._stop(step, stop)
          step = self._update(step)
          self._pause_at(step, stop)
        if self._checkpoints is not None:
          self._checkpoints.wait()
      return self._state
    finally:
      self._close()

  def _start(self) -> int:
    """Restores what there is to restore and opens the files; returns the step."""
    config, step = self._config, 0
    if self._workdir is None:
      return step
    self._checkpoints = checkpoint.Checkpoints(
      self._workdir / "checkpoints" / self._stage,
      config.keep_checkpoints,
      self._console.notice,
    )
    restored = self._checkpoints.restore(self._state, self._batches, self._plain_config)
    if restored is not None:
      self._state, notes = restored
      step = self._saved = int(self._state.step)
      self.chrono = timing.Chrono(config.num_steps, step)
      self.chrono.restore(notes.pop("chrono"))
      self.notes = notes
      self._console.notice(f"{self._stage}: resuming at step {step}")
    if jax.process_index() == 0:
      self._writers = [
        writers.JsonlWriter(self._workdir / "metrics.jsonl", self._stage, step),
        writers.TensorBoardWriter(self._workdir / "tb" / self._stage, step),
      ]
    return step

  def _update(self, step: int) -> int:
    """Dispatches update `step + 1`, then fetches the metrics of the one before."""
    try:
      batch = next(self._batches)
    except StopIteration:
      raise errors.InputError(
        f"the training data ended after {step} of {self._config.num_steps} steps; "
        "lower num_steps or repeat the data"
      ) from None
    self._state, metrics = self._step(self._state, self._step.put(batch))
    self._fetch()
    self._pending = (step + 1, metrics)
    return step + 1

  def _fetch(self) -> None:
    """Waits for the update under way and deals with its metrics."""
    if self._pending is None:
      return
    step, on_device = self._pending
    self._pending = None
    metrics = {name: float(x) for name, x in jax.device_get(on_device).items()}
    tokens = metrics.pop("tokens")
    if not metrics.pop("finite"):
      self._diverged(step, metrics)
    self.metrics = metrics
    self.notes["tokens"] += tokens
    self.chrono.tick(step, tokens)
    if self._config.logs_at(step):
      self._log(step)

  def _log(self, step: int) -> None:
    rate = self.chrono.take_rate()
    row = {
      "stage": self._stage,
      "step": step,
      **self.metrics,
      "tokens": self.notes["tokens"],
      "tokens_per_sec": rate,
      "mfu": device_lib.model_flops_utilization(
        rate, self._flops_per_token, self._step.spread.mesh.size
      ),
      "memory_bytes": device_lib.memory_bytes(),
      "wall_secs": self.chrono.wall_secs,
    }
    self._write(row)
    self._console.show(row, self.chrono.eta_secs())

  def _pause_at(self, step: int, stop: signals.StopRequest) -> None:
    """Evaluates and saves, if `step` is a step to do so."""
    config = self._config
    evaluates = (
      self._evaluate is not None
      and config.evaluates_at(step)
      and self.notes["evaluated"] != step
    )
    saves = self._checkpoints is not None and config.saves_at(step)
    if step == config.num_steps or evaluates or saves:
      self._fetch()
    with self.chrono.paused():
      if evaluates:
        self._run_evaluation(step, stop)
      if saves:
        self._save(step)

  def _run_evaluation(self, step: int, stop: signals.StopRequest) -> None:
    start = time.monotonic()
    try:
      with stop.interruptible():
        params = partition.merge(self._state.params, self._step.frozen)
        found = {name: float(x) for name, x in self._evaluate(params).items()}
    except signals.Interrupted:
      self._stop(step, stop)
    self.notes |= {"evaluated": step, "evaluation": found}
    row = {f"eval_{name}": value for name, value in found.items()}
    row = {"stage": self._stage, "step": step, **row}
    self._write(row | {"eval_secs": time.monotonic() - start})
    shown = " | ".join(f"{name} {value:.4f}" for name, value in found.items())
    self._console.notice(f"step {step}/{self._config.num_steps} evaluation | {shown}")

  def _save(self, step: int) -> None:
    if step == self._saved:
      return
    for writer in self._writers:
      writer.sync()
    notes = self.notes | {"chrono": self.chrono.state()}
    self._checkpoints.save(self._state, self._batches, notes, self._plain_config)
    self._saved = step

  def _stop(self, step: int, stop: signals.StopRequest) -> None:
    self._fetch()
    name = stop.requested.name
    if self._checkpoints is None:
      raise errors.StoppedError(f"stopped by {name} at step {step}; nothing to save to")
    self._save(step)
    self._checkpoints.wait()
    raise errors.StoppedError(
      f"stopped by {name}; {self._stage} is saved at step {step} of "
      f"{self._config.num_steps}: the same command resumes"
    )

  def _diverged(self, step: int, metrics: dict[str, float]) -> None:
    bad = ", ".join(f"{k} {v}" for k, v in metrics.items() if v - v != 0)
    message = f"{self._stage} diverged at step {step} ({bad})"
    if self._workdir is not None and jax.process_index() == 0:
      path = self._workdir / f"diverged-{self._stage}.json"
      report = {
        "stage": self._stage,
        "step": step,
        "metrics": metrics,
        "metrics_before": self.metrics,
        "last_checkpoint": self._saved if self._saved >= 0 else None,
      }
      writers.write_report(path, report)
      message += f"; see {path}"
    raise errors.DivergedError(
      f"{message}; lower the learning rate, lengthen its warm-up or clip gradients"
    )

  def _write(self, row: Mapping[str, Any]) -> None:
    for writer in self._writers:
      writer.write(row)

  def _close(self) -> None:
    with contextlib.ExitStack() as stack:
      for part in (self._checkpoints, *self._writers, self._console):
        if part is not None:
          stack.callback(part.close)
