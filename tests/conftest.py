"""How every test runs: 8 fake CPU devices, strict shapes, checked annotations, and
programs that are compiled quickly.

`effjax` is imported through a hook that checks every jaxtyping annotation at run time
with beartype: arguments and results of functions and of Linen modules, and fields of
dataclasses. Processes that tests start are not hooked.
"""

import itertools
import os
import pathlib

import jax
import jaxtyping
import numpy as np
import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
CACHE_BYTES = 2**30
# JAX remembers 8,192 calls of jitted functions a process, and beyond them none that are
# new: functions that count their compilations would count none.
TESTS_A_JIT_CACHE = 300
# Programs of tests run once, so half of the time would go into optimizing them. Without
# it XLA's own passes are the same, and LLVM's are few. What users run is what processes
# that tests start run, and every test if EFFJAX_OPTIMIZED is set (`make test-all`).
QUICK_TO_COMPILE = (
  "--xla_backend_optimization_level=0",
  "--xla_cpu_use_fusion_emitters=false",
)


def _environment() -> dict[str, str]:
  """What this process and every process a test starts have in common."""
  workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
  threads = str(max(1, (os.cpu_count() or 1) // workers))
  return {
    "HF_HUB_OFFLINE": "1",
    "JAX_PLATFORMS": "cpu",
    "MPLBACKEND": "agg",
    # Test processes share the cores: XLA's CPU client reads NPROC, PyTorch the other.
    "NPROC": threads,
    "OMP_NUM_THREADS": threads,
  }


def _configure_jax() -> None:
  jax.config.update("jax_platforms", "cpu")
  jax.config.update("jax_num_cpu_devices", 8)
  jax.config.update("jax_numpy_rank_promotion", "raise")
  jax.config.update("jax_default_matmul_precision", "highest")
  # Compiled programs are shared by the test processes and kept for the next run. Only
  # in the processes of pytest: one that a test kills could leave half an entry.
  jax.config.update("jax_compilation_cache_dir", str(ROOT / ".pytest_cache" / "xla"))
  jax.config.update("jax_compilation_cache_max_size", CACHE_BYTES)
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)
  jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)


# A worker finds in its environment what pytest's first process has set.
_XLA_FLAGS = [
  flag
  for flag in os.environ.get("XLA_FLAGS", "").split()
  if flag not in QUICK_TO_COMPILE
]
os.environ.update(_environment())
if not os.environ.get("EFFJAX_OPTIMIZED"):
  os.environ["XLA_FLAGS"] = " ".join([*_XLA_FLAGS, *QUICK_TO_COMPILE])
_configure_jax()
jaxtyping.install_import_hook("effjax", "beartype.beartype")


@pytest.fixture
def rng() -> np.random.Generator:
  """Random numbers that are the same in every run."""
  return np.random.default_rng(0)


@pytest.fixture
def tmp_workdir(tmp_path, monkeypatch) -> pathlib.Path:
  """An empty folder that is the current one during the test, for runs and caches."""
  monkeypatch.chdir(tmp_path)
  return tmp_path


@pytest.fixture
def subprocess_env() -> dict[str, str]:
  """Environment for a process of its own: effjax from this checkout, on one device."""
  path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
  return os.environ | {"PYTHONPATH": path, "XLA_FLAGS": " ".join(_XLA_FLAGS)}


_finished = itertools.count(1)


def pytest_runtest_teardown() -> None:
  """Empties JAX's caches from time to time, before they are full."""
  if next(_finished) % TESTS_A_JIT_CACHE == 0:
    jax.clear_caches()


def _oracle_required() -> bool:
  return bool(os.environ.get("EFFJAX_REQUIRE_ORACLE"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
  """Where the oracles are required, a comparison that skips is a failure."""
  report = yield
  if _oracle_required() and report.skipped and item.get_closest_marker("oracle"):
    report.outcome = "failed"
    report.longrepr = f"{item.nodeid} compares with a package that is not installed"
  return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector):
  """The same for a whole file, which `importorskip` at its top leaves out."""
  report = yield
  if _oracle_required() and report.outcome == "skipped":
    report.outcome = "failed"
    report.longrepr = f"{collector.nodeid} was left out: {report.longrepr}"
  return report
