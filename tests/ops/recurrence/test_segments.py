"""Numbering of documents along packed rows, by hand."""

import jax.numpy as jnp
import numpy as np
import pytest

from effjax.ops.recurrence import segments


@pytest.mark.parametrize(
  ("row", "wanted"),
  [
    ([1, 1, 2, 2, 3, 3], [0, 0, 1, 1, 2, 2]),
    ([7, 7, 7, 4, 4, 7], [0, 0, 0, 1, 1, 2]),  # an id that comes back is new
    ([1, 1, 0, 0, 1, 2], [0, 0, 0, 0, 0, 1]),  # padding belongs to what precedes
    ([0, 0, 5, 5, 6, 0], [0, 0, 0, 0, 1, 1]),  # or to the first document
    ([0, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0]),
    ([3, 0, 2, 0, 0, 3], [0, 0, 1, 1, 1, 2]),
  ],
)
def test_documents(row, wanted):
  got = segments.documents(jnp.asarray([row, [1] * 6], jnp.int32))
  np.testing.assert_array_equal(got, [wanted, [0] * 6])
