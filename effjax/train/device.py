"""What is known of the device: peak FLOP/s and memory in use."""

import re

import jax

# Dense bf16 FLOP/s of one device as its maker states it; the first match counts.
_PEAK_FLOPS = (
  (r"TPU v4", 275e12),
  (r"TPU v5 ?(lite|e)", 197e12),
  (r"TPU v5", 459e12),
  (r"TPU v6", 918e12),
  (r"TPU ?(v7|7x)", 2307e12),
  (r"\bB200\b|\bGB200\b", 2250e12),
  (r"\bH100 PCIe", 756e12),
  (r"\bH[12]00\b|\bGH200\b", 989e12),
  (r"\bA100\b", 312e12),
  (r"\bL40S\b", 362e12),
  (r"\bL4\b", 121e12),
  (r"\bV100\b", 125e12),
  (r"\bT4\b", 65e12),
)


def peak_flops(kind: str) -> float | None:
  """Peak dense bf16 FLOP/s of one device, or None where no honest figure is known.

  Args:
    kind: `jax.Device.device_kind`.
  """
  for pattern, flops in _PEAK_FLOPS:
    if re.search(pattern, kind):
      return flops
  return None


def model_flops_utilization(
  tokens_per_sec: float | None, flops_per_token: float | None, num_devices: int
) -> float | None:
  """Model FLOPs a second over the peak of all devices, or None where unknown.

  Args:
    tokens_per_sec: over all devices.
    flops_per_token: of a forward and backward pass, recomputation left out.
    num_devices: devices in use.
  """
  peak = peak_flops(jax.devices()[0].device_kind)
  if peak is None or not tokens_per_sec or not flops_per_token:
    return None
  return tokens_per_sec * flops_per_token / (peak * num_devices)


def memory_bytes() -> int | None:
  """Bytes in use now: of the first device, or on the CPU of this process."""
  stats = jax.local_devices()[0].memory_stats()
  if stats is not None:
    return stats.get("bytes_in_use")
  try:
    with open("/proc/self/status", encoding="ascii") as file:
      found = re.search(r"^VmRSS:\s+(\d+) kB", file.read(), re.MULTILINE)
  except OSError:
    return None
  return int(found.group(1)) * 1024 if found else None
