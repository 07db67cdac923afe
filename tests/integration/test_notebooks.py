"""Every notebook runs on a real run, and equals the script it is paired with."""

import pathlib

import jupytext
import nbclient
import nbformat
import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
SCRIPTS = sorted((ROOT / "notebooks").glob("*.py"))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_notebook_is_its_script(script):
  notebook = nbformat.read(script.with_suffix(".ipynb"), as_version=4)
  expected = jupytext.read(script)
  cells = lambda book: [(cell.cell_type, cell.source) for cell in book.cells]
  assert cells(notebook) == cells(expected), "run: jupytext --to ipynb notebooks/*.py"


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_notebook_runs(script, command, finished, monkeypatch, subprocess_env):
  for name, value in subprocess_env.items():
    monkeypatch.setenv(name, value)
  # The tests plot without a screen; a notebook shows its figures.
  monkeypatch.setenv("MPLBACKEND", "module://matplotlib_inline.backend_inline")
  monkeypatch.setenv("EFFJAX_RUN", str(finished))
  monkeypatch.setenv("EFFJAX_CACHE", str(command.folder / "cache"))
  book = jupytext.read(script)
  client = nbclient.NotebookClient(
    book, timeout=300, kernel_name="python3", resources={"metadata": {"path": ROOT}}
  )
  client.execute()
  outputs = [out for cell in book.cells for out in cell.get("outputs", [])]
  assert any("image/png" in out.get("data", {}) for out in outputs)
  assert any("def main(" in out.get("text", "") for out in outputs)
