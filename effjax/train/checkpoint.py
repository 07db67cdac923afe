"""Checkpoints of a training under way: state, position in the data, and notes.

Arrays are stored under the names of their places in the state, and are only ever read
into a target built from a live state, onto its shardings: a checkpoint can be restored
on another number of devices or of processes. Writing is asynchronous, after a copy to
the host; with several processes each writes what it holds, and process 0 all the rest.
The position in the data is one number, the same for any number of processes.
"""

import contextlib
import errno
import functools
import json
import logging
import os
import pathlib
import shutil
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import grain
import jax
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from effjax.core import config as config_lib
from effjax.core import errors
from effjax.parallel import hosts
from effjax.train import inventory
from effjax.train import state as state_lib

# What reading a damaged checkpoint raises: files that are gone, text that is no JSON,
# missing keys, and (as ValueError) tensorstore's own complaints.
DAMAGED = (FileNotFoundError, ValueError, KeyError, TypeError)
# Inventory of the files of a checkpoint, committed with it.
FILES = "files.json"


def quiet_orbax() -> None:
  """Keeps Orbax from logging: what matters it raises too, and we say it in one line."""
  logging.getLogger("absl").addFilter(_is_not_orbax)


def _is_not_orbax(record: logging.LogRecord) -> bool:
  return f"{os.sep}orbax{os.sep}" not in record.pathname


class _Manager(ocp.CheckpointManager):
  """Orbax's, which does not ask JAX's preemption service where to stop.

  It would count by steps; the places to stop are counted in train.signals.
  """

  def reached_preemption(self, step: int) -> bool:
    del step
    return False


