import dataclasses
import json
import re
from html import parser

import matplotlib.image
import pytest

from effjax.core import errors
from effjax.report import compare, folder, markdown, method, plots, summary
from effjax.report import html as html_page
from effjax.report import result as result_lib

HOSTILE = "a</script><script>alert(1)</script>|b&\"'"


class _Page(parser.HTMLParser):
  """Collects what a browser would show, run and fetch."""

  def __init__(self, text):
    super().__init__()
    self.fetched, self.scripts, self.cells, self._open = [], [], [], []
    self.feed(text)

  def handle_starttag(self, tag, attrs):
    self._open.append(tag)
    attrs = dict(attrs)
    self.fetched += [attrs[k] for k in ("src", "href", "action") if k in attrs]
    if tag in ("td", "th"):
      self.cells.append("")
    if tag == "script":
      self.scripts.append("")

  def handle_endtag(self, tag):
    while self._open and self._open.pop() != tag:
      pass

  def handle_data(self, data):
    if self._open and self._open[-1] == "script":
      self.scripts[-1] += data
    elif "td" in self._open or "th" in self._open:
      self.cells[-1] += data


def test_a_run_leaves_all_four_files(run_folder):
  for name in ("report.md", "report.html", "pareto.png", "result.json"):
    assert (run_folder / name).stat().st_size > 1000
  assert not list(run_folder.glob(".*"))


def test_the_page_asks_nothing_of_a_network(run_folder):
  text = (run_folder / "report.html").read_text()
  page = _Page(text)
  assert page.fetched == ["data:,"]
  # The one address is the name of the SVG namespace.
  assert set(re.findall(r"\w+://[^\s\"')]+", text)) == {"http://www.w3.org/2000/svg"}
  assert not re.search(r"@import|url\(|fetch\(|XMLHttpRequest|import\(", text)


def test_the_page_holds_every_row_and_reference(run_folder, result, example):
  page = _Page((run_folder / "report.html").read_text())
  data = json.loads(page.scripts[0])
  assert [row["name"] for row in data["rows"]] == [r["stage"] for r in result.stages]
  assert [row["values"]["bpb"] for row in data["rows"]] == [
    r["quality"]["bits_per_byte"] for r in example.rows()
  ]
  assert [line["bits"] for line in data["references"]] == [
    line["bits_per_byte"] for line in example.REFERENCES
  ]
  losses = [c for c in data["curves"] if c["metric"] == "loss"]
  assert [c["name"] for c in losses] == ["train", "pruned-tuned"]
  assert losses[0]["points"][-1][0] == 1800
  cells = [cell.strip() for cell in page.cells]
  for row in result.stages:
    assert row["stage"] in cells
    assert f"{row['quality']['bits_per_byte']:.4f}" in cells
  assert "5.842.53x slower" in cells


def test_names_cannot_break_out_of_the_page(result):
  row = result.stages[0] | {"stage": HOSTILE, "device": HOSTILE, "corpus": HOSTILE}
  line = {"name": HOSTILE, "bits_per_byte": 2.0}
  config = {"stages": [{"name": HOSTILE, "options": {HOSTILE: HOSTILE}}]}
  hostile = dataclasses.replace(
    result, name=HOSTILE, stages=(row,), references=(line,), config=config
  )
  page = _Page(html_page.render([hostile]))
  assert len(page.scripts) == 2
  assert json.loads(page.scripts[0])["rows"][0]["name"] == HOSTILE
  assert HOSTILE in page.cells
  lines = markdown.render([hostile]).splitlines()
  header = next(i for i, text in enumerate(lines) if text.startswith("| stage"))
  columns = len(re.findall(r"(?<!\\)\|", lines[header]))
  assert len(re.findall(r"(?<!\\)\|", lines[header + 2])) == columns


def test_long_curves_are_thinned_out_to_their_last_point(result):
  metrics = tuple(
    {"stage": "train", "step": i, "loss": 1.0 / i, "grad_norm": "nan"}
    for i in range(1, 4002)
  )
  (curve,) = html_page._curves(dataclasses.replace(result, metrics=metrics), False)
  assert len(curve["points"]) <= 501
  assert curve["points"][0][0] == 1 and curve["points"][-1][0] == 4001


