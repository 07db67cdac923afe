import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.measure import quality


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


def test_not_finite_is_null_rather_than_a_number(model, params, text):
  broken = jax.tree.map(lambda a: a * jnp.nan, params)
  found = quality.evaluate(model, broken, text, batch_size=2)
  assert found["loss"] is found["perplexity"] is found["bits_per_byte"] is None
  assert found["num_tokens"] == 14
  huge = quality.summarize(1000.0, 1, 1)
  assert huge["loss"] == 1000 and huge["perplexity"] is None
