import jax
import numpy as np
import optax
import pytest

from effjax.core import registry
from effjax.optim import config


def rates(name, peak, num_steps, steps=None, **options):
  technique = registry.find(config.SCHEDULES, name)
  fn = technique.make(peak, num_steps, technique.options(options))
  return np.asarray(jax.vmap(fn)(np.arange(num_steps + 2) if steps is None else steps))


@pytest.mark.parametrize("name", ["constant", "warmup_cosine", "wsd"])
def test_warmup_rises_by_equal_parts_and_no_update_is_lost(name):
  values = rates(name, 0.4, 100, warmup_steps=4)
  np.testing.assert_allclose(values[:4], [0.1, 0.2, 0.3, 0.4], rtol=1e-6)
  assert np.all(values[:100] > 0)
  assert values.max() <= np.float32(0.4)


def test_constant_is_constant():
  assert np.all(rates("constant", 0.25, 10) == np.float32(0.25))


def test_cosine_at_named_steps():
  values = rates("warmup_cosine", 2.0, 110, warmup_steps=10, final_fraction=0.1)
  # Peak, a quarter, half, three quarters and all of the way down; then it stays.
  expected = [2.0, 0.2 + 1.8 * (2 + 2**0.5) / 4, 1.1, 0.2 + 1.8 * (2 - 2**0.5) / 4]
  np.testing.assert_allclose(values[[10, 35, 60, 85]], expected, rtol=1e-6)
  np.testing.assert_allclose(values[[110, 111]], 0.2, rtol=1e-6)


def test_cosine_equals_optax_after_the_warmup():
  values = rates("warmup_cosine", 0.3, 57, warmup_steps=7, final_fraction=0.05)
  reference = optax.cosine_decay_schedule(0.3, decay_steps=50, alpha=0.05)
  expected = [float(reference(step)) for step in range(50)]
  np.testing.assert_allclose(values[7:57], expected, rtol=1e-5)


@pytest.mark.parametrize("name", ["warmup_cosine", "wsd"])
def test_warmup_is_a_twentieth_by_default(name):
  values = rates(name, 1.0, 200)
  np.testing.assert_allclose(values[[0, 4, 9]], [0.1, 0.5, 1.0], rtol=1e-6)


def test_wsd_with_a_line():
  values = rates(
    "wsd",
    2.0,
    100,
    warmup_steps=10,
    decay_fraction=0.2,
    decay_shape="linear",
    final_fraction=0.1,
  )
  assert np.all(values[9:81] == 2.0)
  np.testing.assert_allclose(values[[85, 90, 95, 100]], [1.55, 1.1, 0.65, 0.2], 1e-6)


def test_wsd_with_a_root():
  values = rates("wsd", 2.0, 100, warmup_steps=10, decay_fraction=0.16)
  assert np.all(values[9:85] == 2.0)
  # 1 - sqrt(progress) at progress 1/16, 1/4, 9/16 and 1.
  np.testing.assert_allclose(values[[85, 88, 93]], [1.5, 1.0, 0.5], rtol=1e-6)
  assert values[100] == values[101] == 0.0


def test_wsd_without_decay_is_constant():
  values = rates("wsd", 1.0, 50, warmup_steps=0, decay_fraction=0.0)
  assert np.all(values[:50] == 1.0)
