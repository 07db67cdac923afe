"""`bench sparse`: every way of holding a pruned weight, and what it holds."""

import pytest

from effjax.cli.benches import sparse


def test_bytes_are_those_of_each_way():
  table, smaller = sparse.bench(quick=True)
  assert {row["rows"] for row in table.rows} == set(sparse.TOKENS)
  first = {row["held"]: row for row in table.rows if row["rows"] == 1}
  bytes_of = {name: row["bytes"] for name, row in first.items()}
  assert bytes_of["dense"] == 1
  assert bytes_of["masked 50 %"] == 1 + 1 / 32  # a bit each
  assert bytes_of["bitmap 50 %"] == 0.5 + 1 / 32
  # A kept weight has a column of one byte, a row the number at its end in two.
  kept = -(-256 * 256 * 3 // 100 // 8) * 8 / 256**2
  assert bytes_of["csr 97 %"] == pytest.approx(kept * (1 + 1 / 4) + 1 / 512, abs=1e-4)
  assert first["csr 97 %"]["simulated"] == "flops"
  assert bytes_of["2:4"] == 0.5 + 0.5 * 2 / 32  # two bits for each that stays
  # A block of 256 weights has the number of its row.
  assert bytes_of["blocks of 16x16 75 %"] == pytest.approx(0.25 * (1 + 1 / 256))
  assert first["blocks of 16x16 75 %"]["nonzero"] == "25.0%"
  assert first["2:4"]["simulated"] == "flops"
  assert first["blocks of 16x16 50 %"]["simulated"] is None
  assert all(row["us"] > 0 for row in table.rows)
  for row in smaller.rows:
    share = float(row["gone"].rstrip("%")) / 100
    if row["groups"] == "neurons":
      # A fixed mixer of one head and the norms stand beside the neurons.
      own, rest = 3 * 32 * 128, 4 * 32 * 64 + 2 * 32
      assert row["bytes"] == pytest.approx((rest + (1 - share) * own) / (rest + own))
    assert row["us"] > 0
