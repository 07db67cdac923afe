import pytest

from effjax.core import config as core_config
from effjax.core import errors
from effjax.data import config


@pytest.mark.parametrize(
  ("values", "message"),
  [
    ({"corpus": "stdlb"}, "unknown corpus 'stdlb'; did you mean 'stdlib'"),
    ({"tokenizer": "bpee"}, "did you mean 'bpe'"),
    ({"vocab_size": 256}, "vocab_size must be at least 257"),
    ({"tokenizer": "bytes"}, "exactly 257 ids"),
    ({"sequence_length": 0}, "sequence_length must be at least 1"),
    ({"batch_size": 0}, "batch_size must be at least 1"),
    ({"eval_bytes": 0}, "eval_bytes must be at least 1"),
    ({"eval_context": 0}, "eval_context must be at least 1"),
    ({"eval_context": 8, "eval_stride": 9}, "eval_stride must be from 1 to"),
    ({"seed": -1}, "seed must be"),
    ({"sequence_lenght": 8}, "did you mean 'sequence_length'"),
    ({"batch_size": "8"}, "batch_size must be int"),
  ],
)
def test_bad_values_are_one_clear_line(values, message):
  with pytest.raises(errors.InputError) as info:
    core_config.build(config.DataConfig, values, "config.data")
  assert message in str(info.value)
  assert "\n" not in str(info.value)


def test_evaluation_window_defaults_follow_the_sequence_length():
  assert config.DataConfig(sequence_length=64).eval_window == (64, 32)
  assert config.DataConfig(sequence_length=1).eval_window == (1, 1)
  assert config.DataConfig(eval_context=100, eval_stride=7).eval_window == (100, 7)


def test_config_survives_the_way_through_json():
  original = config.DataConfig(corpus="synthetic", options={"documents": 5})
  assert core_config.build(config.DataConfig, core_config.to_dict(original)) == original
