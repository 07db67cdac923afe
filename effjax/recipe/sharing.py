"""What devices and processes must be able to share, checked before anything starts."""

import pathlib

import jax

from effjax.core import config as core_config
from effjax.core import errors
from effjax.parallel import hosts, own, sharding
from effjax.recipe import config as config_lib
from effjax.recipe import folder
from effjax.recipe import plan as plan_lib

# Stages that work on parts of parameters, or put them together.
_IN_PARTS = (
  config_lib.TRAIN,
  config_lib.IMPORT,
  config_lib.EXPORT,
  config_lib.REWIND,
)


def check(plan: plan_lib.Plan) -> None:
  """Checks that all processes have a device, rows to read, and the same config.

  That batches divide among devices is checked with the plan.

  Raises:
    InputError: a process has no device or an uneven share of a batch, or processes were
      started with different configs.
  """
  plan.spread.share()
  if not hosts.several():
    return
  present = {device.process_index for device in plan.spread.mesh.devices.flat}
  idle = sorted(set(range(jax.process_count())) - present)
  core_config.require(
    not idle,
    f"mesh.num_devices={plan.spread.mesh.size} leaves process "
    f"{', '.join(map(str, idle))} without a device; use them all, or start fewer "
    "processes",
  )
  mine = core_config.to_dict(plan.config)
  theirs = hosts.told("say its config", lambda: mine)
  found = core_config.differences(theirs, mine)
  core_config.require(
    not found,
    f"process {jax.process_index()} has another config than process 0: "
    f"{'; '.join(found[:3])}; start all of them with the same command and files",
  )
  hosts.meet("all processes to agree on the config")


def check_transforms(plan: plan_lib.Plan, root: pathlib.Path, last: int) -> None:
  """Checks that no transform meets parameters that are split over processes.

  Args:
    plan: what is to be done.
    root: the run folder; what is finished there does not matter.
    last: number of the last stage to run.

  Raises:
    InputError: one does; the message says how to go on.
  """
  if not hosts.several():
    return
  names = [stage.name for stage in plan.config.stages]
  is_done = lambda i: folder.stage_folder(root, i, names[i]).exists()
  done = hosts.told("look for stages", lambda: [*filter(is_done, range(len(names)))])
  for i, stage in enumerate(plan.config.stages[: last + 1]):
    if stage.technique in _IN_PARTS or i in done:
      continue
    parent = plan.config.parent(i)
    before = plan.fresh if parent is None else plan.outcomes[parent].params
    specs = plan.specs if parent is None else plan.outcomes[parent].specs
    after = plan.outcomes[i]
    shardings = (
      plan.shardings(before, specs),
      plan.shardings(after.params, after.specs),
    )
    if not own.is_split_over_processes(plan.spread, shardings):
      continue
    first = f"run up to stage {names[i - 1]!r} with --until={names[i - 1]}, then " * (
      i > 0
    )
    raise errors.InputError(
      f"config.stages[{i}] ({stage.name}): {stage.technique!r} needs whole parameters "
      f"in each process, and preset {plan.config.mesh.preset!r} splits them over the "
      f"{jax.process_count()} processes: {first}run the same command in one process "
      "(--dist=off), which goes on in the same folder; or choose a preset that splits "
      "nothing over processes, such as 'dp'"
    )


def describe(plan: plan_lib.Plan) -> str:
  """The mesh, and who reads what, in one line."""
  mesh = " ".join(f"{axis}={n}" for axis, n in plan.spread.mesh.shape.items() if n > 1)
  _, num_shares = plan.spread.share()
  return (
    f"mesh {mesh or 'of one device'} ({plan.config.mesh.preset}); {num_shares} "
    f"different shares of a batch are read by {jax.process_count()} processes"
  )


def notes(plan: plan_lib.Plan) -> list[str]:
  """What of the model is whole on devices that split the rest of it, in words."""
  spread, shardings = plan.spread, plan.shardings(plan.fresh)
  paths = sharding.replicated_keys(spread.mesh, plan.specs, shardings)
  if not paths:
    return []
  more = f" and {len(paths) - 1} more" if len(paths) > 1 else ""
  return [
    f"key heads are whole on each of the {spread.mesh.shape['tensor']} devices along "
    f"'tensor', which do not divide them: {paths[0]}{more}"
  ]
