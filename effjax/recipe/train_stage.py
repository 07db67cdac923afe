"""The stage "train": a first training, or a fine-tuning of what an earlier stage made.

Pruned weights stay pruned: the loop trains them as plain arrays with exact zeros and
hands on masked leaves again. Of a model with adapters those alone train, unless `where`
says otherwise (train.adapters). A teacher is read from the folder of its stage, and is
neither changed nor handed on. The model keeps the precision it was trained with: it is
scored and timed in it, by later stages too.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax

from effjax.measure import flops, quality
from effjax.parallel import hosts
from effjax.recipe import profiling
from effjax.recipe import session as session_lib
from effjax.train import config as train_config
from effjax.train import device, loop, signals, stages
from effjax.train.losses import base

# A training step costs a forward pass and, for gradients, about two more.
_PASSES = 3


def run(session: session_lib.Session, index: int) -> session_lib.Made:
  """Trains stage `index` to its end, resuming at its last checkpoint.

  Raises:
    DivergedError, StoppedError: see train.loop.train.
  """
  config = session.config
  stage = config.stages[index]
  options: train_config.TrainConfig = stage.build_options()
  model, params, specs = session.start(index)
  model = model.clone(precision=options.precision)
  data_changes = {
    name: value
    for name in ("batch_size", "sequence_length")
    if (value := getattr(options, name)) is not None
  }
  data = dataclasses.replace(
    session.data, config=dataclasses.replace(config.data, **data_changes)
  )
  # Each training reads the documents in an order of its own.
  batches = data.train_iterator(config.data.seed + index)
  if session.profile and hosts.first():
    batches = profiling.Profiled(batches, session.root / "profile" / stage.name)
  key = jax.random.key(config.seed + options.seed_offset)
  teacher = _teacher(session, index)
  trained = loop.train(
    model,
    params,
    specs,
    batches,
    options,
    spread=session.plan.spread,
    key=jax.random.fold_in(key, index + 1),
    where=stage.build_where(),
    evaluate=_evaluator(session, model, options),
    workdir=session.root,
    stage=stage.name,
    flops_per_token=_flops_per_token(
      model, params, teacher, data.config.sequence_length
    ),
    teacher=teacher,
  )
  batches.close()
  return session_lib.Made(
    model=model, params=trained.params, specs=specs, secs=trained.wall_secs
  )


def _teacher(session: session_lib.Session, index: int) -> base.Teacher | None:
  """What stage `index` learns from, each array where it belongs on the mesh."""
  number = session.config.teacher(index)
  if number is None:
    return None
  loaded = stages.load_stage(session.folder(number), session.plan.spread)
  return base.Teacher(loaded.model, loaded.params)


def _flops_per_token(
  model: Any, params: Mapping[str, Any], teacher: base.Teacher | None, length: int
) -> float | None:
  """Of a training step, where the device's peak is known; elsewhere nobody asks."""
  if device.peak_flops(jax.devices()[0].device_kind) is None:
    return None
  executed = _PASSES * flops.per_token(model, params, length).executed
  if teacher is not None:
    executed += flops.per_token(teacher.model, teacher.params, length).executed
  return executed


def _evaluator(
  session: session_lib.Session, model: Any, options: train_config.TrainConfig
) -> loop.Evaluate:
  eval_set = session.eval_set(options.eval_max_bytes)
  batch_size = session.config.measure.eval_batch_size

  def evaluate(params: Mapping[str, Any]) -> dict[str, float]:
    found = quality.evaluate(
      model,
      params,
      eval_set,
      batch_size,
      spread=session.plan.spread,
      pause=signals.check,
    )
    names = ("loss", "accuracy" if "accuracy" in found else "bits_per_byte")
    wanted = {name: found[name] for name in names}
    return {name: math.nan if x is None else x for name, x in wanted.items()}

  return evaluate
