import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from effjax.core import errors
from effjax.data import packing, tokens


def token_array(sizes, seed=0) -> tokens.TokenArray:
  offsets = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
  ids = np.random.default_rng(seed).integers(1, 1000, offsets[-1]).astype(np.uint16)
  ids[offsets[:-1]] = 0
  return tokens.TokenArray(ids_T=ids, offsets_D1=offsets)


def naive_epoch(array, order, length):
  """Rows of one epoch in stream order, token by token."""
  rows = []
  row = {name: [] for name in ("inputs", "targets", "weights", "segments", "positions")}
  for document in order:
    ids = array.ids_T[array.offsets_D1[document] : array.offsets_D1[document + 1]]
    segment = max(row["segments"], default=0) + 1
    position = 0
    for place, token in enumerate(ids):
      if len(row["inputs"]) == length:
        rows.append(row)
        row = {name: [] for name in row}
        segment, position = 1, 0
      last = place + 1 == len(ids)
      row["inputs"].append(int(token))
      row["targets"].append(0 if last else int(ids[place + 1]))
      row["weights"].append(0.0 if last else 1.0)
      row["segments"].append(segment)
      row["positions"].append(position)
      position += 1
  for values in row.values():
    values += [0] * (length - len(values))
  return [*rows, row]


def as_tuple(row):
  return tuple(tuple(float(x) for x in row[name]) for name in sorted(row))


@settings(deadline=None)
@given(
  st.lists(st.integers(1, 30), min_size=1, max_size=12),
  st.integers(1, 25),
  st.integers(0, 3),
)
def test_rows_equal_a_naive_loop(sizes, length, epoch):
  array = token_array(sizes)
  if sum(sizes) < length + 1:
    with pytest.raises(errors.InputError, match="use shorter sequences"):
      packing.PackedRows(array, length, seed=7)
    return
  rows = packing.PackedRows(array, length, seed=7)
  order, _, _ = rows._order(epoch)
  assert sorted(order.tolist()) == list(range(len(sizes)))
  expected = naive_epoch(array, order.tolist(), length)
  assert len(rows) == len(expected)
  got = [rows[epoch * len(rows) + i] for i in range(len(rows))]
  assert sorted(map(as_tuple, got)) == sorted(map(as_tuple, expected))


def test_shapes_and_types():
  row = packing.PackedRows(token_array([5, 9]), 4, seed=0)[0]
  dtypes = {name: value.dtype.name for name, value in row.items()}
  assert dtypes == {
    "inputs": "int32",
    "targets": "int32",
    "weights": "float32",
    "segments": "int32",
    "positions": "int32",
  }
  assert {value.shape for value in row.values()} == {(4,)}


def test_epochs_and_seeds_differ_and_repeat_exactly():
  array = token_array([7] * 40)

  def inputs(seed, epoch):
    rows = packing.PackedRows(array, 10, seed=seed)
    return np.stack([rows[epoch * len(rows) + i]["inputs"] for i in range(len(rows))])

  np.testing.assert_array_equal(inputs(1, 0), inputs(1, 0))
  assert not np.array_equal(inputs(1, 0), inputs(1, 1))
  assert not np.array_equal(inputs(1, 0), inputs(2, 0))
  assert not np.array_equal(inputs(1, 1), inputs(2, 0))


def test_order_is_the_same_in_every_release():
  """A changed order would break resuming a run and repeating a published one."""
  order, _, rows = packing.PackedRows(token_array([3] * 8), 4, seed=5)._order(2)
  assert order.tolist() == [3, 5, 2, 7, 1, 0, 6, 4]
  assert rows.tolist() == [3, 5, 1, 4, 2, 0]


def test_a_long_document_is_spread_over_the_epoch():
  rows = packing.PackedRows(token_array([1000]), 10, seed=0)
  first = [rows._order(0)[2][i] for i in range(8)]
  assert np.abs(np.diff(first)).max() > 8
