"""A sentence encoder through a recipe: imported, quantized, measured, asked."""

import json
import pathlib

import jax
import numpy as np
import pytest

import effjax
from effjax.cli import main
from effjax.core import specs as specs_lib
from effjax.data import fetch, pretrained_tokenizer
from effjax.data.tasks import base
from effjax.interop.hf import folder
from effjax.models import encoder, encoder_config
from tests.data import families

# Whether a sentence is about a fox can be read off its words.
EXAMPLES = [
  (f"{subject} number {i} jumps over {thing}", int(subject == "fox"))
  for i in range(30)
  for subject in ("fox", "dog")
  for thing in ("one", "café")
]
TASK = base.Task(
  name="animals",
  artefact=fetch.Artefact(
    client="npm", package="p", version="1", file_name="p.tgz", sha256="0" * 64
  ),
  origin="made for this test",
  licence="none needed",
  split="all",
  template="Text: {text}\nAnimal:",
  answers=("dog", "fox"),
  read=lambda path: (base.Example(*example) for example in EXAMPLES),
)
_RECIPE = '''"""Imports an encoder and quantizes it."""
import ml_collections


def get_config(arg=""):
  c = ml_collections.ConfigDict()
  c.data = {
    "corpus": "text_files",
    "options": {"paths": (TEXTS,)},
    "tokenizer": "model",
    "sequence_length": 32,
    "batch_size": 4,
  }
  c.measure = {"task": "animals", "prompt_tokens": 16, "prefill_repeats": 1}
  c.stages = (
    {"name": "original", "technique": "import", "options": {"source": "bert"}},
    {"name": "int8", "technique": "rtn", "options": {"activations": "int8"}},
    {"name": "svd", "technique": "svd", "after": "original"},
  )
  return c
'''


@pytest.fixture(scope="module")
def here(tmp_path_factory, command):
  """A folder with an encoder, its tokenizer and the recipe, and the task's registry."""
  place = tmp_path_factory.mktemp("encoder")
  cfg = encoder_config.EncoderConfig(
    vocab_size=300,
    embed_dim=16,
    num_layers=2,
    mixer_options={"attention": {"num_heads": 2, "head_dim": 8}},
    pooling="mean",
    max_len=32,
  )
  model = encoder.Encoder(cfg)
  params = model.init(jax.random.key(0), *model.example_inputs())["params"]
  _, facts = families.FAMILIES["word_piece"]
  tokenizer = pretrained_tokenizer.Pretrained(
    json.loads(families.word_piece()), **facts
  )
  folder.save(place / "bert", model, params, specs_lib.specs(model), tokenizer)
  texts = repr(str(command.folder / "texts"))
  (place / "recipe.py").write_text(_RECIPE.replace("TEXTS", texts))
  with pytest.MonkeyPatch.context() as patch:
    patch.chdir(place)
    patch.setenv("EFFJAX_CACHE", str(command.folder / "cache"))
    patch.setattr(base, "find", lambda name: TASK)
    patch.setattr(base, "names", lambda: ("animals",))
    patch.setattr(fetch, "fetch", lambda *args: pathlib.Path())
    assert main.main(["run", "--config", "recipe.py", "--workdir", "run"]) == 0
    yield place


def _run(capsys, *argv):
  code = main.main(list(argv))
  return code, *capsys.readouterr()


def test_every_stage_is_measured_by_the_probe(here):
  rows = json.loads((here / "run" / "result.json").read_text())["stages"]
  assert [row["stage"] for row in rows] == ["original", "int8", "svd"]
  for row in rows:
    quality = row["quality"]
    assert (quality["task"], quality["answered_by"]) == ("animals", "linear probe")
    assert quality["accuracy"] > quality["majority"]
    assert "loss" not in quality
    assert row["prefill_ms"] > 0
    assert row["decode_ms_p50"] is row["tokens_per_sec"] is None
    assert row["corpus"] == "animals 000000000000"
  assert rows[1]["bytes_held"] < 0.8 * rows[0]["bytes_held"]


def test_the_report_is_about_answers_alone(here):
  text = (here / "run" / "report.md").read_text()
  assert "right: logistic regression on the model's embeddings" in text
  assert "animals" in text
  assert "bits/byte" not in text
  assert "reading" in text
  assert "decoding" not in text.split("## How each number")[0]


def test_what_was_imported_and_asked_is_on_record(here):
  env = json.loads((here / "run" / "env.json").read_text())
  assert env["task"]["licence"] == TASK.licence
  assert (env["format"], env["config"]["model_type"]) == ("hf", "bert")


def test_the_same_command_again_finds_everything_done(here, capsys):
  argv = ["run", "--config", "recipe.py", "--workdir", "run"]
  code, _, err = _run(capsys, *argv)
  assert code == 0
  assert "[3/3] svd: done before" in err


def test_python_measures_and_embeds_the_same(here):
  run = effjax.load("run", "int8")
  assert effjax.evaluate(run) == run.row["quality"]
  row = effjax.measure(run)
  assert row["quality"] == run.row["quality"]
  assert row["bytes_held"] == run.row["bytes_held"]
  found_ND = effjax.embed(run, ["fox number 1", "fox number 2", "dog, over"])
  near, far = found_ND[0] @ found_ND[1], found_ND[0] @ found_ND[2]
  assert near > far
  original = effjax.load("run", "original")
  other_ND = effjax.embed(run, ["fox number 1"], params=original.params)
  assert 0 < np.abs(other_ND[0] - found_ND[0]).max() < 0.1


def test_score_asks_the_task(here, capsys):
  argv = ["score", "--workdir", "run", "--stage", "int8", "--task", "animals", "--json"]
  code, out, _ = _run(capsys, *argv)
  assert code == 0
  found = json.loads(out)
  assert found["accuracy"] == effjax.load("run", "int8").row["quality"]["accuracy"]
  assert found["num_fitted"] + found["num_examples"] == len(EXAMPLES)


def test_show_needs_no_run(here, capsys):
  code, out, err = _run(capsys, "show", "--config", "recipe.py")
  assert code == 0, err
  assert "embed" in out


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    (
      ["measure.task=None"],
      "config.measure.task is missing: an encoder gives texts no",
    ),
    (["measure.task=animal"], "did you mean 'animals'?"),
    (["measure.task_limit=0"], "task_limit=0 must be positive"),
    (["measure.prompt_tokens=64"], "64 tokens are more than model.max_len=32"),
    (
      ["stages[1].technique=train", "stages[1].options={'num_steps': 1}"],
      "'train' trains language models, and config.model is an encoder",
    ),
  ],
)
def test_bad_input_is_one_line(here, capsys, changes, message):
  argv = ["run", "--config", "recipe.py", "--workdir", "other"]
  code, out, err = _run(capsys, *argv, *(f"--config.{change}" for change in changes))
  assert (code, out) == (2, "")
  assert message in err
  assert len(err.strip().splitlines()) == 1
  assert not (here / "other").exists()