def test_markdown_has_a_row_for_each_stage_and_says_how(run_folder, result):
  text = (run_folder / "report.md").read_text()
  rows = [line for line in text.splitlines() if line.startswith("| ")]
  assert sum(line.count("(after ") for line in rows) == 7
  assert "| 5.84 (2.53x slower) |" in text
  assert "8.98 (1.03x larger)" in text
  assert "stdlib sha256:8f1d0c5a77e2" in text
  for term, explanation in method.definitions([result]):
    assert term in text and explanation in text
  assert "200,000 UTF-8 bytes" in text and "at most 256 tokens" in text
  assert "after 8 of warm-up" in text


def test_summary_names_the_losses(result):
  facts = {fact.label: fact for fact in summary.facts([result])}
  assert facts["Slowest decoding"].detail.startswith("pruned-int4: 2.65x slower")
  assert "+1.631 bits/byte" in facts["Smallest"].detail
  compressors = facts["Against compressors"]
  assert compressors.value == "1 of 4 beaten"
  assert "xz -9e (1.720)" in compressors.detail and compressors.detail.endswith("win")


def test_answers_are_explained_and_headed(result):
  quality = {"accuracy": 0.125, "num_tokens": 64, "bits_per_byte": None}
  rows = [
    row | {"quality": quality | {"accuracy": 0.125 * i}}
    for i, row in enumerate(result.stages[:3])
  ]
  answered = dataclasses.replace(result, stages=tuple(rows))
  facts = {fact.label: fact for fact in summary.facts([answered])}
  assert facts["Best accuracy"].value == "25.0 %"
  assert facts["Best accuracy"].detail == rows[2]["stage"]
  assert "Best quality" not in facts
  assert "64 scored targets" in dict(method.definitions([answered]))["accuracy"]
  assert "accuracy" not in dict(method.definitions([result]))


def test_plot_is_drawn_without_an_outlier_setting_its_scale(run_folder):
  pixels = matplotlib.image.imread(run_folder / "pareto.png")
  assert pixels.shape[:2] == (780, 1320)
  ink = (pixels[:, :, :3].min(axis=2) < 0.9).mean()
  assert 0.01 < ink < 0.3


def test_rows_without_quality_give_no_plot(result, tmp_path):
  quality = dict.fromkeys(("loss", "perplexity", "bits_per_byte"), None)
  row = result.stages[0] | {"quality": result.stages[0]["quality"] | quality}
  broken = dataclasses.replace(result, stages=(row,))
  assert not plots.save_pareto(tmp_path / "none.png", [broken])
  written = folder.render([broken], tmp_path)
  assert [path.name for path in written] == ["report.md", "report.html"]


def test_result_is_written_last_and_only_when_all_is_well(
  example, tmp_path, monkeypatch
):
  with pytest.raises(errors.InputError, match="num_params"):
    folder.write(tmp_path, [example.rows()[0] | {"num_params": None}])
  assert not list(tmp_path.iterdir())

  def full(results):
    raise OSError(28, "No space left on device")

  monkeypatch.setattr(folder.html, "render", full)
  with pytest.raises(OSError, match="No space left"):
    folder.write(tmp_path, example.rows())
  assert {path.name for path in tmp_path.iterdir()} == {"pareto.png"}


def test_runs_of_one_name_are_told_apart(run_folder, example, tmp_path):
  other = tmp_path / "other" / "quickstart"
  folder.write(other, example.rows()[:2], example.REFERENCES)
  results = compare.read([run_folder, other])
  assert [r.name.split("/")[-1] for r in results] == ["quickstart"] * 2
  assert results[1].name == "other/quickstart"
  names = [path.name for path in folder.render(results, tmp_path / "both")]
  assert names == ["pareto.png", "report.md", "report.html"]
  data = json.loads(_Page((tmp_path / "both/report.html").read_text()).scripts[0])
  assert len(data["rows"]) == 10 and len(data["references"]) == 4
  assert data["rows"][-1]["name"] == "other/quickstart/int8"


def test_reference_lines_on_other_text_name_their_run(result):
  line = {"name": "gzip -9", "bits_per_byte": 2.5}
  other = dataclasses.replace(result, name="other", references=(line,))
  found = markdown.references([result, other])
  assert ("gzip -9 (quickstart)", 1.9302) in found
  assert ("gzip -9 (other)", 2.5) in found


def test_comparing_needs_different_runs(run_folder):
  with pytest.raises(errors.InputError, match="given twice"):
    compare.read([run_folder, run_folder])
  with pytest.raises(errors.InputError, match="no run folder given"):
    compare.read([])
  assert isinstance(compare.read([run_folder])[0], result_lib.Result)
