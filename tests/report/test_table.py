import dataclasses
import io
import re

import pytest

from effjax.report import notes, terminal
from effjax.report import table as table_lib


def _cells(content, result, key):
  place = [column.key for column in content.columns].index(key)
  names = [row["stage"] for row in result.stages]
  return {name: row[place] for name, row in zip(names, content.rows, strict=True)}


@pytest.fixture(scope="module")
def content(result):
  return table_lib.build([result])


def test_slower_than_the_parent_is_said(content, result):
  cells = _cells(content, result, "p50")
  assert cells["train"].parent == notes.Note()
  assert cells["int4"].parent == notes.Note(text="2.53x slower", tone="worse")
  assert cells["int8-dynamic"].parent.text == "1.43x faster"
  # 6.11 ms after 2.75 ms of the pruned parent, 2.31 ms of the first stage.
  assert cells["pruned-int4"].parent.text == "2.22x slower"
  assert cells["pruned-int4"].first.text == "2.65x slower"


def test_timings_within_five_percent_are_not_compared(content, result):
  cells = _cells(content, result, "prefill")
  assert cells["int8"].text == "14.9"
  assert cells["int8"].parent == notes.Note()


def test_a_mask_makes_the_model_larger_and_says_so(content, result):
  assert _cells(content, result, "held")["pruned"].parent == notes.Note(
    text="1.03x larger", tone="worse"
  )
  assert _cells(content, result, "simulated")["pruned"].text == "bytes, flops"
  assert _cells(content, result, "executed")["pruned"].parent.text == ""


def test_difference_in_quality_has_a_sign_and_a_tone(content, result):
  cells = _cells(content, result, "delta")
  assert (cells["train"].text, cells["train"].value) == (table_lib.MISSING, None)
  assert (cells["int4"].text, cells["int4"].parent.tone) == ("+0.0515", "worse")
  assert cells["pruned-tuned"].text == "-0.1671"
  assert cells["pruned-tuned"].parent.tone == "better"
  assert cells["pruned-tuned"].first.text == "+0.0428"
  assert cells["int4"].value == pytest.approx(0.0515)


def test_what_is_not_known_is_left_out_or_marked(result):
  quality = dict.fromkeys(("loss", "perplexity", "bits_per_byte"))
  broken = {
    **result.stages[1],
    "quality": {**result.stages[1]["quality"], **quality},
    "peak_memory_bytes": None,
  }
  rows = [row | {"decode_ms_p90": None} for row in (result.stages[0], broken)]
  changed = dataclasses.replace(result, stages=tuple(rows))
  content = table_lib.build([changed])
  assert _cells(content, changed, "bpb")["int8"].text == "not finite"
  assert _cells(content, changed, "peak")["int8"].text == table_lib.MISSING
  keys = [column.key for column in content.columns]
  assert "p90" not in keys and "accuracy" not in keys


def test_runs_get_a_column_of_their_own(result):
  other = dataclasses.replace(result, name="other")
  content = table_lib.build([result, other])
  assert [row[0].text for row in content.rows] == ["quickstart"] * 8 + ["other"] * 8


class _Terminal(io.StringIO):
  def isatty(self):
    return True


def test_piped_output_is_plain_and_whole(content):
  out = io.StringIO()
  terminal.show(content, out)
  lines = out.getvalue().splitlines()
  assert len(lines) == 9
  assert "\x1b" not in out.getvalue()
  for column in content.columns:
    assert column.title in lines[0]
  # Aligned: the last letter of a numeric column stands below its title's.
  end = lines[0].index("bits/byte") + len("bits/byte")
  assert all(line[end - 6 : end].strip()[1] == "." for line in lines[1:])


@pytest.mark.parametrize("width", [60, 100, 400])
def test_a_terminal_gets_what_fits(content, monkeypatch, width):
  monkeypatch.setenv("COLUMNS", str(width))
  out = _Terminal()
  terminal.show(content, out)
  lines = re.sub(r"\x1b\[[\d;]*m", "", out.getvalue()).splitlines()
  table = lines[: len(content.rows) + 4]
  assert max(map(len, table)) <= width
  for row in content.rows:
    assert any(row[0].text in line for line in table)
  assert ("not shown" in out.getvalue()) == (width < 400)
  assert "…" not in out.getvalue()


def test_accuracies_differ_in_points():
  assert notes.points(0.79, 0.8) == notes.Note(text="-1.00 points", tone="worse")
  assert notes.points(0.81, 0.8) == notes.Note(text="+1.00 points", tone="better")
  assert notes.points(0.8, 0.8) == notes.Note(text="+0.00 points")
