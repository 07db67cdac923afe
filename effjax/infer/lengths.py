"""Lengths that rows are padded to: few, so that few programs are compiled."""


def padded(length: int, least: int, limit: int) -> int:
  """The smallest of 2^n and 3 * 2^n from `least` on that holds `length`, at most limit.

  Args:
    length: tokens in the row, at most `limit`.
    least: the shortest length, a power of two.
    limit: what the model was trained for.
  """
  power = max(least, 1 << (length - 1).bit_length())
  between = power * 3 // 4
  fits = least < power and length <= between
  return min(between if fits else power, limit)
