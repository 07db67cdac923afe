"""The folder where fetched and derived data stay between runs.

Everything in it can be made again: it may be deleted at any time no run is active.
"""

import contextlib
import fcntl
import pathlib
import shutil
import tempfile
from collections.abc import Iterator

from effjax.core import cache

folder = cache.folder


@contextlib.contextmanager
def locked(target: pathlib.Path) -> Iterator[None]:
  """Lets one process at a time make `target`; the others wait, then find it made.

  The operating system drops the lock when its holder dies, however it dies.
  """
  target.parent.mkdir(parents=True, exist_ok=True)
  with open(target.parent / f".{target.name}.lock", "w") as lock:
    fcntl.flock(lock, fcntl.LOCK_EX)
    yield


@contextlib.contextmanager
def replacing(target: pathlib.Path) -> Iterator[pathlib.Path]:
  """A new folder that takes the name `target` only if the block ends without error."""
  target.parent.mkdir(parents=True, exist_ok=True)
  made = pathlib.Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
  try:
    yield made
    if target.exists():
      shutil.rmtree(target)
    made.rename(target)
  finally:
    shutil.rmtree(made, ignore_errors=True)
