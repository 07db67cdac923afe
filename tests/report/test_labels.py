import numpy as np
import pytest

from effjax.report import axes, labels


def _boxes(points, sizes, bounds, obstacles=()):
  corners = labels.place(points, sizes, bounds, obstacles)
  return [(x, y, x + w, y + h) for (x, y), (w, h) in zip(corners, sizes, strict=True)]


def test_labels_cover_neither_each_other_nor_points():
  rng = np.random.default_rng(0)
  points = [tuple(p) for p in rng.uniform(50, 750, (12, 2))]
  points.append((points[0][0] + 2, points[0][1] + 1))
  sizes = [(80.0, 14.0)] * len(points)
  boxes = _boxes(points, sizes, (0.0, 0.0, 800.0, 800.0))
  for i, a in enumerate(boxes):
    assert a[0] >= 0 and a[1] >= 0 and a[2] <= 800 and a[3] <= 800
    for b in boxes[:i]:
      assert labels._overlap(a, b) == 0
    for x, y in points:
      assert not (a[0] < x < a[2] and a[1] < y < a[3])


def test_labels_keep_off_lines():
  line = labels.along((0.0, 50.0), (200.0, 50.0))
  ((left, bottom, right, top),) = _boxes(
    [(100.0, 50.0)], [(40.0, 12.0)], (0.0, 0.0, 200.0, 200.0), line
  )
  assert bottom > 52 or top < 48


def test_spread_keeps_order_and_distance():
  found = labels.spread([10.0, 11.0, 50.0, 10.5], gap=5.0)
  assert found == pytest.approx([5.5, 15.5, 50.0, 10.5])
  assert labels.spread([3.0, 30.0], gap=5.0) == [3.0, 30.0]
  close = sorted(labels.spread([1.0, 1.0, 5.0, 9.0, 9.0], gap=4.0))
  assert np.diff(close).min() >= 4 - 1e-9


def test_front_equals_brute_force():
  rng = np.random.default_rng(0)
  points = [tuple(p) for p in rng.integers(0, 12, (40, 2)).astype(float)]
  beaten = lambda p: any(q[0] <= p[0] and q[1] <= p[1] and q != p for q in points)
  expected = sorted({p for p in points if not beaten(p)})
  assert [points[i] for i in axes.front(points)] == expected


def test_a_broken_model_does_not_set_the_scale():
  bits = axes.QUALITIES[0]
  assert axes.limit(bits, [1.7, 1.9, 3.4]) == 1.9
  assert axes.limit(bits, [1.7, 1.9]) == 1.9
