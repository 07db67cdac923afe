"""The stage "import": a model that was trained elsewhere."""

import jax

from effjax.recipe import session as session_lib


def run(session: session_lib.Session, index: int) -> session_lib.Made:
  """Reads the weights of the source, each onto the devices it belongs to.

  Raises:
    InputError: the source is gone, damaged, or another model than it was.
  """
  config = session.config
  found = config.source
  options = config.stages[index].build_options()
  watch = session_lib.Stopwatch()
  params = found.load(options.kept_dtype, session.plan.spread)
  params = jax.block_until_ready(params)
  return session_lib.Made(
    model=found.model, params=params, specs=found.specs, secs=watch.read()
  )
