"""Rotary positions as GGUF has them: a base, keys that stretch them, or a tensor.

Llama 3's stretching is not in keys but in the tensor `rope_freqs.weight`, which divides
the frequency of each pair. It is read by finding numbers that give these factors.
"""

import itertools
import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from effjax.core import errors
from effjax.ops.attention import rope_scaling

FACTORS = "rope_freqs.weight"
TOLD = "rope_freqs"
_BASE = 10_000.0
_ORIGINAL = "rope.scaling.original_context_length"
# Llama 3's own, and what is tried first.
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
_LLAMA3_LENGTH = 8192
_TOLERANCE = 1e-5


def read(keys: Any, kinds: tuple[str, ...]) -> dict[str, Any]:
  """Our options `rope_theta` and `rope_scaling`.

  Args:
    keys: of the architecture; see keys.Keys.
    kinds: of scaling that llama.cpp computes for it.

  Raises:
    InputError: another kind of scaling.
  """
  theta = keys.get("rope.freq_base", float, _BASE)
  found = {"rope_theta": theta, "rope_scaling": None}
  scaling = _read_scaling(keys)
  told = keys.told(TOLD, list, None)
  if told is not None:
    if scaling is not None:
      raise errors.InputError(
        f"{keys.where}: {FACTORS} together with rope.scaling.type="
        f"{scaling['kind']!r} is not supported"
      )
    names = ("factor", "original_max_len", "low_freq_factor", "high_freq_factor")
    scaling = {"kind": "llama3"} | dict(zip(names, told, strict=True))
  if scaling is not None:
    if scaling["kind"] not in kinds:
      raise errors.unknown(f"rope scaling of {keys.where}", scaling["kind"], kinds)
    found["rope_scaling"] = scaling
  return found


def _read_scaling(keys: Any) -> dict[str, Any] | None:
  old = keys.get("rope.scale_linear", float, 1.0)
  factor = keys.get("rope.scaling.factor", float, old)
  # llama.cpp takes a factor without a type for a linear one.
  kind = keys.get("rope.scaling.type", str, "linear")
  if kind == "none" or (kind == "linear" and factor in (0.0, 1.0)):
    return None
  scaling = {"kind": kind, "factor": factor}
  if kind != "yarn":
    return scaling
  # llama.cpp does not look at these keys in the architectures here.
  keys.refuse(
    {
      "rope.scaling.yarn_ext_factor": (1.0, -1.0),
      "rope.scaling.yarn_attn_factor": (1.0, -1.0),
      "rope.scaling.yarn_beta_fast": (32.0, -1.0),
      "rope.scaling.yarn_beta_slow": (1.0, -1.0),
      "rope.scaling.yarn_log_multiplier": 0.0,
    }
  )
  scaling["original_max_len"] = keys.get(
    _ORIGINAL, int, keys.get("context_length", int)
  )
  more = keys.get("rope.scaling.attn_factor", float, 1.0)
  if more != 1:
    # Near enough for the float32 of the file, so that a factor comes back as it was.
    scaling["attention_factor"] = float(f"{more * _yarn(factor):.6g}")
  return scaling


def write(options: Mapping[str, Any]) -> dict[str, Any]:
  """Their keys, from our options."""
  found: dict[str, Any] = {"rope.freq_base": options["rope_theta"]}
  scaling = options["rope_scaling"]
  if scaling is None:
    return found
  kind = scaling["kind"]
  if kind == "llama3":
    # llama.cpp uses it for yarn only; here it helps to read the tensor.
    return found | {_ORIGINAL: scaling["original_max_len"]}
  found |= {"rope.scaling.type": kind, "rope.scaling.factor": scaling["factor"]}
  if kind == "yarn":
    found[_ORIGINAL] = scaling["original_max_len"]
    if scaling["attention_factor"] is not None:
      more = scaling["attention_factor"] / _yarn(scaling["factor"])
      found["rope.scaling.attn_factor"] = more
  return found


def told(options: Mapping[str, Any]) -> dict[str, Any]:
  """What `rope_freqs.weight` will tell; see `tensors`."""
  scaling = options["rope_scaling"]
  if scaling is None or scaling["kind"] != "llama3":
    return {}
  names = ("factor", "original_max_len", "low_freq_factor", "high_freq_factor")
  return {TOLD: [scaling[name] for name in names]}


