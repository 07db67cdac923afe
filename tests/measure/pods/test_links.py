"""Times of collectives on small networks, worked out by hand."""

import itertools

import pytest

from effjax.core import errors
from effjax.measure.pods import chips, links
from effjax.parallel import collectives


def wiring(name):
  slice_ = chips.parse(name)
  return links.Wiring(slice_, [*itertools.product(*map(range, slice_.shape))])


def collective(kind, num_bytes, *groups):
  return collectives.Collective(kind, num_bytes, groups, times=3)


MB = 10**6
LINK = 400e9 / 8  # of v5e: both directions and four links make the page's number
ROW = tuple(range(16))  # along the last axis of v5e:16x16
COLUMN = tuple(range(0, 256, 16))


@pytest.mark.parametrize(
  ("group", "ways", "hops"),
  [
    (ROW, 2, 8),  # a ring, in both directions
    (COLUMN, 2, 8),
    (tuple(range(256)), 4, 16),  # both axes
    (ROW[:4], 1, 4),  # a line
    (ROW[::4], 2 / 4, 8),  # four rings share each link
  ],
)
def test_a_gather_goes_around_rings(group, ways, hops):
  sent = MB * (len(group) - 1) / len(group)
  found = wiring("v5e:16x16").secs(collective("all-gather", MB, group))
  assert found == pytest.approx(sent / (ways * LINK) + hops * links.HOP_SECS)


def test_a_sum_goes_around_twice():
  found = wiring("v5e:16x16").secs(collective("all-reduce", MB, ROW))
  once = wiring("v5e:16x16").secs(collective("reduce-scatter", MB, ROW))
  assert found == pytest.approx(2 * once)


def test_small_slices_have_no_rings():
  line = wiring("v5e:2x4").secs(collective("all-gather", MB, (0, 1, 2, 3)))
  assert line == pytest.approx(0.75 * MB / LINK + 4e-6)
  ring = wiring("v5p:2x2x4").secs(collective("all-gather", MB, (0, 1, 2, 3)))
  assert ring == pytest.approx(0.75 * MB / (2 * 100e9) + 2e-6)


def test_a_permute_waits_for_its_busiest_link():
  around = tuple((i, (i + 1) % 16) for i in range(16))
  found = wiring("v5e:16x16").secs(collective("collective-permute", MB, *around))
  assert found == pytest.approx(MB / LINK + 1e-6)
  # Without a ring the last sends back over all the others.
  line = tuple((i, (i + 1) % 4) for i in range(4))
  found = wiring("v5e:2x4").secs(collective("collective-permute", MB, *line))
  assert found == pytest.approx(MB / LINK + 3e-6)
  # Two that need one link take turns.
  far = ((0, 2), (1, 3))
  found = wiring("v5e:2x4").secs(collective("collective-permute", MB, *far))
  assert found == pytest.approx(2 * MB / LINK + 2e-6)


def test_a_device_alone_sends_nothing():
  assert wiring("v5e:2x4").secs(collective("all-reduce", MB, (3,))) == 0


@pytest.mark.parametrize(
  ("name", "message"),
  [
    ("v5x:2x4", "unknown TPU generation 'v5x'"),
    ("v5e", "v5e has chips along 2 axes, such as v5e:16x16"),
    ("v5e:2x4x4", "chips along 2 axes"),
    ("v5p:4x4", "v5p has chips along 3 axes, such as v5p:4x4x8"),
    ("v5e:0x4", "chips along 2 axes"),
  ],
)
def test_slices_that_cannot_be(name, message):
  with pytest.raises(errors.InputError, match=message):
    chips.parse(name)
