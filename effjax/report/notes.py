"""How a number compares with the one it came from, in words."""

import dataclasses

# Timings closer than this are called equal: they vary by as much from run to run.
_SAME_TIME = 0.05
_SAME_SIZE = 0.005
_SAME_QUALITY = 0.0005


@dataclasses.dataclass(frozen=True, kw_only=True)
class Note:
  """How a number compares: `text`, and "better", "worse" or "" as `tone`."""

  text: str = ""
  tone: str = ""


def _ratio(value: float, base: float, less: str, more: str, same: float) -> Note:
  if not base or not value:
    return Note()
  ratio = value / base
  if ratio > 1 + same:
    return Note(text=f"{_factor(ratio)}x {more}", tone="worse")
  if ratio < 1 / (1 + same):
    return Note(text=f"{_factor(1 / ratio)}x {less}", tone="better")
  return Note()


def _factor(ratio: float) -> str:
  return f"{ratio:.2f}" if ratio < 10 else f"{ratio:.0f}"


def time(value: float, base: float) -> Note:
  """Faster or slower; less is better."""
  return _ratio(value, base, "faster", "slower", _SAME_TIME)


def size(value: float, base: float) -> Note:
  """Smaller or larger; less is better."""
  return _ratio(value, base, "smaller", "larger", _SAME_SIZE)


def work(value: float, base: float) -> Note:
  """Less or more; less is better."""
  return _ratio(value, base, "less", "more", _SAME_SIZE)


def rate(value: float, base: float) -> Note:
  """Only a tone, no words: more is better."""
  note = time(base, value)
  return dataclasses.replace(note, text="")


def difference(value: float, base: float) -> Note:
  """The difference; less is better."""
  delta = value - base
  tone = "worse" if delta > 0 else "better"
  return Note(text=f"{delta:+.4f}", tone=tone if abs(delta) > _SAME_QUALITY else "")


def points(value: float, base: float) -> Note:
  """The difference in hundredths; more is better."""
  delta = 100 * (value - base)
  tone = "worse" if delta < 0 else "better"
  return Note(text=f"{delta:+.2f} points", tone=tone if delta else "")