class Checkpoints:
  """The checkpoints of one stage, newest first."""

  def __init__(self, directory: pathlib.Path, keep: int, notice: Callable[[str], None]):
    """Opens a folder of checkpoints, making it if needed.

    Args:
      directory: where they are.
      keep: how many are kept.
      notice: told, in one line, what a person should know.
    """
    quiet_orbax()
    self._directory = directory.absolute()
    self._notice = notice
    self._manager = _Manager(
      self._directory,
      options=ocp.CheckpointManagerOptions(
        preservation_policy=checkpoint_managers.LatestN(n=keep),
        enable_async_checkpointing=True,
        async_options=ocp.AsyncOptions(
          timeout_secs=round(hosts.timeout_secs()),
          post_finalization_callback=self._take_inventory,
        ),
      ),
    )

  def save(
    self,
    state: state_lib.TrainState,
    batches: Any,
    notes: Mapping[str, Any],
    config: Mapping[str, Any],
  ) -> None:
    """Starts to write a checkpoint; it counts from the moment it is whole.

    Args:
      state: the state, which may be donated as soon as this returns.
      batches: grain iterator, at the batch after this state.
      notes: plain values to hand back at restore.
      config: the resolved config of the stage, as plain values.

    Raises:
      OSError: the disk is full (ENOSPC), now or for the checkpoint before.
    """
    arrays = state_lib.describe(state)
    if hosts.first():
      require_space(self._directory, arrays)
    meta = {
      "notes": dict(notes),
      "config": config,
      "arrays": {name: _summary(array) for name, array in arrays.items()},
      "position": None if batches is None else batches.get_state(),
    }
    items = {"state": ocp.args.StandardSave(arrays), "meta": ocp.args.JsonSave(meta)}
    with disk_full_named(self._directory):
      self._manager.save(int(state.step), args=ocp.args.Composite(**items))

  def restore(
    self, like: state_lib.TrainState, batches: Any, config: Mapping[str, Any]
  ) -> tuple[state_lib.TrainState, dict[str, Any]] | None:
    """The newest checkpoint that can be read, or None.

    One that is damaged is set aside and said so, and the one before it is taken.

    Args:
      like: a state of the same structure, whose shapes, dtypes and shardings to use.
      batches: grain iterator, set to the position of the checkpoint.
      config: the config this start has; another one cannot continue.

    Returns:
      State and notes.

    Raises:
      InputError: a checkpoint is whole but belongs to another config or model.
    """
    start = None if batches is None else batches.get_state()
    # What process 0 sees counts: a shared file system shows others a change later.
    newest_first = lambda: sorted(self._manager.all_steps(), reverse=True)
    for step in hosts.told("list the checkpoints", newest_first):
      check = functools.partial(self._damage, step)
      damage = hosts.told(f"check the checkpoint of step {step}", check)
      if damage is not None:
        self._set_aside(step, damage)
        continue
      meta = self._meta(step)
      self._check_same(step, meta["config"], config, meta["arrays"], like)
      try:
        return self._read(step, meta, like, batches), meta["notes"]
      except DAMAGED as error:
        if hosts.several():  # The others may have read what they need of it.
          raise errors.InputError(
            f"process {jax.process_index()} cannot read the checkpoint of step {step} "
            f"in {self._directory} ({_reason(error)}); move it away, then the same "
            "command resumes from the one before"
          ) from error
        self._set_aside(step, _reason(error))
    if start is not None:
      batches.set_state(start)
    return None

  def wait(self) -> None:
    """Returns when everything is on disk.

    Raises:
      OSError: the disk is full (ENOSPC).
    """
    with disk_full_named(self._directory):
      self._manager.wait_until_finished()

  def close(self) -> None:
    """Waits and releases the writer's threads."""
    with disk_full_named(self._directory):
      self._manager.close()

  def _read(
    self, step: int, meta: Mapping[str, Any], like: state_lib.TrainState, batches: Any
  ) -> state_lib.TrainState:
    target = {
      name: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding)
      for name, a in state_lib.describe(like).items()
    }
    items = {"state": ocp.args.StandardRestore(target)}
    if batches is not None and "position" not in meta:
      # Written before the position stood in `meta`: grain has a file of its own.
      items["data"] = grain.checkpoint.CheckpointRestore(batches)
    elif batches is not None:
      batches.set_state(meta["position"])
    arrays = self._manager.restore(step, args=ocp.args.Composite(**items))["state"]
    leaves = [arrays[name] for name in target]
    return jax.tree.unflatten(jax.tree.structure(like), leaves)

  def _meta(self, step: int) -> dict[str, Any]:
    """The JSON of a checkpoint, where Orbax's handler keeps it."""
    path = self._directory / str(step) / "meta" / "metadata"
    return json.loads(path.read_text(encoding="utf-8"))

  def _take_inventory(self) -> None:
    """Called when a checkpoint is complete, just before the rename that commits it."""
    if jax.process_index() != 0:
      return
    for folder in self._directory.iterdir():
      step = folder.name.partition(".")[0]
      if not step.isdigit() or (folder / FILES).exists():
        continue
      # Orbax still writes to the files beside the items.
      items = [item for item in sorted(folder.iterdir()) if item.is_dir()]
      found = {item.name: inventory.take(item) for item in items}
      partial = folder / f"{FILES}.partial"
      partial.write_text(json.dumps(found), encoding="utf-8")
      os.replace(partial, folder / FILES)

  def _damage(self, step: int) -> str | None:
    """What is wrong with the files of a checkpoint, or None."""
    folder = self._directory / str(step)
    try:
      found = json.loads((folder / FILES).read_text(encoding="utf-8"))
      for item, files in found.items():
        inventory.check(folder / item, files)
      missing = {"notes", "config", "arrays"} - self._meta(step).keys()
      if missing:
        raise KeyError(*missing)
    except DAMAGED as error:
      return _reason(error)
    return None

  def _check_same(self, step, old_config, config, arrays, like) -> None:
    changed = config_lib.differences(old_config, config)
    if changed:
      raise errors.InputError(
        f"the checkpoint of step {step} in {self._directory} was written with another "
        f"config ({'; '.join(changed[:3])}); use that one, or another folder"
      )
    wanted = {name: _summary(a) for name, a in state_lib.describe(like).items()}
    for name in sorted(wanted.keys() | arrays.keys()):
      if wanted.get(name) != arrays.get(name):
        raise errors.InputError(
          f"the checkpoint of step {step} in {self._directory} does not fit the model: "
          f"{name} is {arrays.get(name)}, needed is {wanted.get(name)}"
        )

  def _set_aside(self, step: int, reason: str) -> None:
    """Renames a damaged checkpoint, so that nothing is lost and the step is free."""
    target = hosts.told("set a checkpoint aside", lambda: self._rename(step))
    self._manager.reload()
    self._notice(
      f"checkpoint of step {step} is damaged ({reason}); moved to {target}, falling "
      "back to the one before"
    )

  def _rename(self, step: int) -> str:
    source = self._directory / str(step)
    target = self._directory / f"damaged-{step}"
    number = 0
    while target.exists():
      number += 1
      target = self._directory / f"damaged-{step}-{number}"
    if source.exists():
      os.rename(source, target)
    return str(target)


def require_space(path: pathlib.Path, arrays: Mapping[str, Any]) -> None:
  """Fails before anything is written where the arrays cannot fit, compression aside.

  Raises:
    OSError: ENOSPC.
  """
  needed = sum(array.nbytes for array in arrays.values())
  free = shutil.disk_usage(path).free
  if free < needed:
    reason = f"{os.strerror(errno.ENOSPC)} ({needed} bytes are needed, {free} are free)"
    raise OSError(errno.ENOSPC, reason, str(path))


@contextlib.contextmanager
def disk_full_named(path: pathlib.Path) -> Iterator[None]:
  """Turns every way a full disk shows itself into one OSError that names the path.

  Raises:
    OSError: ENOSPC.
  """
  try:
    yield
  except (OSError, ValueError, RuntimeError) as error:
    full = getattr(error, "errno", None) == errno.ENOSPC
    if not full and os.strerror(errno.ENOSPC) not in str(error):
      raise
    message = os.strerror(errno.ENOSPC)
    raise OSError(errno.ENOSPC, message, str(path)) from error


def _reason(error: BaseException) -> str:
  return f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"


def _summary(array: Any) -> list[Any]:
  return [list(array.shape), str(array.dtype)]