def tensors(options: Mapping[str, Any]) -> dict[str, np.ndarray]:
  """The tensor that holds Llama 3's scaling, where there is one."""
  scaling = options["rope_scaling"]
  if scaling is None or scaling["kind"] != "llama3":
    return {}
  return {FACTORS: _factors(options["head_dim"], options["rope_theta"], **scaling)}


def hints(keys: Any) -> tuple[float, int | None]:
  """The base and, if the file has it, the original length, for `fit`."""
  return keys.get("rope.freq_base", float, _BASE), keys.get(_ORIGINAL, int, None)


def fit(factor_J: np.ndarray, theta: float, length: int | None) -> list[Any] | None:
  """The numbers of Llama 3's scaling that give the factors of a tensor.

  Args:
    factor_J: what divides the frequency of each pair, the fastest first.
    theta: the base.
    length: original length, if the file has it.

  Returns:
    factor, original length, low and high frequency factor; None if nothing is
    stretched.

  Raises:
    InputError: no such numbers: another kind of scaling.
  """
  if np.all(factor_J == 1):
    return None
  factor = float(f"{factor_J.max():.6g}")
  stretched = bool(np.isfinite(factor_J).all() and (factor_J >= 1).all() and theta > 1)
  for original, low, high in (
    _candidates(factor_J, theta, factor, length) if stretched else ()
  ):
    if original < 1 or not 0 < low < high:
      continue
    computed = _factors(
      2 * len(factor_J),
      theta,
      kind="llama3",
      factor=factor,
      original_max_len=original,
      low_freq_factor=low,
      high_freq_factor=high,
    )
    if np.allclose(computed, factor_J, rtol=_TOLERANCE, atol=0):
      return [factor, original, low, high]
  raise errors.InputError(
    f"{FACTORS} does not hold what Llama 3's scaling computes, the only one that is "
    "read from a tensor"
  )


def _candidates(
  factor_J: np.ndarray, theta: float, factor: float, length: int | None
) -> Iterator[tuple[int, float, float]]:
  """Original length, low and high frequency factor, the likeliest first."""
  first = [length] if length else []
  lengths = [*first, _LLAMA3_LENGTH, *(2**k for k in range(1, 24))]
  for original, low, high in itertools.product(lengths, (1.0,), (4.0, 32.0)):
    yield original, low, high
  # The share that is kept is linear in the turns over the original length, t = L f /
  # 2 pi: (t - low) / (high - low). With low = 1 a point of it gives one of the others,
  # and a line both.
  frequency_J = rope_scaling.frequencies(2 * len(factor_J), theta)
  kept_J = (1 / factor_J.astype(np.float64) - 1 / factor) / (1 - 1 / factor)
  between = (kept_J > 1e-4) & (kept_J < 1 - 1e-4)
  for i in np.flatnonzero(between)[:1]:
    turns = frequency_J[i] / (2 * math.pi)
    if length:
      high = 1 + (length * turns - 1) / kept_J[i]
      for digits in (3, 4, 5, 6):
        yield length, 1.0, float(f"{high:.{digits}g}")
    yield round((1 + 3 * kept_J[i]) / turns), 1.0, 4.0
  if between.sum() < 2:
    return
  slope, offset = np.polyfit(frequency_J[between], kept_J[between], 1)
  if slope > 0 > offset:
    high = 1 - 1 / offset
    original = slope * 2 * math.pi * (high - 1)
    for digits in (3, 4, 5, 6):
      yield round(original), 1.0, float(f"{high:.{digits}g}")
    if length:
      ratio = length / original
      for digits in (3, 4, 5, 6):
        yield length, float(f"{ratio:.{digits}g}"), float(f"{high * ratio:.{digits}g}")


def _factors(head_dim: int, theta: float, **scaling: Any) -> np.ndarray:
  """What divides each frequency, float32."""
  stretched = rope_scaling.RopeScaling(**scaling)
  plain_J = rope_scaling.frequencies(head_dim, theta)
  found_J = plain_J / rope_scaling.frequencies(head_dim, theta, stretched)
  return found_J.astype(np.float32)


def _yarn(factor: float) -> float:
  """The scale of queries and keys that YaRN computes by itself."""
  return 0.1 * math.log(factor) + 1
