import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.core import specs as specs_lib
from effjax.measure import quality
from effjax.parallel import spread as spread_lib


def test_loss_equals_numpy_float64(model, params, text):
  (batch,) = text.batches(2)
  logits = jax.jit(model.apply)(
    {"params": params},
    jnp.asarray(batch["inputs"]),
    positions=jnp.asarray(batch["positions"]),
    segments=jnp.asarray(batch["segments"]),
  )[0]
  logits = np.asarray(logits, np.float64)
  total = count = 0
  for b, l in np.argwhere(batch["weights"] > 0):
    row = logits[b, l]
    total += np.log(np.exp(row - row.max()).sum()) + row.max()
    total -= row[batch["targets"][b, l]]
    count += 1
  found = quality.evaluate(model, params, text, batch_size=2)
  assert found["num_tokens"] == count == 14
  assert found["loss"] == pytest.approx(total / count, rel=1e-6)
  assert found["perplexity"] == pytest.approx(math.exp(total / count), rel=1e-6)
  assert found["bits_per_byte"] == pytest.approx(total / math.log(2) / 100, rel=1e-6)
  assert (found["num_bytes"], found["context"], found["stride"]) == (100, 12, 6)


def test_batch_size_does_not_matter(model, params, text):
  one = quality.evaluate(model, params, text, batch_size=1)
  two = quality.evaluate(model, params, text, batch_size=2)
  assert one["loss"] == pytest.approx(two["loss"], rel=1e-6)


@pytest.mark.parametrize(
  ("preset", "fields"),
  [
    ("dp", {"num_devices": 2}),
    ("fsdp", {"num_devices": 8}),
    ("tp", {"num_devices": 2}),
  ],
)
def test_devices_share_the_rows_where_they_divide(model, params, text, preset, fields):
  """Two rows: on two devices one each, on eight every one computes both."""
  expected = quality.evaluate(model, params, text, batch_size=2)
  spread = spread_lib.over(preset, **fields)
  placed = jax.device_put(params, spread.params(specs_lib.specs(model), params))
  found = quality.evaluate(model, placed, text, batch_size=2, spread=spread)
  assert found["loss"] == pytest.approx(expected["loss"], rel=1e-6)
  assert {**found, "loss": 0} == pytest.approx({**expected, "loss": 0}, rel=1e-6)
  (batch,) = text.batches(2)
  put = spread.put_all(batch["inputs"])
  rows = {shard.data.shape[0] for shard in put.addressable_shards}
  assert rows == ({1} if preset == "dp" else {2})
  answers = dataclasses.replace(text, num_bytes=None)
  right = quality.evaluate(model, placed, answers, batch_size=2, spread=spread)
  assert right["accuracy"] == quality.evaluate(model, params, answers, 2)["accuracy"]


def test_an_evaluation_can_be_left_between_batches(model, params, text):
  asked = []

  def pause():
    asked.append(len(asked))
    if len(asked) == 2:
      raise KeyboardInterrupt

  with pytest.raises(KeyboardInterrupt):
    quality.evaluate(model, params, text, batch_size=1, pause=pause)
  assert asked == [0, 1]


def test_not_finite_is_null_rather_than_a_number(model, params, text):
  broken = jax.tree.map(lambda a: a * jnp.nan, params)
  found = quality.evaluate(model, broken, text, batch_size=2)
  assert found["loss"] is found["perplexity"] is found["bits_per_byte"] is None
  assert found["num_tokens"] == 14
  huge = quality.summarize(1000.0, 1, 1)
  assert huge["loss"] == 1000 and huge["perplexity"] is None


def test_accuracy_where_only_answers_are_scored(model, params, text):
  answers = dataclasses.replace(text, num_bytes=None)
  (batch,) = answers.batches(2)
  logits = jax.jit(model.apply)(
    {"params": params},
    jnp.asarray(batch["inputs"]),
    positions=jnp.asarray(batch["positions"]),
    segments=jnp.asarray(batch["segments"]),
  )[0]
  best = np.asarray(logits).argmax(axis=-1)
  scored = batch["weights"] > 0
  # Half of the scored targets become what the model says.
  chosen = scored & (np.arange(12)[None] % 2 == 0)
  batch["targets"] = np.where(chosen, best, (best + 1) % 40).astype(np.int32)

  class Fixed(type(answers)):
    def batches(self, batch_size):
      for start in range(0, 2, batch_size):
        yield {name: a[start : start + batch_size] for name, a in batch.items()}

  fixed = Fixed(num_bytes=None)
  for batch_size in (1, 2):
    found = quality.evaluate(model, params, fixed, batch_size)
    assert found["accuracy"] == chosen.sum() / 14
  assert found["num_tokens"] == 14
  assert found["bits_per_byte"] is None and found["num_bytes"] is None
  assert found["perplexity"] == pytest.approx(math.exp(found["loss"]))
  assert "accuracy" not in quality.evaluate(model, params, text, 2)


def test_accuracy_is_null_where_nothing_is_finite_and_ties_are_no_answers(
  model, params, text
):
  answers = dataclasses.replace(text, num_bytes=None)
  broken = jax.tree.map(lambda a: a * jnp.nan, params)
  found = quality.evaluate(model, broken, answers, batch_size=2)
  assert found["accuracy"] is found["loss"] is None
  # A model that knows nothing says the first of forty equal tokens.
  blank = jax.tree.map(jnp.zeros_like, params)
  (batch,) = answers.batches(2)
  zeros = ((batch["targets"] == 0) & (batch["weights"] > 0)).sum()
  found = quality.evaluate(model, blank, answers, batch_size=2)
  assert found["accuracy"] == zeros / 14
  assert found["loss"] == pytest.approx(math.log(40))
