"""What a run ran on, and the compilation cache its stages share."""

import importlib.metadata
import os
import platform
from typing import Any

import jax

from effjax.data import cache
from effjax.measure import device

_PACKAGES = (
  "effjax",
  "jax",
  "jaxlib",
  "flax",
  "optax",
  "orbax-checkpoint",
  "grain",
  "tensorflow-datasets",
  "tokenizers",
  "numpy",
)
# Programs that nobody used for longest go first.
_CACHE_BYTES = 2 << 30
# Quicker compilations are not worth a file.
_CACHED_FROM_SECS = 0.2


def describe() -> dict[str, Any]:
  """Versions, device and settings, as plain JSON types."""
  versions = {}
  for name in _PACKAGES:
    try:
      versions[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
      versions[name] = None
  names = ("XLA_FLAGS", "JAX_PLATFORMS", "OMP_NUM_THREADS")
  return {
    "python": platform.python_version(),
    "platform": platform.platform(),
    "device": device.describe(),
    "num_devices": jax.device_count(),
    "num_processes": jax.process_count(),
    "versions": versions,
    "variables": {name: os.environ[name] for name in names if name in os.environ},
  }


def keep_compiled() -> None:
  """Turns on JAX's persistent compilation cache, bounded, in the cache folder.

  The stages of a recipe compile the same programs again and again, and so do resumed
  runs. Who has set JAX_COMPILATION_CACHE_DIR keeps that.
  """
  if jax.config.jax_compilation_cache_dir is not None:
    return
  folder = cache.folder() / "compiled"
  jax.config.update("jax_compilation_cache_dir", str(folder))
  jax.config.update("jax_compilation_cache_max_size", _CACHE_BYTES)
  jax.config.update("jax_persistent_cache_min_compile_time_secs", _CACHED_FROM_SECS)
