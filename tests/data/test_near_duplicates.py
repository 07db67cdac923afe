import random

import pytest

from effjax.data import near_duplicates


def words(seed: int, count: int) -> list[str]:
  rng = random.Random(seed)
  return [f"w{rng.randrange(10**6)}" for _ in range(count)]


def jaccard(a: list[str], b: list[str]) -> float:
  first, second = (
    {tuple(text[i : i + 5]) for i in range(len(text) - 4)} for text in (a, b)
  )
  return len(first & second) / len(first | second)


@pytest.mark.parametrize("num_changed", [0, 3, 10, 120, 200])
def test_decides_as_the_exact_similarity_does(num_changed):
  original = words(0, 1000)
  changed = list(original)
  for place in random.Random(1).sample(range(1000), num_changed):
    changed[place] = "other"
  exact = jaccard(original, changed)
  assert abs(exact - 0.5) > 0.15  # Beyond three standard errors of the estimate.
  index = near_duplicates.Index(0.5)
  assert index.add(" ".join(original)) is None
  assert index.add(" ".join(words(2, 1000))) is None
  assert index.add(" ".join(changed)) == (0 if exact > 0.5 else None)


def test_white_space_does_not_make_texts_different():
  index = near_duplicates.Index(0.9)
  assert index.add("def f(x):\n  return x + 1\n") is None
  assert index.add("def f(x):\n\n\treturn x  +  1") == 0


def test_short_and_empty_texts():
  index = near_duplicates.Index(0.5)
  assert index.add("one") is None
  assert index.add("one") == 0
  assert index.add("two words") is None
  assert index.add("") is None


def test_a_text_longer_than_a_block_is_seen_whole():
  text = words(3, 3 * near_duplicates._BLOCK)
  index = near_duplicates.Index(0.8)
  assert index.add(" ".join(text)) is None
  assert index.add(" ".join(text[: len(text) // 3])) is None
  assert index.add(" ".join(["start", *text])) == 0
