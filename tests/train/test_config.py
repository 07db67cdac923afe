"""Options of a training are checked before anything runs."""

import pytest

from effjax.core import config as config_lib
from effjax.core import errors
from effjax.train import config as train_config


@pytest.mark.parametrize(
  ("values", "message"),
  [
    ({}, "num_steps is missing"),
    ({"num_steps": 0}, "num_steps must be positive"),
    ({"num_steps": 9, "num_step": 9}, "did you mean 'num_steps'"),
    ({"num_steps": 9, "micro_batches": 0}, "micro_batches must be positive"),
    ({"num_steps": 9, "eval_every": -1}, "eval_every must not be negative"),
    ({"num_steps": 9, "eval_max_bytes": 0}, "eval_max_bytes must be positive or None"),
    ({"num_steps": 9, "batch_size": 6, "micro_batches": 4}, "no multiple"),
    ({"num_steps": 9, "loss": "crossentropy"}, "did you mean 'cross_entropy'"),
    ({"num_steps": 9, "loss_options": {"chunks": 1}}, "did you mean 'chunk'"),
    ({"num_steps": 9, "optimizer": {"name": "adamv"}}, "did you mean 'adamw'"),
    ({"num_steps": 9, "precision": {"compute": "int8"}}, "compute dtype"),
    ({"num_steps": 9, "precision": {"compute": "float16"}}, "use 'bfloat16'"),
    ({"num_steps": 9.5}, "num_steps must be int"),
  ],
)
def test_mistakes_are_named(values, message):
  with pytest.raises(errors.InputError, match=message) as error:
    config_lib.build(train_config.TrainConfig, values)
  assert "\n" not in str(error.value)


def test_when_things_happen():
  config = train_config.TrainConfig(
    num_steps=10, eval_every=4, checkpoint_every=3, log_every=5
  )
  due = lambda fn: [step for step in range(11) if fn(step)]
  assert due(config.evaluates_at) == [4, 8, 10]
  assert due(config.saves_at) == [3, 6, 9, 10]
  assert due(config.logs_at)[-2:] == [5, 10]
  once = train_config.TrainConfig(num_steps=10, checkpoint_every=0)
  assert due(once.evaluates_at) == due(once.saves_at) == [10]
