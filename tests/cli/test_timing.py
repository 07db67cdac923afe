"""What a benchmark prints and draws."""

import matplotlib.image
import numpy as np
import pytest

from effjax.cli import main, timing

ROWS = [
  {"mixer": name, "tokens": length, "ms": ms, "temp_mb": 2.0}
  for name, length, ms in (("a", 256, 0.5), ("a", 512, 2345.6), ("b", 256, None))
]
TABLE = timing.Table(title="by length", rows=ROWS, notes=["one note"])


def test_markdown_shows_numbers_and_what_is_missing():
  lines = TABLE.markdown().splitlines()
  cells = [[c.strip() for c in line.split("|")[1:-1]] for line in lines if "|" in line]
  assert cells[0] == ["mixer", "tokens", "ms", "temp_mb"]
  assert [row[2] for row in cells[2:]] == ["0.5", "2,346", "–"]
  assert lines[0] == "by length" and lines[-1] == "- one note"


def test_curves_are_drawn(tmp_path):
  path = tmp_path / "curves.png"
  curves = timing.Curves(x="tokens", ys=("ms", "temp_mb"), by="mixer")
  TABLE.draw(curves, path)
  image = matplotlib.image.imread(path)
  assert image.shape[1] > image.shape[0] > 300
  colors = np.unique((image[..., :3] * 255).astype(int).reshape(-1, 3), axis=0)
  assert len(colors) > 50  # lines and letters, not an empty sheet


@pytest.mark.parametrize(
  ("suite", "plot", "message"),
  [("loop", "x.png", "no curves"), ("mixers", "no/such/x.png", "does not exist")],
)
def test_a_plot_that_cannot_be_is_refused_first(suite, plot, message, capsys):
  assert main.main(["bench", suite, "--plot", plot]) == 2
  err = capsys.readouterr().err
  assert message in err and err.count("\n") == 1
