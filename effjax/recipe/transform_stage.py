"""A stage that transforms a tree: quantizes it, prunes it, ..."""

import itertools
from collections.abc import Mapping
from typing import Any

import jax

from effjax.compress import calibrate
from effjax.compress import registry as transforms
from effjax.core import select
from effjax.core import technique as technique_lib
from effjax.recipe import session as session_lib

# Text that transforms with statistics are calibrated on.
_CALIBRATION_BATCHES = 16


def run(session: session_lib.Session, index: int) -> session_lib.Made:
  """Applies the transform of stage `index` to what its parent made."""
  stage = session.config.stages[index]
  technique = transforms.find(stage.technique)
  model, params, specs = session.start(index)
  watch = session_lib.Stopwatch()
  stats = None
  where = stage.build_where()
  if technique.needs_stats:
    stats = _statistics(session, model, params, technique, where)
  made = technique(params, specs, stats, where=where, options=stage.build_options())
  made = jax.block_until_ready(jax.device_put(made, session.plan.shardings(made)))
  return session_lib.Made(model=model, params=made, specs=specs, secs=watch.read())


def _statistics(
  session: session_lib.Session,
  model: Any,
  params: Mapping[str, Any],
  technique: technique_lib.Transform,
  where: select.Where,
) -> dict[str, Any]:
  """Statistics of the inputs of the selected weights, over training batches."""
  batches = session.data.train_iterator()
  try:
    chosen = itertools.islice(batches, _CALIBRATION_BATCHES)
    return calibrate.calibrate(
      model, params, chosen, collect=technique.collect, where=where
    )
  finally:
    batches.close()
