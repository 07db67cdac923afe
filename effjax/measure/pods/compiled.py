"""Programs compiled for a slice, kept on disk: a program is compiled once."""

import dataclasses
import gzip
import hashlib
import json
import os
import pathlib
import re
import tempfile
import time
from importlib import metadata
from typing import Any

import jax

from effjax.core import cache
from effjax.parallel import topology

_NEEDED = re.compile(r"\(([\d.]+)([KMGT]?)\) exceeds available HBM")
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compiled:
  """What the TPU compiler makes of a program, or says of one that is too large.

  Attributes:
    text: the program; empty if it needs more memory than there is.
    peak_bytes: memory at its fullest, arguments included (None: see `needed_bytes`).
    argument_bytes: of what the program is given.
    temp_bytes: of what it makes besides its results.
    needed_bytes: of temporaries, where they alone do not fit; else None.
    compile_secs: how long the compiler took, when it ran.
  """

  text: str
  peak_bytes: int | None
  argument_bytes: int
  temp_bytes: int
  needed_bytes: int | None
  compile_secs: float


def forget_locations() -> None:
  """Leaves out of programs, from here on, where in the code they were written.

  Kernels carry it along, so that one program would be compiled again for each place
  that it is asked for from.
  """
  jax.config.update("jax_traceback_in_locations_limit", 0)


def compiled(lowered: jax.stages.Lowered, topology_name: str) -> Compiled:
  """Compiles a program so that its collectives can be counted, or finds it compiled.

  Args:
    lowered: for the chips of a topology.
    topology_name: of that topology, which the program itself does not tell.

  Raises:
    JaxRuntimeError: the compiler fails for another reason than memory.
  """
  path = cache.folder() / "pods" / f"{_key(lowered, topology_name)}.json.gz"
  if path.exists():
    return Compiled(**json.loads(gzip.decompress(path.read_bytes())))
  found = _compile(lowered)
  _write(path, gzip.compress(json.dumps(dataclasses.asdict(found)).encode()))
  return found


def _compile(lowered: jax.stages.Lowered) -> Compiled:
  start = time.perf_counter()
  try:
    program = topology.compiled(lowered, countable=True)
  except jax.errors.JaxRuntimeError as error:
    needed = _NEEDED.search(str(error))
    if needed is None:
      raise
    return Compiled(
      text="",
      peak_bytes=None,
      argument_bytes=0,
      temp_bytes=0,
      needed_bytes=round(float(needed[1]) * _UNITS[needed[2]]),
      compile_secs=time.perf_counter() - start,
    )
  held = program.memory_analysis()
  return Compiled(
    text=program.as_text(),
    peak_bytes=held.peak_memory_in_bytes,
    argument_bytes=held.argument_size_in_bytes,
    temp_bytes=held.temp_size_in_bytes,
    needed_bytes=None,
    compile_secs=time.perf_counter() - start,
  )


def _key(lowered: jax.stages.Lowered, topology_name: str) -> str:
  parts: list[Any] = [
    topology_name,
    lowered.as_text(),
    sorted(topology.COUNTABLE.items()),
  ]
  parts += [metadata.version(name) for name in ("jax", "jaxlib", "libtpu")]
  return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _write(path: pathlib.Path, content: bytes) -> None:
  """Whole or not at all: others may look for it at the same time."""
  path.parent.mkdir(parents=True, exist_ok=True)
  with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
    file.write(content)
  os.replace(file.name, path)
