"""Generation equals the naive loop over whole sequences."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.core import errors
from effjax.infer import engine, generate, sampling, score
from effjax.models import decoder
from tests.models.conftest import small_config


class Letters:
  """A tokenizer of 26 letters; 0 begins a text."""

  vocab_size, bos_id = 64, 0

  def encode(self, text):
    return [ord(c) - ord("a") + 1 for c in text]

  def decode(self, ids):
    return "".join(chr(ord("a") + i - 1) for i in ids)


@pytest.fixture(scope="module")
def model_and_params():
  model = decoder.Decoder(small_config(num_layers=2))
  tokens = jnp.zeros((1, 2), jnp.int32)
  return model, jax.jit(model.init)(jax.random.key(5), tokens)["params"]


def test_greedy_equals_the_naive_loop(model_and_params):
  model, params = model_and_params
  greedy = sampling.SamplingOptions(temperature=0.0)
  pieces = generate.stream(
    model, params, Letters(), "abc", max_tokens=6, options=greedy
  )
  text = "".join(pieces)
  ids = [0, 1, 2, 3]
  for _ in range(6):
    token = int(np.argmax(score.logits(model, params, np.array([ids]))[0, -1]))
    if token == 0:
      break
    ids.append(token)
  assert text == Letters().decode(ids[4:])


def test_the_seed_decides(model_and_params):
  model, params = model_and_params
  run = lambda seed: "".join(
    generate.stream(model, params, Letters(), "", max_tokens=12, seed=seed)
  )
  assert run(1) == run(1)
  assert run(1) != run(2)


def test_too_long_is_refused_before_anything_runs(model_and_params):
  model, params = model_and_params
  with pytest.raises(errors.InputError, match="more than the 32"):
    next(generate.stream(model, params, Letters(), "abc", max_tokens=29))
  with pytest.raises(errors.InputError, match="longer than the 32"):
    score.logits(model, params, np.zeros((1, 33), np.int32))
  with pytest.raises(errors.InputError, match="token ids must be from 0 to 63"):
    score.logits(model, params, np.full((1, 3), 64))
  with pytest.raises(errors.InputError, match="more than the 32"):
    engine.Decoding(model, params, 1, 33)
