import json

import pytest

from effjax.core import config as core_config
from effjax.core import errors
from effjax.recipe import config as config_lib


def _values(**changes):
  model = {"vocab_size": 257, "embed_dim": 32, "num_layers": 1, "max_len": 64}
  values = {
    "data": {
      "tokenizer": "bytes",
      "vocab_size": 257,
      "sequence_length": 32,
      "batch_size": 2,
    },
    "model": model,
    "measure": {"prompt_tokens": 8, "decode_tokens": 8},
    "stages": (
      {"name": "train", "technique": "train", "options": {"num_steps": 3}},
      {"name": "a", "technique": "rtn"},
      {"name": "b", "technique": "magnitude", "after": "train"},
      {"name": "c", "technique": "rtn", "options": {"bits": 4}},
      {"name": "d", "technique": "rtn", "after": "init"},
    ),
  }
  return values | changes


def _build(**changes):
  return core_config.build(config_lib.Config, _values(**changes))


def test_stages_form_a_tree():
  config = _build()
  assert [config.parent(i) for i in range(5)] == [None, 0, 0, 2, None]


def test_config_survives_json_and_is_resolved():
  config = _build()
  plain = json.loads(json.dumps(core_config.to_dict(config)))
  assert plain["stages"][3]["options"]["symmetric"] is True
  assert plain["stages"][0]["where"] == {"kind": [], "path": "", "not_path": ""}
  again = config_lib.from_dict(plain)
  assert core_config.to_dict(again) == core_config.to_dict(config)
  assert again == config


def test_options_become_the_dataclass_of_the_technique():
  config = _build()
  assert config.stages[0].build_options().num_steps == 3
  assert config.stages[3].build_options().bits == 4
  assert config.stages[2].build_where().kind == ("matrix",)


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"stages": ()}, "at least one stage"),
    ({"seed": -1}, "must not be negative"),
    ({"stages": ({"name": "x", "technique": "train"},)}, "num_steps is missing"),
    (
      {"stages": ({"name": "init", "technique": "rtn"},)},
      "not 'init'",
    ),
    (
      {"stages": ({"name": "x", "technique": "rtn", "after": "x"},)},
      "not an earlier stage",
    ),
    (
      {"stages": ({"name": "x", "technique": "train", "options": {"num_steps": 0}},)},
      "num_steps must be positive",
    ),
  ],
)
def test_mistakes(changes, message):
  with pytest.raises(errors.InputError) as caught:
    _build(**changes)
  assert message in str(caught.value)
  assert "\n" not in str(caught.value)
