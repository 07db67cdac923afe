"""Groups of runs: means and deviations, and what is no number stays as it is."""

import dataclasses

import pytest

from effjax.core import errors
from effjax.report import groups, markdown, plots, table


def _changed(result, name, bits, secs):
  """The example's run under another name, its first row with other numbers."""
  first, *rest = result.stages
  quality = first["quality"] | {"bits_per_byte": bits}
  row = {**first, "quality": quality, "stage_secs": secs}
  return dataclasses.replace(result, name=name, stages=(row, *rest))


@pytest.fixture
def made(result):
  """Three runs in two groups."""
  runs = [
    _changed(result, name, bits, secs)
    for name, bits, secs in (("a", 2.0, 10.0), ("b", 3.0, None), ("c", 2.5, 20.0))
  ]
  fields = [{"model.width": "8"}, {"model.width": "16"}, {"model.width": "8"}]
  return groups.make(runs, fields)


def test_numbers_are_means_with_sample_deviations(made):
  narrow, wide = made
  assert [len(group.runs) for group in made] == [2, 1]
  assert narrow.name == "width=8"
  assert narrow.stages[0]["quality"]["bits_per_byte"] == 2.25
  assert narrow.stages[0]["stage_secs"] == 15.0
  assert narrow.stages[0]["technique"] == "train"
  assert wide.stages[0]["stage_secs"] is None
  stage = narrow.stages[0]["stage"]
  bits = lambda row: row["quality"]["bits_per_byte"]
  # Half the difference, times the square root of 2.
  assert groups.deviation(narrow, stage, bits) == pytest.approx(0.25 * 2**0.5)
  assert groups.deviation(wide, stage, bits) is None


def test_the_table_shows_fields_runs_and_spread(made):
  content = table.build(made)
  titles = [column.title for column in content.columns]
  assert titles[:3] == ["width", "runs", "stage"]
  bits = titles.index("bits/byte")
  first, other = content.rows[0], content.rows[len(made[0].stages)]
  assert [cell.text for cell in first[:2]] == ["8", "2"]
  assert first[bits].text == "2.2500 ± 0.3536"
  assert [cell.text for cell in other[:2]] == ["16", "1"]
  assert other[bits].text == "3.0000"
  # What no run changes has no spread.
  held = titles.index("MB held")
  assert "±" not in first[held].text


def test_pages_and_plots_take_groups(made, tmp_path):
  text = markdown.render(made)
  assert "| 8 | 2 | " in text
  assert "sample standard deviation" in text
  assert plots.save_pareto(tmp_path / "pareto.png", made)


def test_fields_are_looked_up_in_configs():
  config = {"model": {"width": 8, "pattern": ["a"]}, "stages": [{"name": "x"}]}
  assert groups.value(config, "model.width") == "8"
  assert groups.value(config, "stages[0].name") == "x"
  assert groups.value(config, "model.pattern") == "['a']"
  with pytest.raises(errors.InputError, match="did you mean 'width'"):
    groups.value(config, "model.widht")
  with pytest.raises(errors.InputError, match=r"step '3' of --by 'stages\[3\].name'"):
    groups.value(config, "stages[3].name")
