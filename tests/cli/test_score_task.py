"""The verb `score` asks a task: what it prints, and what it refuses."""

import json
import pathlib
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.cli import main
from effjax.data import fetch, symbols, tokenizers
from effjax.data.tasks import base
from effjax.measure import config as measure_config
from effjax.models import config as config_lib
from effjax.models import decoder, encoder, encoder_config
from effjax.recipe import api, tasks

EXAMPLES = [("up, up", 1), ("down", 0), ("up and away", 1), ("down, up", 1)]
TASK = base.Task(
  name="directions",
  artefact=fetch.Artefact(
    client="npm", package="p", version="1", file_name="p.tgz", sha256="0" * 64
  ),
  origin="made for this test",
  licence="none needed",
  split="all",
  template="Text: {text}\nDirection:",
  answers=("down", "up"),
  read=lambda path: (base.Example(*example) for example in EXAMPLES),
)


class Model(decoder.Decoder):
  """A model that always finds the byte `u` a thousand times as likely as any other."""

  def apply(self, variables, tokens_BL, segments):
    bias_V = variables["params"]["bias"]
    return jnp.broadcast_to(bias_V, (*tokens_BL.shape, len(bias_V))), None


@pytest.fixture
def run(monkeypatch):
  """A run of that model, and a registry of one task whose archive is not read."""
  tokenizer = tokenizers.byte_tokenizer()
  model_config = config_lib.DecoderConfig(
    vocab_size=tokenizer.vocab_size, embed_dim=8, num_layers=1, max_len=256
  )
  bias_V = np.zeros(tokenizer.vocab_size, np.float32)
  bias_V[1 + ord("u")] = np.log(1000)
  measure = measure_config.MeasureConfig(eval_batch_size=2)
  run = object.__new__(api.Run)  # without what is not looked at here
  vars(run).update(
    model=Model(model_config),
    params={"bias": jnp.asarray(bias_V)},
    tokenizer=tokenizer,
    stage="int8",
    config=types.SimpleNamespace(measure=measure),
  )
  monkeypatch.setattr(api, "load", lambda workdir, stage: run)
  monkeypatch.setattr(base, "find", lambda name: TASK)
  monkeypatch.setattr(fetch, "fetch", lambda *args: pathlib.Path())
  return run


def _out(capsys, *argv):
  assert main.main(["score", "--workdir", "w", *argv]) == 0, capsys.readouterr().err
  return capsys.readouterr().out


def _fails(capsys, *argv):
  assert main.main(["score", "--workdir", "w", *argv]) == 2
  out, err = capsys.readouterr()
  assert out == "" and len(err.splitlines()) == 1, err
  return err


# Of four examples three are "up", and the model says "up" to all.
_FOUND = {
  "stage": "int8",
  "task": "directions",
  "answered_by": "log-likelihood",
  "accuracy": 0.75,
  "stderr": pytest.approx((0.75 * 0.25 / 4) ** 0.5),
  "accuracy_norm": 0.75,
  "majority": 0.75,
  "num_examples": 4,
  "recall": {"down": 0.0, "up": 1.0},
  "class_counts": {"down": 1, "up": 3},
  "all_examples": 4,
  "all_majority": 0.75,
}


def test_json(run, capsys):
  found = json.loads(_out(capsys, "--task", "directions", "--json"))
  about = found.pop("about")
  assert found == _FOUND
  assert about["template"] == TASK.template
  assert about["sha256"] == "0" * 64


def test_table(run, capsys):
  assert _out(capsys, "--task", "directions").splitlines() == [
    "stage          int8",
    "task           directions",
    "answered_by    log-likelihood",
    "accuracy       0.75",
    "stderr         0.216506",
    "majority       0.75",
    "num_examples   4",
    "recall         down 0, up 1",
    "accuracy_norm  0.75",
    "class_counts   down 1, up 3",
    "all_examples   4",
    "all_majority   0.75",
  ]


def test_limit(run, capsys):
  argv = ["--task", "directions", "--limit", "2", "--json"]
  found = json.loads(_out(capsys, *argv))
  assert found["num_examples"] == 2 and found["all_examples"] == 4
  examples = TASK.examples(2)
  assert found["class_counts"] == TASK.counts(examples)
  assert found["accuracy"] == sum(e.label for e in examples) / 2
  assert "limit 0 must be positive" in _fails(capsys, *argv[:3], "0")


def test_manual_dir_reaches_the_archive(run, monkeypatch, capsys):
  asked = []
  monkeypatch.setattr(
    fetch, "fetch", lambda *args: asked.append(args) or pathlib.Path()
  )
  _out(capsys, "--task", "directions", "--manual-dir", "there")
  assert asked == [(TASK.artefact, "directions", "there", "task")]


def test_python_gives_the_same(run):
  found = tasks.score_task(run, "directions")
  assert found.pop("about") == TASK.record
  assert found == {k: v for k, v in _FOUND.items() if k != "stage"}


@pytest.mark.parametrize(
  ("argv", "message"),
  [
    (["--task", "x", "--context", "4"], "--context goes with --file, not with --task"),
    (["--task", "x", "--stride", "4"], "--stride goes with --file, not with --task"),
    (["--tokens", "x", "--context", "4"], "--file, not with --tokens"),
    (["--tokens", "x", "--stride", "4"], "--file, not with --tokens"),
    (["--task", "x", "--logits", "l.npy"], "--file or --tokens, not with --task"),
    (["--file", "x", "--limit", "4"], "--limit goes with --task, not with --file"),
    (["--file", "x", "--manual-dir", "y"], "--manual-dir goes with --task"),
    (["--file", "x", "--task", "y"], "not allowed with"),
    ([], "one of the arguments --file --tokens --task is required"),
  ],
)
def test_options_that_do_not_belong_together(capsys, argv, message):
  assert message in _fails(capsys, *argv)


def test_a_run_that_cannot_be_asked(run, capsys):
  argv = ["--task", "directions"]
  tokenizer, vars(run)["tokenizer"] = run.tokenizer, None
  assert "without a tokenizer of text a model cannot read a task" in _fails(
    capsys, *argv
  )
  vars(run)["tokenizer"] = symbols.Symbols([symbols.START, "a"])
  assert "without a tokenizer of text a model cannot read a task" in _fails(
    capsys, *argv
  )
  vars(run)["tokenizer"] = tokenizer
  options = {"attention": {"num_heads": 2, "head_dim": 8}}
  config = encoder_config.EncoderConfig(
    vocab_size=257, embed_dim=16, num_layers=1, mixer_options=options, max_len=16
  )
  model = encoder.Encoder(config)
  vars(run)["model"] = model
  vars(run)["params"] = model.init(jax.random.key(0), *model.example_inputs())["params"]
  assert "4 texts are too few for a probe" in _fails(capsys, *argv)


def test_an_unknown_task_is_noticed_before_anything_is_loaded(capsys):
  assert "did you mean 'movie_sentences'?" in _fails(capsys, "--task", "movie_sentence")


def test_tasks_are_listed(capsys):
  assert main.main(["list", "tasks", "--json"]) == 0
  found = json.loads(capsys.readouterr().out)
  assert found.keys() == {"movie_sentences", "r8", "spam"}
  assert found["spam"].startswith("Whether an e-mail is spam")
