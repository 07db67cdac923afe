"""The benchmark of quantizers, small."""

import pytest

from effjax.cli.benches import quantize


@pytest.mark.oracle
def test_errors_beside_qwix_and_products():
  pytest.importorskip("qwix")
  errors, products = quantize.bench(quick=True)
  methods = [row["method"] for row in errors.rows]
  assert methods == [cell.method for cell in quantize.QUICK]
  assert {"rtn", "awq", "smoothquant"} <= set(methods)
  for row in errors.rows:
    assert 0 < row["error"] <= row["qwix error"] * (1 + 1e-3)
    assert 2 < row["bits/weight"] < 9
  assert [row["rows"] for row in products.rows] == [1, 16, 128]
  assert all(row["int8 us"] > 0 and row["float32 us"] > 0 for row in products.rows)
  assert "qwix" in errors.markdown() and "qwix 0.1.8" in errors.notes[-1]


def test_without_qwix_its_columns_are_empty(monkeypatch):
  monkeypatch.setattr(quantize, "PEER", "a_package_that_is_not_there")
  monkeypatch.setattr(quantize, "QUICK", quantize.CELLS[:1])
  table = quantize._errors(quick=True)
  assert "left out" in table.notes[-1]
  assert table.rows[0]["a_package_that_is_not_there error"] is None
  assert table.rows[0]["error"] > 0
