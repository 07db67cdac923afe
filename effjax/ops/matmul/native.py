"""The integer product of `int8_dot.cc`, compiled on first use for this machine's CPU.

XLA's CPU backend rearranges an int8 weight in every call. The kernel reads it as it
lies, or a panel at a time rearranged in the cache, on the threads XLA already runs, and
returns the same integers.

It is built by the C++ compiler found ($CXX, c++, g++, clang++), when an int8 product
is compiled for a CPU and never at import, into `native/` of the cache folder, under a
hash of everything the library depends on. What was built is compared with exact
products before it is used. Without a compiler, or with EFFJAX_NATIVE=0, or if any of
this fails, XLA's own product runs: `status` says which and why, and so does the log,
once.
"""

import ctypes
import dataclasses
import functools
import hashlib
import logging
import os
import pathlib
import shutil
import subprocess
import tempfile

import jax
import jaxlib
import numpy as np

from effjax.core import cache

log = logging.getLogger(__name__)

TARGET = "effjax_int8_dot"
SCALED_TARGET = "effjax_int8_dot_scaled"
SWITCH = "EFFJAX_NATIVE"
SOURCE = pathlib.Path(__file__).with_name("int8_dot.cc")
_COMPILERS = ("c++", "g++", "clang++")
_FLAGS = ("-O3", "-std=c++17", "-shared", "-fPIC")
# Some compilers do not know the first on every machine.
_CPU_FLAGS = (("-march=native",), ("-mcpu=native",), ())
_TIMEOUT_SECS = 300
# Rows, outputs and depths that take every tile, every tail and every panel.
_CHECKED = (
  *((1, 5, 1), (2, 3, 31), (3, 9, 64), (7, 6, 257), (9, 4, 96)),
  *((13, 71, 33), (18, 40, 2100), (67, 40, 600)),
)


class _UnavailableError(Exception):
  """Why there is no kernel, in one line."""


@dataclasses.dataclass(frozen=True)
class Status:
  """Whether the kernel runs, and the reason in words."""

  available: bool
  reason: str


def status() -> Status:
  """Whether integer products on the CPU run the kernel; builds it if need be.

  A product compiled earlier keeps what it was compiled with.
  """
  if os.environ.get(SWITCH, "1") == "0":
    return Status(False, f"{SWITCH}=0")
  return _loaded()


@functools.cache
def _loaded() -> Status:
  """Builds, checks and registers the kernel, once a process."""
  try:
    path = _built()
    library = _library(path)
    _check(path, library)
    for target in (TARGET, SCALED_TARGET):
      capsule = jax.ffi.pycapsule(getattr(library, target))
      jax.ffi.register_ffi_target(target, capsule, platform="cpu")
  except (_UnavailableError, OSError) as error:
    reason = " ".join(str(error).split())
    log.warning("int8 products use XLA, not the native kernel: %s", reason)
    return Status(False, reason)
  log.info("int8 products on the CPU run the native kernel %s", path)
  return Status(True, f"compiled for this CPU: {path.name}")


def _built() -> pathlib.Path:
  """The shared library for this machine, compiled if the cache has none."""
  compiler = _compiler()
  cpu_flags, target = _cpu(compiler)
  parts = (
    SOURCE.read_bytes(),
    SOURCE.with_name("int8_isa.h").read_bytes(),
    _run([compiler, "--version"]),
    target,
    repr(_FLAGS + cpu_flags).encode(),
    jaxlib.__version__.encode(),
  )
  digest = hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]
  path = cache.folder() / "native" / f"int8_dot-{digest}.so"
  if path.is_file():
    return path
  path.parent.mkdir(parents=True, exist_ok=True)
  # Renamed when whole: processes that build at once each find a complete library.
  with tempfile.TemporaryDirectory(prefix=".build.", dir=path.parent) as folder:
    made = pathlib.Path(folder) / path.name
    include = f"-I{jax.ffi.include_dir()}"
    _run([compiler, *_FLAGS, *cpu_flags, include, str(SOURCE), "-o", str(made)])
    made.replace(path)
  return path


def _compiler() -> str:
  chosen = os.environ.get("CXX")
  for name in (chosen,) if chosen else _COMPILERS:
    found = shutil.which(name)
    if found:
      return found
  raise _UnavailableError(
    f"CXX={chosen} is not a program"
    if chosen
    else f"no C++ compiler ({', '.join(_COMPILERS)}; or set CXX)"
  )


def _cpu(compiler: str) -> tuple[tuple[str, ...], bytes]:
  """Flags that target this CPU, and what the compiler then defines about it."""
  for flags in _CPU_FLAGS:
    try:
      return flags, _run([compiler, *flags, "-dM", "-E", "-x", "c++", os.devnull])
    except _UnavailableError as error:
      refused = error
  raise refused


def _run(command: list[str]) -> bytes:
  try:
    done = subprocess.run(
      command, capture_output=True, timeout=_TIMEOUT_SECS, stdin=subprocess.DEVNULL
    )
  except (OSError, subprocess.TimeoutExpired) as error:
    raise _UnavailableError(f"{command[0]} did not run: {error}") from error
  if done.returncode:
    lines = done.stderr.decode(errors="replace").strip().splitlines()
    telling = [line for line in lines if "error" in line] or lines or ["no message"]
    raise _UnavailableError(f"{command[0]} failed: {telling[0]}")
  return done.stdout


def _library(path: pathlib.Path) -> ctypes.CDLL:
  library = ctypes.CDLL(str(path))
  plain = library.effjax_int8_dot_plain
  plain.restype = None
  plain.argtypes = [ctypes.c_void_p] * 3 + [ctypes.c_int64] * 3
  return library


def _plain(library: ctypes.CDLL, x_TD: np.ndarray, w_FD: np.ndarray) -> np.ndarray:
  """The kernel on one thread, without XLA."""
  y_TF = np.empty((len(x_TD), len(w_FD)), np.int32)
  pointers = (a.ctypes.data for a in (x_TD, w_FD, y_TF))
  library.effjax_int8_dot_plain(*pointers, len(x_TD), len(w_FD), x_TD.shape[1])
  return y_TF


def _check(path: pathlib.Path, library: ctypes.CDLL) -> None:
  """Compares with exact products, the ends of the range among them."""
  rng = np.random.default_rng(0)
  for rows, outs, depth in _CHECKED:
    x_TD = rng.integers(-128, 128, (rows, depth)).astype(np.int8)
    w_FD = rng.integers(-128, 128, (outs, depth)).astype(np.int8)
    for x, w in ((x_TD, w_FD), (np.full_like(x_TD, -128), np.full_like(w_FD, -128))):
      exact = x.astype(np.int64) @ w.T.astype(np.int64)
      if not np.array_equal(_plain(library, x, w), exact):
        raise _UnavailableError(f"{path} does not compute exact products")
