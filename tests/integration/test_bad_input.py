"""Bad input: one clear line, exit code 2, and nothing written."""

import pathlib

import numpy as np
import pytest

from effjax.cli import main


def _fails(capsys, *argv):
  """Runs the command line here; returns the one line it fails with."""
  assert main.main([str(arg) for arg in argv]) == 2
  out, err = capsys.readouterr()
  lines = [line for line in err.splitlines() if line.strip()]
  assert out == ""
  assert len(lines) == 1, err
  return lines[0]


@pytest.fixture
def place(command, tmp_workdir, monkeypatch):
  """An empty current folder; returns what a run would be started with."""
  monkeypatch.setenv("EFFJAX_CACHE", str(command.folder / "cache"))
  return ["run", "--config", str(command.config), "--workdir", "run"]


@pytest.mark.parametrize(
  ("override", "message"),
  [
    ("model.embed_dimm=32", "did you mean 'embed_dim'?"),
    ("stages[0].options.optimiser.name=x", "did you mean 'optimizer'?"),
    ("seed=one", "config.seed must be int"),
    ("model.pattern=3", "config.model.pattern must be tuple"),
    ("model.pattern=('attentoin',)", "did you mean 'attention'?"),
    ("model.pattern=('mamba22',)", "did you mean 'mamba2'?"),
    ("model.mixer_options={'attention':{'window':0}}", "window"),
    ("model.mixer_options={'attention':{'num_heads':3,'num_kv_heads':2}}", "divide"),
    ("model.mixer_options={'attention':{'position':'roper'}}", "did you mean 'rope'?"),
    ("stages[9].name=x", "the last is [4]"),
    ("stages[1].technique=rnt", "did you mean 'rtn'?"),
    ("stages[1].name=train", "stage names are unique"),
    ("stages[1].name=a/b", "letters, digits"),
    ("stages[1].after=trian", "did you mean 'train'?"),
    ("stages[1].after=int4", "not an earlier stage"),
    ("stages[1].where={'path':'nothing'}", "selects no parameter"),
    ("stages[1].where={'path':'('}", "not a regular expression"),
    ("stages[2].options.sparsity=1.5", "sparsity=1.5"),
    ("stages[4].options.group=48", "group 48 does not divide"),
    ("stages[4].options.bits=9", "bits=9"),
    ("stages[4].technique=magnitude", "unknown field"),
    ("data.sequence_length=97", "more than model.max_len=96"),
    ("measure.prompt_tokens=100", "more than model.max_len=96"),
    ("model.vocab_size=100", "smaller than the 257"),
    ("data.corpus=stdlibb", "did you mean 'stdlib'?"),
    ("data.options={'paths':('/not/here.txt',)}", "/not/here.txt"),
    ("mesh.preset=fspd", "did you mean 'fsdp'?"),
    ("mesh.shape.data=16", "takes 16 devices"),
  ],
)
def test_config_mistakes(place, capsys, override, message):
  line = _fails(capsys, *place, f"--config.{override}")
  assert message in line
  assert list(pathlib.Path().iterdir()) == []


def test_missing_config_and_unknown_flag(place, capsys):
  assert "does not exist" in _fails(capsys, "run", "--config", "nowhere.py")
  assert "did you mean '--fresh'?" in _fails(capsys, *place, "--frseh")
  assert "stray argument" in _fails(capsys, *place, "fast")
  assert list(pathlib.Path().iterdir()) == []


def _corpus(path):
  return f"--config.data.options={{'paths': ('{path}',)}}"


def test_bad_texts(place, capsys):
  texts = pathlib.Path("texts")
  texts.mkdir()
  (texts / "a.txt").write_bytes(b"")
  assert "empty" in _fails(capsys, *place, _corpus(texts))
  (texts / "a.txt").write_bytes(b"good\xffbad")
  line = _fails(capsys, *place, _corpus(texts))
  assert "not UTF-8" in line
  assert "offset 4" in line
  (texts / "a.txt").write_bytes(b"short\n" * 3)
  assert "short" in _fails(capsys, *place, _corpus(texts))
  assert list(pathlib.Path().iterdir()) == [texts]


def test_folder_of_another_config(command, finished, place, capsys):
  before = sorted(p.name for p in finished.rglob("*"))
  argv = [*place[:-1], finished, "--config.seed=1", "--config.stages[4].options.bits=3"]
  line = _fails(capsys, *argv)
  assert "config.seed: 0 -> 1" in line
  assert "config.stages[4].options.bits: 4 -> 3" in line
  assert sorted(p.name for p in finished.rglob("*")) == before


@pytest.mark.parametrize("flags", [[], ["--fresh"]])
def test_folder_of_something_else(place, capsys, flags):
  pathlib.Path("run").mkdir()
  pathlib.Path("run/thesis.tex").write_text("mine")
  assert "not a run folder" in _fails(capsys, *place, *flags)
  assert pathlib.Path("run/thesis.tex").read_text() == "mine"
  assert [p.name for p in pathlib.Path("run").iterdir()] == ["thesis.tex"]


def test_generate(finished, place, capsys):
  generate = ["generate", "--workdir", finished, "--prompt"]
  assert "trained for" in _fails(capsys, *generate, "x" * 90)
  assert "trained for" in _fails(capsys, *generate, "x", "--max-tokens", 96)
  assert "top_p" in _fails(capsys, *generate, "x", "--top-p", 0)
  assert "temperature" in _fails(capsys, *generate, "x", "--temperature", -1)
  assert "invalid int" in _fails(capsys, *generate, "x", "--max-tokens", "many")
  line = _fails(capsys, *generate, "x", "--stage", "int88")
  assert "did you mean 'int8'?" in line
  assert "not a run folder" in _fails(
    capsys, "generate", "--workdir", ".", "--prompt", ""
  )


def test_score(finished, place, capsys):
  score = ["score", "--workdir", finished]
  pathlib.Path("latin1.txt").write_bytes("caf\u00e9".encode("latin1"))
  line = _fails(capsys, *score, "--file", "latin1.txt")
  assert "offset 3" in line
  assert "does not exist" in _fails(capsys, *score, "--file", "nowhere.txt")
  np.save("long.npy", np.ones((1, 97), np.int32))
  argv = [*score, "--tokens", "long.npy", "--logits", "out.npy"]
  assert "longer than the 96" in _fails(capsys, *argv)
  np.save("high.npy", np.full((1, 5), 257))
  assert "from 0 to 256" in _fails(capsys, *score, "--tokens", "high.npy")
  np.save("float.npy", np.ones((1, 5)))
  assert "must hold integers" in _fails(capsys, *score, "--tokens", "float.npy")
  assert "not allowed with" in _fails(capsys, *score, "--file", "a", "--tokens", "b")
  pathlib.Path("long.txt").write_text("word " * 30)
  argv = [*score, "--file", "long.txt", "--logits", "out.npy"]
  assert "longer than the 96" in _fails(capsys, *argv)
  assert not pathlib.Path("out.npy").exists()


def test_report(finished, place, capsys):
  pathlib.Path("unfinished").mkdir()
  assert "result.json" in _fails(capsys, "report", "unfinished")
  assert "twice" in _fails(capsys, "report", finished, finished)
