import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from effjax.core import registry
from effjax.optim import config


def quintic(x):
  """Five steps on one matrix in float64, from the post's equation."""
  a, b, c = 3.4445, -4.7750, 2.0315
  x = x / (np.linalg.norm(x) + 1e-7)
  for _ in range(5):
    gram = x @ x.T
    x = a * x + (b * gram + c * gram @ gram) @ x
  return x


def scale_of(rule, size_in, size_out):
  if rule == "rms":
    return 0.2 * np.sqrt(max(size_in, size_out))
  return np.sqrt(max(1, size_out / size_in))


@pytest.mark.parametrize("scale", ["rms", "spectral"])
@pytest.mark.parametrize("nesterov", [True, False])
def test_equals_the_published_update_in_float64(scale, nesterov, trial):
  decay, beta = 0.3, 0.95
  b1, b2, eps, adam_scale = 0.9, 0.95, 1e-8, 0.25

  def rule(path):
    m = v = 0.0

    def matrix(t, theta, g):
      nonlocal m
      m = beta * m + g  # the sum of the post; the mean differs by a factor only
      update = quintic(g + beta * m if nesterov else m)
      update = scale_of(scale, *g.shape) * update
      return theta - trial.rate(t - 1) * (update + decay * theta)

    def other(t, theta, g):
      nonlocal m, v
      m = b1 * m + (1 - b1) * g
      v = b2 * v + (1 - b2) * g**2
      step = (m / (1 - b1**t)) / (np.sqrt(v / (1 - b2**t)) + eps)
      return theta - adam_scale * trial.rate(t - 1) * step

    return matrix if path == "w" else other

  actual = trial.run(
    "muon", scale=scale, nesterov=nesterov, weight_decay=decay, adam_scale=adam_scale
  )
  trial.check(actual, trial.closed_form(rule), tolerance=1e-4)


@pytest.mark.oracle
@pytest.mark.parametrize(
  ("scale", "adjust"), [("rms", "match_rms_adamw"), ("spectral", "original")]
)
def test_matrices_follow_torch(scale, adjust, trial, torch_run):
  torch = pytest.importorskip("torch", minversion="2.9")
  # torch holds [out, in], and multiplies in bfloat16, hence the tolerance.
  expected = torch_run(
    torch.optim.Muon, 0.1, paths=("w",), transpose=True, adjust_lr_fn=adjust
  )
  trial.check(trial.run("muon", scale=scale), expected, tolerance=1e-2)
  moved = np.abs(expected["w"] - trial.start["w"])
  assert moved.max() > 0.05


def test_one_step_equals_optax(trial):
  # After one step optax's bias correction is a common factor, which cancels.
  technique = registry.find(config.OPTIMIZERS, "muon")
  options = technique.options({"weight_decay": 0.1})
  tx = technique.make(lambda step: 0.1, trial.specs, options)
  reference = optax.contrib.muon(0.1, weight_decay=0.1, consistent_rms=0.2)
  params = {"w": jnp.asarray(trial.start["w"], jnp.float32)}
  grads = {"w": jnp.asarray(trial.grads[0]["w"], jnp.float32)}
  specs_hole = {"w": params["w"], "b": None}
  actual, _ = tx.update(grads | {"b": None}, tx.init(specs_hole), specs_hole)
  expected, _ = reference.update(grads, reference.init(params), params)
  np.testing.assert_allclose(actual["w"], expected["w"], atol=1e-5)


@pytest.mark.parametrize(("name", "axis"), [("q", -1), ("o", -2)])
def test_per_head_orthogonalises_each_head(name, axis, toy):
  specs = {"w": toy.specs["run_0"]["layer_0"][name]}
  technique = registry.find(config.OPTIMIZERS, "muon")
  options = technique.options({"per_head": True, "nesterov": False, "scale": "rms"})
  tx = technique.make(lambda step: 1.0, specs, options)
  grads = toy.random_like(specs, seed=3)
  params = jax.tree.map(jnp.zeros_like, grads)
  updates, _ = tx.update(grads, tx.init(params), params)
  split = lambda x: np.split(np.asarray(x, np.float64), 4, axis=axis)
  for update, gradient in zip(split(updates["w"]), split(grads["w"]), strict=True):
    for layer in range(3):
      expected = -scale_of("rms", *gradient[layer].shape) * quintic(gradient[layer])
      np.testing.assert_allclose(update[layer], expected, atol=1e-4)


def test_rms_scale_gives_updates_of_adamws_size(toy):
  specs = {"w": toy.make_spec("matrix", ("embed", "mlp"), (64, 256))}
  technique = registry.find(config.OPTIMIZERS, "muon")
  tx = technique.make(lambda step: 1.0, specs, technique.options({}))
  grads = toy.random_like(specs, seed=3)
  params = jax.tree.map(jnp.zeros_like, grads)
  updates, _ = tx.update(grads, tx.init(params), params)
  assert 0.15 < float(jnp.sqrt(jnp.mean(jnp.square(updates["w"])))) < 0.25
