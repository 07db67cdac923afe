"""Patterns: what the papers say, and layouts that miss nothing."""

import jax.numpy as jnp
import numpy as np
import pytest

from effjax.core import errors
from effjax.ops.attention import patterns

LENGTH = 70
ROWS = ((True, False, True), (False, True, True), (True, True, False))
ALL = (
  patterns.Full(),
  patterns.Causal(),
  patterns.Window(9),
  patterns.Window(9, causal=False),
  patterns.Longformer(6, 3),
  patterns.Longformer(6, 3, causal=True),
  patterns.BigBird(8),
  patterns.BigBird(8, causal=True),
  patterns.BigBird(4, 1, 3, 2, seed=5),
  patterns.BigBird(4, 2, 1, 0, causal=True),
  patterns.BlockMask(ROWS, 24),
  patterns.BlockMask(ROWS, 24, causal=True),
)


def _seen(pattern, length=LENGTH):
  at = jnp.arange(length)
  return np.asarray(pattern.seen(at[:, None], at[None, :], length))


@pytest.mark.parametrize("pattern", ALL, ids=str)
@pytest.mark.parametrize("block", [5, 8, 32])
def test_layout_is_where_something_is_seen(pattern, block):
  seen = _seen(pattern)
  count = -(-LENGTH // block)
  padded = np.pad(seen, (0, count * block - LENGTH))
  tight = padded.reshape(count, block, count, block).any((1, 3))
  layout = pattern.layout(count, count, block, LENGTH)
  assert layout.shape == tight.shape and layout.dtype == bool
  assert not (tight & ~layout).any(), "a pair of blocks is left out"
  # It may keep a pair for its blocks alone, but only just.
  assert layout.sum() <= tight.sum() + count
  if pattern.causal:
    assert not np.triu(seen, 1).any()


def test_relative_patterns_depend_on_differences():
  for pattern in ALL:
    seen = _seen(pattern)
    shifted = np.array_equal(seen[1:, 1:], seen[:-1, :-1])
    assert shifted == pattern.relative, pattern


def test_windows():
  seen = _seen(patterns.Window(3), 6)
  assert seen[4].tolist() == [False, False, True, True, True, False]
  seen = _seen(patterns.Window(4, causal=False), 8)
  assert np.flatnonzero(seen[4]).tolist() == [2, 3, 4, 5, 6]


def test_longformer_globals_see_all_and_are_seen():
  seen = _seen(patterns.Longformer(4, 2), 12)
  assert seen[:2].all() and seen[:, :2].all()
  assert np.flatnonzero(seen[8]).tolist() == [0, 1, 6, 7, 8, 9, 10]


def test_bigbird_counts():
  """A middle block sees 3 of the window, 2 global and 3 random blocks, all distinct."""
  pattern = patterns.BigBird(4)
  blocks = _seen(pattern, 80)[::4, ::4]
  assert blocks[0].all() and blocks[-1].all()
  assert blocks[:, 0].all() and blocks[:, -1].all()
  assert (blocks[3:-3].sum(1) == 8).all()
  assert not np.array_equal(blocks, _seen(patterns.BigBird(4, seed=1), 80)[::4, ::4])
  causal = _seen(patterns.BigBird(4, causal=True), 80)[::4, ::4]
  # Own and two before, two at the start, three random ones.
  assert (causal[8:].sum(1) == 8).all()


def test_causal_bigbird_does_not_depend_on_what_follows():
  pattern = patterns.BigBird(4, causal=True)
  np.testing.assert_array_equal(_seen(pattern, 80)[:40, :40], _seen(pattern, 40))


def test_random_blocks_are_spread():
  """Every block before the window is drawn about as often as any other."""
  drawn = np.zeros(30)
  for seed in range(200):
    pattern = patterns.BigBird(1, 1, 0, 3, seed, causal=True)
    drawn += pattern.layout(31, 31, 1)[30, :30]
  assert drawn.sum() == 600 and drawn.min() > 5 and drawn.max() < 45


def test_patterns_are_values():
  assert patterns.Window(3) == patterns.Window(3) != patterns.Window(4)
  assert len({*ALL, *ALL}) == len(ALL)


@pytest.mark.parametrize(
  ("make", "message"),
  [
    (lambda: patterns.Window(0), "window=0 must be at least 1"),
    (lambda: patterns.Longformer(0), "window=0"),
    (lambda: patterns.Longformer(2, -1), "num_global=-1 must not be negative"),
    (lambda: patterns.BigBird(0), "block=0"),
    (lambda: patterns.BigBird(num_window_blocks=2), "num_window_blocks=2 .* odd"),
    (lambda: patterns.BigBird(num_random=-1), "num_random=-1"),
    (lambda: patterns.BlockMask(((True,), ()), 4), "rows of one length"),
    (lambda: patterns.BlockMask((), 4), "rows of one length"),
    (lambda: _seen_without_length(), "needs the length"),
  ],
)
def test_refuses_with_one_line(make, message):
  with pytest.raises(errors.InputError, match=message):
    make()


def _seen_without_length():
  patterns.BigBird(4).seen(jnp.arange(4), jnp.arange(4))
