"""Distillation of logits against NumPy and torch, and where the teacher stands."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from effjax.core import config as config_lib
from effjax.core import errors
from effjax.train import config as train_config
from effjax.train import loop
from effjax.train import state as state_lib
from effjax.train import step as step_lib
from effjax.train.losses import base, cross_entropy, logit_kl


def _log_softmax(logits):
  top = logits.max(-1, keepdims=True)
  return logits - top - np.log(np.exp(logits - top).sum(-1, keepdims=True))


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_value_and_gradient_equal_numpy(rng, temperature):
  student, teacher = rng.normal(size=(2, 2, 3, 7)) * 3
  weights = rng.random((2, 3))

  def total(logits):
    kl = logit_kl.kl_of(logits, jnp.asarray(teacher, jnp.float32), temperature)
    return jnp.sum(kl * weights)

  value, gradient = jax.value_and_grad(total)(jnp.asarray(student, jnp.float32))
  log_p, log_q = (_log_softmax(z / temperature) for z in (teacher, student))
  p, q = np.exp(log_p), np.exp(log_q)
  kl = temperature**2 * (p * (log_p - log_q)).sum(-1)
  np.testing.assert_allclose(value, (kl * weights).sum(), rtol=1e-5)
  expected = temperature * (q - p) * weights[..., None]
  np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=1e-6)


def test_equals_torch(rng):
  torch = pytest.importorskip("torch")
  student, teacher = (rng.normal(size=(4, 9)).astype(np.float32) for _ in range(2))
  inputs = torch.tensor(student, requires_grad=True)
  kl = torch.nn.KLDivLoss(reduction="sum", log_target=True)
  logs = [torch.log_softmax(z / 2, -1) for z in (inputs, torch.tensor(teacher))]
  loss = 4 * kl(*logs)
  loss.backward()
  total = lambda z: jnp.sum(logit_kl.kl_of(z, jnp.asarray(teacher), 2.0))
  value, gradient = jax.value_and_grad(total)(jnp.asarray(student))
  np.testing.assert_allclose(value, loss.item(), rtol=1e-5)
  np.testing.assert_allclose(gradient, inputs.grad.numpy(), rtol=1e-4, atol=1e-6)


def test_extreme_logits_stay_finite():
  student = jnp.asarray([[1e4, -1e4, 0.0], [0.0, -jnp.inf, 1.0]])
  teacher = jnp.asarray([[-1e4, 1e4, 0.0], [1.0, -jnp.inf, 0.0]])
  total = lambda z: jnp.sum(logit_kl.kl_of(z, teacher, 1.0))
  value, gradient = jax.value_and_grad(total)(student)
  assert bool(jnp.isfinite(value)) and bool(jnp.all(jnp.isfinite(gradient)))
  assert float(jnp.sum(logit_kl.kl_of(student, student, 1.0))) == 0


def _teacher(toy, **options):
  model = toy.make_model(**options)
  params = jax.tree.map(lambda a: a + 0.1 * jnp.sin(7 * a), toy.params)
  return base.Teacher(model, params)


def _loss(toy, model, **options):
  loss_fn = logit_kl.logit_kl(logit_kl.LogitKLOptions(**options))
  teacher = _teacher(toy, has_readout=model.has_readout)

  def objective(params):
    loss = loss_fn(
      model, {"params": params}, toy.batch(), jax.random.key(0), teacher=teacher
    )
    return loss.objective, loss

  (_, loss), gradients = jax.value_and_grad(objective, has_aux=True)(toy.params)
  return loss, gradients


def test_the_mix_and_its_ends(toy):
  model, batch = toy.make_model(), toy.batch()
  plain = cross_entropy.cross_entropy(cross_entropy.CrossEntropyOptions())(
    model, {"params": toy.params}, batch, jax.random.key(0)
  )
  losses = {a: _loss(toy, model, alpha=a, temperature=2.0)[0] for a in (0.0, 0.3, 1.0)}
  logits = [
    np.asarray(model.apply({"params": p}, batch["inputs"])[0], np.float64) / 2
    for p in (_teacher(toy).params, toy.params)
  ]
  log_p, log_q = map(_log_softmax, logits)
  kl = 4 * np.sum((np.exp(log_p) * (log_p - log_q)).sum(-1) * batch["weights"])
  nll = float(plain.objective)
  for alpha, loss in losses.items():
    expected = alpha * kl + (1 - alpha) * nll
    np.testing.assert_allclose(loss.objective, expected, rtol=1e-4)
    np.testing.assert_allclose(loss.metrics["kl"], kl, rtol=1e-4)
    np.testing.assert_allclose(loss.metrics["cross_entropy"], nll, rtol=1e-5)
  assert float(losses[0.0].weight) == batch["weights"].sum()


def test_chunks_of_both_models_change_nothing(toy):
  expected, expected_gradients = _loss(toy, toy.make_model(), alpha=0.4)
  loss, gradients = _loss(toy, toy.make_model(has_readout=True), alpha=0.4, chunk=16)
  np.testing.assert_allclose(loss.objective, expected.objective, rtol=1e-5)
  np.testing.assert_allclose(loss.metrics["kl"], expected.metrics["kl"], rtol=1e-5)
  for name, gradient in gradients.items():
    np.testing.assert_allclose(gradient, expected_gradients[name], rtol=1e-4, atol=1e-5)


def _config(toy, **changes):
  values = {"loss": "logit_kl", "teacher": "full", "num_steps": 4}
  return toy.config(**(values | changes))


def test_the_teacher_is_an_argument_and_nothing_of_it_is_kept(toy):
  config, spread, tx = _config(toy), toy.spread(), optax.sgd(0.1)
  state, frozen, shardings = state_lib.place(
    toy.make_model(),
    toy.params,
    toy.specs,
    frozenset(toy.params),
    tx,
    jax.random.key(1),
    spread,
  )
  teacher = base.Teacher(
    toy.make_model(), jax.tree.map(lambda a: a + 0.1 * jnp.sin(7 * a), state.params)
  )
  step = step_lib.make(
    toy.make_model(),
    config.make_loss(),
    tx,
    lambda step: 0.1,
    frozen,
    shardings,
    specs=toy.specs,
    spread=spread,
    micro_batches=2,
    teacher=teacher,
  )
  batch = step.put(toy.batch())
  traced = jax.make_jaxpr(step.fn)(state, step.fixed, batch)
  assert sum(c.size for c in traced.consts) < 64
  sizes = lambda tree: sum(a.size for a in jax.tree.leaves(tree))
  assert sizes(step.fixed["teacher"]) == sizes(toy.params)
  held = sizes(state)
  new, metrics = step(state, batch)
  assert sizes(new) == held and step.num_compilations() == 1
  assert 0 < float(metrics["kl"]) < float(metrics["cross_entropy"])
  # The same step with another teacher: nothing of the first was compiled in.
  step.fixed["teacher"] = jax.tree.map(jnp.copy, new.params)
  assert float(step(new, batch)[1]["kl"]) == pytest.approx(0, abs=1e-6)
  assert step.num_compilations() == 1


def test_the_loop_takes_a_teacher_and_refuses_half_of_one(toy):
  arguments = toy.arguments(config=_config(toy), model=toy.make_model())
  trained = loop.train(**arguments, teacher=_teacher(toy))
  assert trained.metrics["kl"] > 0
  with pytest.raises(errors.InputError, match="no model passed as the teacher"):
    loop.train(**arguments)
  with pytest.raises(errors.InputError, match="a model passed as the teacher"):
    loop.train(**toy.arguments(), teacher=_teacher(toy))


def test_another_vocabulary_is_refused():
  rows = {"teacher": jnp.ones((2, 5)), "targets": None, "weights": None}
  with pytest.raises(errors.InputError, match="5 logits a token, the student 4"):
    logit_kl._sums(logit_kl.LogitKLOptions(), lambda x: x, jnp.ones((2, 4)), rows)


@pytest.mark.parametrize(
  ("values", "message"),
  [
    ({"loss": "logit_kl"}, "'logit_kl' needs a teacher"),
    ({"teacher": "full"}, "'cross_entropy' takes none.*logit_kl"),
    (
      {"loss": "logit_kl", "teacher": "t", "loss_options": {"alpha": 1.5}},
      "alpha=1.5 must be from 0 to 1",
    ),
    (
      {"loss": "logit_kl", "teacher": "t", "loss_options": {"temperature": 0.0}},
      "temperature=0.0 must be positive",
    ),
  ],
)
def test_mistakes_are_named(values, message):
  with pytest.raises(errors.InputError, match=message) as error:
    config_lib.build(train_config.TrainConfig, {"num_steps": 3} | values)
  assert "\n" not in str(error.value)
