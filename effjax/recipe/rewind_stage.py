"""The stage "rewind": see effjax.recipe.rewinding."""

import jax

from effjax.recipe import rewinding
from effjax.recipe import session as session_lib
from effjax.train import stages


def run(session: session_lib.Session, index: int) -> session_lib.Made:
  """Weights of another stage under the masks of the parent of stage `index`.

  Raises:
    InputError: the two do not have the same parameters.
  """
  watch = session_lib.Stopwatch()
  options = session.config.stages[index].build_options()
  model, params, specs = session.start(index)
  if options.to == rewinding.INIT:
    seed = session.config.seed if options.seed is None else options.seed
    values = session.fresh_params(seed)
  else:
    number = [stage.name for stage in session.config.stages].index(options.to)
    folder = session.folder(number)
    values = stages.load_stage(folder, session.plan.spread).params
  made = rewinding.rewound(params, values)
  made = jax.device_put(made, session.plan.shardings(made, specs))
  return session_lib.Made(
    model=model, params=jax.block_until_ready(made), specs=specs, secs=watch.read()
  )
