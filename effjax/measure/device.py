"""What a number was measured on, in words."""

import os
import pathlib

import jax


def describe() -> str:
  """Such as "8 x NVIDIA H200" or "cpu: Intel(R) Xeon(R) Platinum 8488C, 2 cores"."""
  devices = jax.devices()
  count = f"{len(devices)} x " if len(devices) > 1 else ""
  if devices[0].platform != "cpu":
    return f"{count}{devices[0].device_kind}"
  return f"{count}cpu: {_cpu_model()}, {_num_cores()} cores"


def _num_cores() -> int:
  if hasattr(os, "sched_getaffinity"):
    return len(os.sched_getaffinity(0))
  return os.cpu_count() or 1


def _cpu_model() -> str:
  try:
    lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
  except OSError:
    lines = []
  for line in lines:
    name, _, value = line.partition(":")
    if name.strip() == "model name":
      return value.strip()
  return os.uname().machine
