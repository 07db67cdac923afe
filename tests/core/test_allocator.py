"""A process that keeps freed memory takes fewer page faults."""

import subprocess
import sys

import pytest

_PROGRAM = """
import ctypes, resource, sys
from effjax.core import allocator
if sys.argv[1] == "keep":
  assert allocator.keep_freed_memory()
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
libc.memset.argtypes = (ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t)
libc.free.argtypes = (ctypes.c_void_p,)
for _ in range(20):
  block = libc.malloc(2**26)
  libc.memset(block, 1, 2**26)
  libc.free(block)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="a setting of glibc")
def test_blocks_are_reused_without_page_faults(subprocess_env):
  def faults(mode):
    command = [sys.executable, "-c", _PROGRAM, mode]
    done = subprocess.run(
      command, env=subprocess_env, capture_output=True, text=True, check=True
    )
    return int(done.stdout)

  # 20 blocks of 16,384 pages: all of them again each time, or only once.
  assert faults("keep") < 60_000 < faults("default")
