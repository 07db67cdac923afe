"""Rotary frequencies for sequences longer than a model was trained on.

| kind     | what becomes of frequency f_i = theta ** (-2 i / K)                      |
|----------|--------------------------------------------------------------------------|
| "linear" | f_i / factor: position interpolation (Chen et al. 2023,                  |
|          | arXiv:2306.15595)                                                        |
| "ntk"    | theta becomes theta * factor ** (K / (K - 2)): the lowest frequency is   |
|          | divided by the factor, the highest kept ("NTK-aware", arXiv:2309.00071,  |
|          | section 3.1)                                                             |
| "yarn"   | pairs that turn often over the trained length keep f_i, those that turn  |
|          | rarely get f_i / factor, a ramp between (arXiv:2309.00071, section 3.2), |
|          | and queries and keys are scaled by `attention_factor` (section 3.4)      |
| "llama3" | the same idea with a ramp over the number of turns (Llama 3.1,           |
|          | arXiv:2407.21783)                                                        |

"ntk" here has a fixed factor. The dynamic variant, whose factor grows with the sequence
at hand, would turn the keys of a cache in different ways at different times.

Local letter: J = K / 2 pairs.
"""

import dataclasses
import math

import numpy as np

from effjax.core import errors
from effjax.core.config import require

KINDS = ("linear", "ntk", "yarn", "llama3")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeScaling:
  """How rotary positions are stretched.

  Attributes:
    kind: one of KINDS.
    factor: longest sequence over `original_max_len`, at least 1.
    original_max_len: tokens of the sequences the model was trained on; "yarn" and
      "llama3" need it, the others do not use it.
    beta_fast: "yarn": a pair with at least so many turns over the trained length keeps
      its frequency.
    beta_slow: "yarn": a pair with at most so many turns is interpolated.
    truncate: "yarn": round the bounds of the ramp outwards to whole pairs.
    attention_factor: "yarn": scale of queries and of keys; None computes it, from the
      factor and the two numbers below.
    mscale: "yarn": weight of log(factor) in the scale of queries and keys.
    mscale_all_dim: "yarn": the same, of a scale that DeepSeek takes out of the rotated
      entries again and gives to the scores of all of them; see `score_factor`. 0: none.
    low_freq_factor: "llama3": a pair with fewer turns over the trained length is
      interpolated.
    high_freq_factor: "llama3": a pair with more turns keeps its frequency.
  """

  kind: str
  factor: float
  original_max_len: int | None = None
  beta_fast: float = 32.0
  beta_slow: float = 1.0
  truncate: bool = True
  attention_factor: float | None = None
  mscale: float = 1.0
  mscale_all_dim: float = 0.0
  low_freq_factor: float = 1.0
  high_freq_factor: float = 4.0

  def __post_init__(self):
    if self.kind not in KINDS:
      raise errors.unknown("rope scaling kind", self.kind, KINDS)
    require(self.factor >= 1, f"rope factor={self.factor} must be at least 1")
    length = self.original_max_len
    require(
      length is None or length > 0,
      f"rope original_max_len={length} must be positive",
    )
    if self.kind in ("yarn", "llama3"):
      require(
        length is not None,
        f"rope scaling {self.kind!r} needs original_max_len, the trained length",
      )
    for low, high in (
      ("beta_slow", "beta_fast"),
      ("low_freq_factor", "high_freq_factor"),
    ):
      a, b = getattr(self, low), getattr(self, high)
      require(0 < a < b, f"rope {low}={a} must be positive and below {high}={b}")
    scale = self.attention_factor
    require(
      scale is None or scale > 0, f"rope attention_factor={scale} must be positive"
    )
    for name in ("mscale", "mscale_all_dim"):
      value = getattr(self, name)
      require(value >= 0, f"rope {name}={value} must not be negative")


def frequencies(
  head_dim: int, theta: float, scaling: RopeScaling | None = None
) -> np.ndarray:
  """Radians a position of each pair, float64 `[K / 2]`, the fastest pair first.

  Raises:
    InputError: `head_dim` is odd, or too small for "ntk".
  """
  require(head_dim % 2 == 0, f"rope needs an even head_dim, got {head_dim}")
  if scaling is not None and scaling.kind == "ntk":
    require(head_dim > 2, f"rope scaling 'ntk' needs a head_dim over 2, got {head_dim}")
    theta = theta * scaling.factor ** (head_dim / (head_dim - 2))
  frequency_J = theta ** -(np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
  if scaling is None or scaling.kind == "ntk":
    return frequency_J
  kept = {"linear": _kept_by_linear, "yarn": _kept_by_yarn, "llama3": _kept_by_llama3}
  kept_J = kept[scaling.kind](frequency_J, theta, scaling)
  return frequency_J * (kept_J + (1 - kept_J) / scaling.factor)


def attention_factor(scaling: RopeScaling | None) -> float:
  """Scale of rotated queries and of rotated keys, so its square scales their scores.

  YaRN's sqrt(1 / t) = 0.1 log(factor) + 1 (arXiv:2309.00071, eq. 22); DeepSeek divides
  it by the part that `score_factor` brings back. As in DeepSeek's code `mscale` counts
  with and without `mscale_all_dim`; Hugging Face drops it without.
  """
  if scaling is None or scaling.kind != "yarn":
    return 1.0
  if scaling.attention_factor is not None:
    return scaling.attention_factor
  return _mscale(scaling, scaling.mscale) / _mscale(scaling, scaling.mscale_all_dim)


def score_factor(scaling: RopeScaling | None) -> float:
  """What DeepSeek multiplies the scores of all entries by, rotated or not.

  Only multi-head latent attention has entries that are not rotated, and only there the
  scale of the scores is more than `attention_factor` squared.
  """
  if scaling is None or scaling.kind != "yarn":
    return 1.0
  return _mscale(scaling, scaling.mscale_all_dim) ** 2


def _mscale(scaling: RopeScaling, weight: float) -> float:
  return 0.1 * weight * math.log(scaling.factor) + 1.0


def _kept_by_linear(
  frequency_J: np.ndarray, theta: float, scaling: RopeScaling
) -> np.ndarray:
  """Share of each frequency that is not interpolated: none."""
  del theta, scaling
  return np.zeros_like(frequency_J)


def _kept_by_yarn(
  frequency_J: np.ndarray, theta: float, scaling: RopeScaling
) -> np.ndarray:
  """One minus the ramp of arXiv:2309.00071, eq. 18, linear in the pair's index.

  Pair i turns r times over the trained length L where theta ** (-2 i / K) L = 2 pi r.
  """
  head_dim = 2 * len(frequency_J)

  def pair(turns: float) -> float:
    wavelengths = scaling.original_max_len / (2 * math.pi * turns)
    return head_dim * math.log(wavelengths) / (2 * math.log(theta))

  first, last = pair(scaling.beta_fast), pair(scaling.beta_slow)
  if scaling.truncate:
    first, last = math.floor(first), math.ceil(last)
  first, last = max(first, 0), min(last, head_dim - 1)
  # A ramp of no width would divide by zero: this is as good as a step.
  width = max(last - first, 1e-3)
  return 1 - np.clip((np.arange(len(frequency_J)) - first) / width, 0, 1)


def _kept_by_llama3(
  frequency_J: np.ndarray, theta: float, scaling: RopeScaling
) -> np.ndarray:
  """A ramp that is linear in the turns over the trained length."""
  del theta
  turns_J = scaling.original_max_len * frequency_J / (2 * math.pi)
  low, high = scaling.low_freq_factor, scaling.high_freq_factor
  return np.clip((turns_J - low) / (high - low), 0, 1)
