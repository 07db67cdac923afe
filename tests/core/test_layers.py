"""Runs are found greedily and maximal."""

import pytest

from effjax.core import layers


@pytest.mark.parametrize(
  ("keys", "expected"),
  [
    ("aaaa", [(1, 4)]),
    ("mmammamma", [(3, 3)]),
    ("aabb", [(1, 2), (1, 2)]),
    ("abc", [(1, 1), (1, 1), (1, 1)]),
    ("mmammamm", [(3, 2), (1, 2)]),
    ("xababab", [(1, 1), (2, 3)]),
    ("aabc", [(1, 2), (1, 1), (1, 1)]),
  ],
)
def test_find_runs(keys, expected):
  runs = layers.find_runs(keys)
  assert [(r.period, r.repeats) for r in runs] == expected
  assert sum(r.num_layers for r in runs) == len(keys)
