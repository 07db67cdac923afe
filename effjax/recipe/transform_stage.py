"""A stage that transforms a model: quantizes it, prunes it, ...

With several processes each does the same by itself, on its own devices: what transforms
look at is not split between processes (see plan).
"""

import dataclasses
import itertools

import jax

from effjax.compress import api as compress
from effjax.compress import registry as transforms
from effjax.parallel import hosts, own
from effjax.recipe import session as session_lib


def run(session: session_lib.Session, index: int) -> session_lib.Made:
  """Applies the transform of stage `index` to what its parent made."""
  stage = session.config.stages[index]
  change, options = transforms.find(stage.technique), stage.build_options()
  spread = session.plan.spread
  if hosts.several():
    spread = own.spread_of_process(spread)
  model, params, specs = session.start(index, spread)
  watch = session_lib.Stopwatch()
  batches = ()
  if change.equivalent or compress.needs_batches(change, options):
    batches = _batches(session, stage.calibration)
  changed, made = compress.transform(
    change,
    model,
    params,
    specs,
    batches,
    where=stage.build_where(),
    options=options,
    order=stage.calibration.order,
  )
  specs = compress.specs_of(model, changed, specs)
  shardings = session.plan.shardings(made, specs)
  put = own.give_to_all if hosts.several() else jax.device_put
  made = jax.block_until_ready(put(made, shardings))
  return session_lib.Made(model=changed, params=made, specs=specs, secs=watch.read())


def _batches(
  session: session_lib.Session, config: compress.CalibrationConfig
) -> tuple[dict, ...]:
  """Batches of the training text, which is never the text that is scored.

  They are whole batches, of any process.
  """
  sizes = session.config.data
  number = -(-config.num_tokens // (sizes.batch_size * sizes.sequence_length))
  data = dataclasses.replace(session.data, process_index=0, process_count=1)
  batches = data.train_iterator(sizes.seed + config.seed)
  try:
    return tuple(itertools.islice(batches, number))
  finally:
    batches.close()
