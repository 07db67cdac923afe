"""The verb `generate`: what it prints, and what it passes on."""

import json

import pytest

import effjax
from effjax.cli import main
from effjax.data import pretrained_tokenizer
from effjax.infer import generate
from effjax.recipe import api
from tests.data import families


@pytest.fixture
def passed(monkeypatch):
  """What reached `generate.stream`, which answers in three pieces."""
  content = json.loads(families.byte_level())
  tokenizer = pretrained_tokenizer.Pretrained(
    content, bos_id=0, eos_ids=(2,), chat_template="<|im_start|>{{ messages }}"
  )
  run = object.__new__(api.Run)  # without what is not looked at here
  vars(run).update(model="model", params={}, tokenizer=tokenizer, stage="imported")
  passed = {}

  def stream(model, params, made, prompt, **options):
    passed.update(options, prompt=prompt)
    assert (model, params, made) == ("model", {}, tokenizer)
    yield from (" an", "sw", "er")

  monkeypatch.setattr(api, "load", lambda workdir, stage: run)
  monkeypatch.setattr(generate, "stream", stream)
  passed["run"] = run
  return passed


def _out(capsys, *argv):
  assert main.main(["generate", "--workdir", "w", *argv]) == 0, capsys.readouterr().err
  return capsys.readouterr().out


def test_continuation_repeats_the_prompt(passed, capsys):
  assert _out(capsys, "--prompt", "The") == "The answer\n"
  assert (passed["chat"], passed["system"], passed["stop"]) == (False, None, ())


def test_chat_prints_the_answer_alone(passed, capsys):
  argv = ["--chat", "--system", "Be brief.", "--prompt", "Why?"]
  assert _out(capsys, *argv) == " answer\n"
  assert (passed["chat"], passed["system"]) == (True, "Be brief.")
  assert passed["prompt"] == "Why?"
  found = json.loads(_out(capsys, *argv, "--json"))
  assert found == {"stage": "imported", "prompt": "Why?", "text": " answer"}


def test_sampling_and_stop(passed, capsys):
  argv = ["--min-p", "0.1", "--repetition-penalty", "1.2", "--stop", "a", "--stop", "b"]
  _out(capsys, "--prompt", "x", *argv)
  options = passed["options"]
  assert (options.min_p, options.repetition_penalty) == (0.1, 1.2)
  assert passed["stop"] == ("a", "b")


def test_python_passes_the_same_on(passed):
  run = passed["run"]
  text = effjax.generate(
    run, "Why?", chat=True, system="Be brief.", stop="a", min_p=0.1, temperature=0
  )
  assert text == " answer"
  assert (passed["chat"], passed["system"]) == (True, "Be brief.")
  assert passed["stop"] == ("a",)
  assert passed["options"].min_p == 0.1
  effjax.generate(run, "Why?", stop=["a", "b"])
  assert (passed["chat"], passed["stop"]) == (False, ("a", "b"))


@pytest.mark.parametrize(
  ("argv", "message"),
  [
    (["--min-p", "2"], "min_p=2.0 must be in [0, 1]"),
    (["--repetition-penalty", "0"], "must be positive"),
    (["--stop"], "--stop"),
  ],
)
def test_mistakes_are_one_line(passed, capsys, argv, message):
  assert main.main(["generate", "--workdir", "w", "--prompt", "x", *argv]) == 2
  line = capsys.readouterr().err
  assert message in line
  assert line.count("\n") == 1
