"""The stage "export": what an earlier stage made, in a format that others read.

The model is handed on as it is. What is written stands in `exports/` of the run folder
under the stage's name, and its size is the stage's bytes on disk.
"""

import pathlib
import shutil

import jax

from effjax.interop import exports
from effjax.parallel import hosts
from effjax.recipe import session as session_lib

FOLDER = "exports"


def run(session: session_lib.Session, index: int) -> session_lib.Made:
  """Writes the export of stage `index`, anew if a stopped run had written it.

  Raises:
    InputError: the format cannot express the model.
  """
  stage = session.config.stages[index]
  options = stage.build_options()
  model, params, specs = session.start(index)
  watch = session_lib.Stopwatch()
  path = session.root / FOLDER / (stage.name + exports.SUFFIXES[options.format])
  # Of several processes one writes, and needs what the others hold.
  known = jax.tree.map(hosts.whole, params) if hosts.several() else params

  def write() -> int:
    path.parent.mkdir(exist_ok=True)
    _remove(path)
    kind, notes = exports.write(
      options, path, model, known, specs, session.data.tokenizer
    )
    for note in notes:
      session_lib.say(f"note: {note}")
    session_lib.say(f"{path}: {options.format}, {kind}")
    return _size(path)

  return session_lib.Made(
    model=model,
    params=params,
    specs=specs,
    bytes_on_disk=hosts.told(f"write {path.name}", write),
    secs=watch.read(),
  )


def _parts(path: pathlib.Path) -> list[pathlib.Path]:
  """The files of an export: one, one with its data beside it, or a folder's."""
  if path.is_dir():
    return [part for part in path.rglob("*") if part.is_file()]
  return [part for part in (path, path.with_name(path.name + ".data")) if part.exists()]


def _size(path: pathlib.Path) -> int:
  return sum(part.stat().st_size for part in _parts(path))


def _remove(path: pathlib.Path) -> None:
  if path.is_dir():
    shutil.rmtree(path)
  else:
    for part in _parts(path):
      part.unlink()
