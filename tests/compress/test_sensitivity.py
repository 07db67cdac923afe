"""Sensitivities against closed forms, exact Hessians and the loss of training.

Letters: B batch, L length, D model, V vocabulary.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.compress import calibrate, derivatives, sensitivity
from effjax.core import errors
from effjax.core import tree as tree_lib
from effjax.models import decoder, encoder, encoder_config
from effjax.train.losses import cross_entropy
from tests.models.conftest import small_config

VOCAB, DIM = 5, 3


class Bigram:
  """The smallest language model: the logits are rows of a fixed table times w."""

  def __init__(self, table_VD):
    self.table_VD = jnp.asarray(table_VD, jnp.float32)

  def apply(self, variables, tokens_BL, positions=None, segments=None):
    return self.table_VD[tokens_BL] @ variables["params"]["head"]["w"], None


@pytest.fixture
def bigram(rng):
  table_VD = rng.standard_normal((VOCAB, DIM))
  w_DV = rng.standard_normal((DIM, VOCAB))
  batches = [
    {
      "inputs": rng.integers(0, VOCAB, (2, 6)).astype(np.int32),
      "targets": rng.integers(0, VOCAB, (2, 6)).astype(np.int32),
      "weights": rng.integers(0, 2, (2, 6)).astype(np.float32),
    }
    for _ in range(3)
  ]
  params = {"head": {"w": jnp.asarray(w_DV, jnp.float32)}}
  return Bigram(table_VD), params, batches, table_VD, w_DV


def _softmax(logits):
  p = np.exp(logits - logits.max(axis=-1, keepdims=True))
  return p / p.sum(axis=-1, keepdims=True)


def test_fisher_of_a_linear_model(bigram):
  model, params, batches, table_VD, w_DV = bigram
  got = derivatives.fisher(model, params, batches, ["head/w"])["head/w"]
  squares, total = np.zeros((DIM, VOCAB)), 0.0
  for batch in batches:
    for inputs, targets, weights in zip(
      batch["inputs"], batch["targets"], batch["weights"], strict=True
    ):
      x_LD = table_VD[inputs]
      residual_LV = _softmax(x_LD @ w_DV) - np.eye(VOCAB)[targets]
      squares += np.square(x_LD.T @ (residual_LV * weights[:, None]))
      total += weights.sum()
  np.testing.assert_allclose(got, squares / total, rtol=1e-4)


def _bigram_hessian(batches, table_VD, w_DV):
  """`[D V, D V]`: of the mean loss the sum of `x x^T (x) (diag(p) - p p^T)`."""
  hessian, total = 0.0, 0.0
  for batch in batches:
    weights = batch["weights"].ravel()
    x_TD = table_VD[batch["inputs"].ravel()]
    p_TV = _softmax(x_TD @ w_DV)
    for x_D, p_V, weight in zip(x_TD, p_TV, weights, strict=True):
      of_logits = np.diag(p_V) - np.outer(p_V, p_V)
      hessian += weight * np.kron(np.outer(x_D, x_D), of_logits)
    total += weights.sum()
  return hessian / total


def test_forms_along_the_basis_are_the_diagonal(bigram):
  model, params, batches, table_VD, w_DV = bigram
  x_TD = jnp.asarray(table_VD[batches[0]["inputs"].ravel()], jnp.float32)
  weights_T = batches[0]["weights"].ravel()
  # The targets are linear in w and have no part in the Hessian.
  loss = lambda selected: jnp.sum(
    jax.nn.logsumexp(x_TD @ selected["w"], axis=-1) * weights_T
  )
  exact = _bigram_hessian(batches[:1], table_VD, w_DV) * weights_T.sum()
  form = lambda vector_DV: derivatives.quadratic_forms(
    loss, {"w": params["head"]["w"]}, {"w": vector_DV}
  )["w"]
  basis = jnp.eye(DIM * VOCAB).reshape(-1, DIM, VOCAB)
  np.testing.assert_allclose(jax.vmap(form)(basis), np.diag(exact), rtol=1e-4)
  rows = lambda vector_DV: derivatives.quadratic_forms(
    loss, {"w": params["head"]["w"]}, {"w": vector_DV}, stacked=["w"]
  )["w"]
  by_row = np.diag(exact).reshape(DIM, VOCAB)
  got = jax.vmap(rows)(basis).reshape(DIM, VOCAB, DIM)
  np.testing.assert_allclose(got, by_row[..., None] * np.eye(DIM)[:, None], atol=1e-5)


def test_hessian_trace_of_a_linear_model(bigram):
  model, params, batches, table_VD, w_DV = bigram
  probes = 512
  trace = derivatives.hessian_traces(model, params, batches, ["head/w"], probes=probes)
  exact = _bigram_hessian(batches, table_VD, w_DV)
  # Of v^T H v the variance is twice the sum of squares beside the diagonal; probes of
  # the batches are independent, so that of the mean Hessian's is an upper bound of it.
  beside = exact - np.diag(np.diag(exact))
  spread = np.sqrt(2 * np.square(beside).sum() / probes)
  assert spread < 0.05 * np.trace(exact)
  assert abs(float(trace["head/w"]) - np.trace(exact)) < 4 * spread
  again = derivatives.hessian_traces(model, params, batches, ["head/w"], probes=probes)
  assert float(again["head/w"]) == float(trace["head/w"])
  other = derivatives.hessian_traces(
    model, params, batches, ["head/w"], probes=probes, seed=1
  )
  assert float(other["head/w"]) != float(trace["head/w"])


@pytest.fixture(scope="module")
def tiny():
  """Two scanned layers of attention, `(model, params, batch)`."""
  config = small_config(
    vocab_size=8,
    embed_dim=4,
    num_layers=2,
    pattern=("attention",),
    mlp="gelu",
    mixer_options={"attention": {"num_heads": 1, "num_kv_heads": 1, "head_dim": 4}},
    mlp_options={"gelu": {"hidden_dim": 4}},
    tie_embeddings=False,
  )
  model = decoder.Decoder(config)
  rng = np.random.default_rng(3)
  batch = {
    "inputs": rng.integers(0, 8, (3, 6)).astype(np.int32),
    "segments": np.array([[1] * 6, [1, 1, 1, 2, 2, 2], [1, 1, 1, 1, 0, 0]], np.int32),
  }
  params = jax.jit(model.init)(jax.random.key(1), batch["inputs"])["params"]
  # Larger weights: a fresh model is nearly linear, with a Hessian of nearly zero.
  return model, jax.tree.map(lambda w: 2 * w, params), batch


PATHS = ("run_0/layer_0/mixer/o", "run_0/layer_0/mlp/up")


def _train_loss(model, params, batch):
  """The summed loss of training, and the sum of the weights."""
  loss_fn = cross_entropy.TECHNIQUE.make(cross_entropy.CrossEntropyOptions(chunk=0))
  loss = loss_fn(model, {"params": params}, batch, jax.random.key(0))
  return loss.objective, loss.weight


def test_fisher_of_drawn_targets_is_the_gauss_newton_diagonal(bigram):
  model, params, batches, table_VD, w_DV = bigram
  exact, total = np.zeros((DIM, VOCAB)), 0.0
  for batch in batches:
    x_TD = table_VD[batch["inputs"].ravel()]
    p_TV, weights_T = _softmax(x_TD @ w_DV), batch["weights"].ravel()
    # Of cross entropy the Hessian by one logit is p (1 - p); logits are linear in w.
    exact += np.einsum("t,td,tv->dv", weights_T, x_TD**2, p_TV * (1 - p_TV))
    total += weights_T.sum()
  exact /= total
  draw = lambda probes: derivatives.fisher(
    model, params, batches, ["head/w"], probes=probes, seed=1
  )["head/w"]
  got = np.asarray(draw(400))
  assert np.linalg.norm(got - exact) < 0.1 * np.linalg.norm(exact)
  np.testing.assert_array_equal(draw(2), draw(2))


def test_fisher_of_a_decoder_is_that_of_the_training_loss(tiny):
  model, params, batch = tiny
  got = derivatives.fisher(model, params, [batch], PATHS)
  full = derivatives.with_targets(batch)
  gradient = jax.jit(jax.grad(lambda p, b: _train_loss(model, p, b)[0]))
  squares = {path: np.zeros(got[path].shape) for path in PATHS}
  for b in range(3):
    row = {name: array[b : b + 1] for name, array in full.items()}
    flat = tree_lib.flatten(gradient(params, row))
    for path in PATHS:
      squares[path] += np.square(np.asarray(flat[path], np.float64))
  assert set(got) == set(PATHS)
  for path in PATHS:
    assert got[path].shape == (2, 4, 4) and float(got[path].min()) >= 0
    expected = squares[path] / 12  # targets: 5 + 2 + 2 + 3
    np.testing.assert_allclose(got[path], expected, rtol=1e-3, atol=1e-7)


def test_traces_of_a_decoder_are_those_of_the_exact_hessian(tiny):
  model, params, batch = tiny
  full = derivatives.with_targets(batch)
  flat = tree_lib.flatten(params)
  shapes = [(path, flat[path].shape) for path in PATHS]

  def mean_loss(selected):
    merged = tree_lib.unflatten(flat | selected)
    objective, weight = _train_loss(model, merged, full)
    return objective / weight

  def from_vector(vector):
    parts = jnp.split(vector, 2)
    return {p: a.reshape(s) for (p, s), a in zip(shapes, parts, strict=True)}

  start = jnp.concatenate([flat[path].ravel() for path in PATHS])
  exact = np.asarray(jax.jit(jax.hessian(lambda v: mean_loss(from_vector(v))))(start))
  units = np.repeat(np.arange(4), 16)  # both layers of one path, then of the other
  traces = np.bincount(units, np.diag(exact))

  probes = 1000
  got = derivatives.hessian_traces(
    model, params, [batch], PATHS, stacked=PATHS, probes=probes
  )
  got = np.concatenate([np.asarray(got[path]) for path in PATHS])
  # Of v_u^T (H v)_u: pairs within the unit count twice, pairs with others once.
  pairs = np.square(exact - np.diag(np.diag(exact)))
  inside = units[:, None] == units[None]
  variance = np.bincount(units, (pairs * (1 + inside)).sum(axis=1))
  assert np.all(np.abs(got - traces) < 4 * np.sqrt(variance / probes))
  assert np.sqrt(variance / probes).max() < 0.2 * np.abs(traces).max()


def test_what_is_stacked_is_a_unit_a_layer_and_else_one(rng):
  change = jnp.asarray(rng.standard_normal((2, 3, 4, 5)), jnp.float32)
  score = jnp.asarray(rng.random((2, 3, 4, 5)), jnp.float32)
  got = sensitivity.estimate("gradient", score, change, stacked=True)
  expected = 0.5 * np.sum(np.asarray(score) * np.square(change), axis=(1, 2, 3))
  np.testing.assert_allclose(got, expected, rtol=1e-5)
  whole = sensitivity.estimate("gradient", score, change)
  np.testing.assert_allclose(whole, expected.sum(), rtol=1e-5)
  traces = jnp.array([2.0, 3.0])
  got = sensitivity.estimate("hessian", traces, change, stacked=True)
  norms = np.square(change).sum(axis=(1, 2, 3))
  np.testing.assert_allclose(got, 0.5 * np.array([2, 3]) / 60 * norms, rtol=1e-5)


def test_output_is_the_squared_error_of_the_outputs(tiny, rng):
  model, params, batch = tiny
  stats = calibrate.calibrate(model, params, [batch, batch], collect=("hessian",))
  hessians = sensitivity.output_hessians(stats, [batch, batch], ["head"])
  change = jnp.asarray(0.1 * rng.standard_normal((4, 8)), jnp.float32)
  got = sensitivity.estimate("output", hessians["head"], change)
  places = {name: jnp.asarray(batch[name]) for name in ("inputs", "segments")}
  apply = jax.jit(
    lambda params: model.apply(
      {"params": params}, places["inputs"], segments=places["segments"]
    )[0]
  )
  logits = lambda params: np.asarray(apply(params))
  changed = logits(params | {"head": params["head"] + change}) - logits(params)
  real = batch["segments"] > 0
  expected = np.square(changed[real]).sum() / real.sum()
  np.testing.assert_allclose(got, expected, rtol=1e-4)


def test_output_of_experts_and_of_a_tied_embedding(rng):
  inputs = rng.standard_normal((2, 3, 7, 4))  # layers, experts, tokens, inputs
  change = rng.standard_normal((2, 3, 4, 5))
  hessians = np.swapaxes(inputs, -1, -2) @ inputs
  got = sensitivity.estimate(
    "output",
    jnp.asarray(hessians, jnp.float32),
    jnp.asarray(change, jnp.float32),
    stacked=True,
  )
  expected = np.square(inputs @ change).sum(axis=(1, 2, 3))
  np.testing.assert_allclose(got, expected, rtol=1e-4)
  one, embedding_VD = hessians[0, 0], change[0, 0].T
  got = sensitivity.estimate(
    "output",
    jnp.asarray(one, jnp.float32),
    jnp.asarray(embedding_VD, jnp.float32),
    transposed=True,
  )
  expected = np.square(inputs[0, 0] @ change[0, 0]).sum()
  np.testing.assert_allclose(got, expected, rtol=1e-4)


def test_targets_are_the_inputs_shifted_within_segments():
  batch = {
    "inputs": np.array([[5, 6, 7, 8, 9, 0]], np.int32),
    "segments": np.array([[1, 1, 2, 2, 2, 0]], np.int32),
  }
  full = derivatives.with_targets(batch)
  np.testing.assert_array_equal(full["targets"][0, [0, 2, 3]], [6, 8, 9])
  np.testing.assert_array_equal(full["weights"], [[1, 0, 1, 1, 0, 0]])
  bare = derivatives.with_targets({"inputs": batch["inputs"]})
  np.testing.assert_array_equal(bare["weights"], [[1, 1, 1, 1, 1, 0]])
  given = {"targets": batch["inputs"] + 1, "weights": np.full((1, 6), 0.5)}
  full = derivatives.with_targets(batch | given)
  np.testing.assert_array_equal(full["targets"], given["targets"])
  np.testing.assert_array_equal(full["weights"], given["weights"])
  full = derivatives.with_targets(batch | {"targets": given["targets"]})
  np.testing.assert_array_equal(full["weights"], [[1, 1, 1, 1, 1, 0]])


def test_nothing_to_learn_from_is_refused(bigram, tiny):
  model, params, batches, *_ = bigram
  with pytest.raises(errors.InputError, match="no target"):
    derivatives.fisher(model, params, [], ["head/w"])
  silent = [batches[0] | {"weights": np.zeros((2, 6), np.float32)}]
  with pytest.raises(errors.InputError, match="no target"):
    derivatives.hessian_traces(model, params, silent, ["head/w"])
  broken = {"head": {"w": params["head"]["w"] * jnp.nan}}
  with pytest.raises(errors.InputError, match="head/w are not finite"):
    derivatives.fisher(model, broken, batches, ["head/w"])
  model, params, batch = tiny
  stats = calibrate.calibrate(model, params, [batch], collect=("hessian",))
  with pytest.raises(errors.InputError, match="embed/table: no input"):
    sensitivity.output_hessians(stats, [batch], ["embed/table"])


def test_a_model_without_second_derivatives_is_refused():
  options = {"moe": {"num_experts": 2, "hidden_dim": 32}}
  changes = {"pattern": ("attention",), "mlp": "moe", "mlp_options": options}
  model = decoder.Decoder(small_config(num_layers=1, **changes))
  tokens_BL = jnp.zeros((1, 4), jnp.int32)
  params = jax.eval_shape(model.init, jax.random.key(0), tokens_BL)["params"]
  paths = [p for p in tree_lib.flatten(params) if p.endswith("mixer/q")]
  assert paths
  sensitivity.check("gradient", model, params, paths)
  with pytest.raises(errors.InputError, match="sensitivity='gradient'"):
    sensitivity.check("hessian", model, params, paths)


@pytest.mark.parametrize("mixer", ["mamba2", "gated_deltanet"])
def test_scanned_recurrences_have_second_derivatives(mixer):
  model = decoder.Decoder(small_config(num_layers=2, pattern=(mixer,)))
  tokens_BL = jnp.zeros((1, 4), jnp.int32)
  params = jax.eval_shape(model.init, jax.random.key(0), tokens_BL)["params"]
  paths = [p for p in tree_lib.flatten(params) if "/mlp/" in p]
  assert paths and model.runs is not None
  sensitivity.check("hessian", model, params, paths)


def test_an_encoder_has_no_next_token():
  config = encoder_config.EncoderConfig(vocab_size=64, embed_dim=32, num_layers=1)
  model = encoder.Encoder(config)
  with pytest.raises(errors.InputError, match="sensitivity='output'"):
    sensitivity.check("gradient", model, {}, [])
  sensitivity.check("output", model, {}, [])
