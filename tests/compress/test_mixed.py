"""Mixed precision: its budget, its table against exhaustive search, and its model."""

import itertools
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.compress import calibrate, derivatives, registry
from effjax.compress.quantize import mixed
from effjax.core import errors, layers, specs
from effjax.core import tree as tree_lib
from effjax.measure import bytes as bytes_lib
from effjax.models import decoder
from effjax.train import stages
from tests.models.conftest import small_config

CHOICES = (
  {"bits": 2, "group": 32, "scale_dtype": "float16"},
  {"bits": 4},
  {"bits": 8},
)
WHERE = {"path": "mlp/(up|down)|head", "kind": "matrix"}


@pytest.fixture(scope="module")
def net():
  """Three scanned layers that matter unequally: `(model, params, specs, batches)`."""
  config = small_config(
    num_layers=3,
    pattern=("attention",),
    mlp="gelu",
    mlp_options={"gelu": {"hidden_dim": 64}},
    tie_embeddings=False,
  )
  model = decoder.Decoder(config)
  rng = np.random.default_rng(0)
  batches = [{"inputs": rng.integers(0, 64, (2, 8)).astype(np.int32)} for _ in range(2)]
  params = jax.jit(model.init)(jax.random.key(1), batches[0]["inputs"])["params"]
  flat = tree_lib.flatten(params)
  for path in flat:
    if path.endswith("mlp/down"):
      flat[path] = flat[path] * jnp.array([0.1, 1.0, 4.0])[:, None, None]
  return model, tree_lib.unflatten(flat), specs.specs(model), batches


@pytest.fixture(scope="module")
def made(net):
  """The plan and the outcome at 4.6 bits, `(plan, model, params)`."""
  options = {"choices": CHOICES, "bits_per_weight": 4.6}
  table = mixed.plan(*net, where=WHERE, options=options)
  return table, *registry.find("mixed")(*net, where=WHERE, options=options)


def _losses(net):
  """Estimated losses `{unit: [choices]}`, in NumPy, of what rtn makes."""
  model, params, spec_tree, batches = net
  flat = tree_lib.flatten(params)
  paths = [p for p in flat if p.endswith(("mlp/up", "mlp/down", "head"))]
  scores = derivatives.fisher(model, params, batches, paths)
  losses = {}
  for choice in CHOICES:
    rounded = registry.find("rtn")(params, spec_tree, where=WHERE, options=choice)
    for path in paths:
      new = tree_lib.flatten(rounded)[path].dense()
      change = np.asarray(new, np.float64) - np.asarray(flat[path], np.float64)
      terms = 0.5 * np.asarray(scores[path], np.float64) * np.square(change)
      if path == "head":
        losses.setdefault(path, []).append(terms.sum())
        continue
      for k, loss in enumerate(terms.sum(axis=(1, 2))):
        name = f"layer_{k}/{path.split('/', 2)[2]}"
        losses.setdefault(name, []).append(loss)
  return losses


def test_estimates_are_those_of_the_rounding_errors(net, made):
  table = made[0]
  expected = _losses(net)
  assert {unit.name for unit in table.units} == set(expected)
  for unit in table.units:
    np.testing.assert_allclose(unit.losses, expected[unit.name], rtol=1e-3)
  spread = [unit.losses[0] for unit in table.units]
  assert max(spread) > 10 * min(spread)


def test_allocation_equals_search_over_all_mixtures(net, made):
  table = made[0]
  _, params, spec_tree, _ = net
  held = [
    tree_lib.flatten(registry.find("rtn")(params, spec_tree, where=WHERE, options=c))
    for c in CHOICES
  ]
  stack = {"head": 1}
  costs = {
    unit.name: [
      leaves[unit.path].held_bytes() // stack.get(unit.path, 3) for leaves in held
    ]
    for unit in table.units
  }
  losses = _losses(net)
  num_weights = 3 * 2 * 32 * 64 + 32 * 64
  budget = int(4.6 * num_weights / 8)
  best = np.inf
  for mixture in itertools.product(range(3), repeat=len(costs)):
    pairs = list(zip(costs, mixture, strict=True))
    if sum(costs[name][c] for name, c in pairs) <= budget:
      best = min(best, sum(losses[name][c] for name, c in pairs))
  assert table.budget_bytes == budget
  np.testing.assert_allclose(table.mixed.loss, best, rtol=1e-3)
  assert len({unit.choice for unit in table.units}) > 1


def test_bytes_held_are_those_of_the_plan_and_within_the_budget(net, made):
  table, _, params = made
  selected = [
    leaf
    for path, leaf in tree_lib.flatten(params).items()
    if path.endswith(("mlp/up", "mlp/down", "head"))
  ]
  held = sum(leaf.held_bytes() for leaf in selected)
  assert held == table.mixed.bytes <= table.budget_bytes
  bits = 8 * held / sum(np.prod(leaf.shape) for leaf in selected)
  assert table.mixed.bits_per_weight == bits <= 4.6
  others = [
    leaf
    for path, leaf in tree_lib.flatten(net[1]).items()
    if not path.endswith(("mlp/up", "mlp/down", "head"))
  ]
  rest = sum(leaf.nbytes for leaf in others)
  assert bytes_lib.held_bytes(params) == held + rest


def test_no_uniform_choice_that_fits_is_better(net, made):
  table = made[0]
  assert [row.name for row in table.uniform] == [
    "bits=2 group=32 scale_dtype=float16",
    "bits=4",
    "bits=8",
  ]
  for c, row in enumerate(table.uniform):
    assert row.bytes == sum(unit.bytes[c] for unit in table.units)
    assert row.fits == (row.bytes <= table.budget_bytes)
    options = {"choices": CHOICES, "bytes": row.bytes}
    same_bytes = mixed.plan(*net, where=WHERE, options=options)
    assert same_bytes.mixed.bytes <= row.bytes
    assert same_bytes.mixed.loss <= row.loss * (1 + 1e-9)
  # With the middle one's bytes the mixture gains; with the last one's it is that one.
  assert same_bytes.mixed.loss == pytest.approx(table.uniform[-1].loss)
  options = {"choices": CHOICES, "bytes": table.uniform[1].bytes}
  better = mixed.plan(*net, where=WHERE, options=options)
  assert better.mixed.loss < table.uniform[1].loss


def test_units_have_their_choice(net, made):
  table, model, params = made
  unrolled = tree_lib.flatten(layers.unstack(model, params)[1])
  _, before, spec_tree, _ = net
  rounded = [
    tree_lib.flatten(registry.find("rtn")(before, spec_tree, where=WHERE, options=c))
    for c in CHOICES
  ]
  for unit in table.units:
    leaf = unrolled[unit.name]
    assert leaf.bits == CHOICES[unit.choice]["bits"]
    expected = rounded[unit.choice][unit.path]
    if unit.index is not None:
      expected = jax.tree.map(lambda a, i=unit.index: a[i], expected)
    jax.tree.map(np.testing.assert_array_equal, leaf, expected)


def test_layers_differ_and_the_model_runs_and_is_restored(net, made, tmp_path):
  _, model, params = made
  before, *_, batches = net
  assert len(before.runs) == 1 < len(model.runs)
  assert model.config.num_layers == 3
  logits = jax.jit(model.apply)({"params": params}, batches[0]["inputs"])[0]
  assert bool(jnp.all(jnp.isfinite(logits)))
  plain, view = layers.unstack(model, params)
  again_model, again = layers.restack(plain, view)
  assert again_model.runs == model.runs
  jax.tree.map(np.testing.assert_array_equal, again, params)
  got = jax.jit(plain.apply)({"params": view}, batches[0]["inputs"])[0]
  np.testing.assert_allclose(got, logits, atol=1e-4)
  stages.save_stage(tmp_path / "stage", model, params, specs.specs(model))
  loaded = stages.load_stage(tmp_path / "stage")
  assert loaded.model == model
  assert jax.tree.structure(loaded.params) == jax.tree.structure(params)
  jax.tree.map(np.testing.assert_array_equal, loaded.params, params)


def _with_more_text(net):
  """As many tokens as any matrix has inputs, which GPTQ asks for."""
  return *net[:3], net[3] * 2


def test_one_choice_is_the_uniform_transform(net):
  net = _with_more_text(net)
  model, params, spec_tree, batches = net
  options = {"choices": ({"bits": 4},), "bits_per_weight": 8, "sensitivity": "output"}
  changed, got = registry.find("mixed")(*net, where=WHERE, options=options)
  expected = registry.find("rtn")(params, spec_tree, where=WHERE, options={"bits": 4})
  assert changed.runs == model.runs
  jax.tree.map(np.testing.assert_array_equal, got, expected)
  stats = calibrate.calibrate(model, params, batches, collect=("hessian",))
  changed, got = registry.find("mixed")(
    *net, where=WHERE, options=options | {"rounding": "gptq"}
  )
  expected = registry.find("gptq")(params, spec_tree, stats, where=WHERE)
  assert changed.runs == model.runs
  jax.tree.map(np.testing.assert_array_equal, got, expected)


def test_outputs_suffer_less_from_gptq(net):
  net = _with_more_text(net)
  options = {"choices": CHOICES[1:2], "bits_per_weight": 6, "sensitivity": "output"}
  where = {"path": "mlp/down$"}
  rtn = mixed.plan(*net, where=where, options=options)
  gptq = mixed.plan(*net, where=where, options=options | {"rounding": "gptq"})
  assert gptq.uniform[0].loss < 0.9 * rtn.uniform[0].loss
  assert gptq.mixed.bytes <= gptq.budget_bytes == rtn.budget_bytes


def test_traces_times_squared_changes(net):
  model, params, _, batches = net
  options = {"choices": CHOICES, "sensitivity": "hessian", "bits_per_weight": 5}
  table = mixed.plan(*net, where={"path": "^head$"}, options=options)
  trace = derivatives.hessian_traces(model, params, batches, ["head"])["head"]
  assert float(trace) > 0  # the loss is convex in the head
  (unit,) = table.units
  rounded = registry.find("rtn")(
    params, net[2], where={"path": "^head$"}, options=CHOICES[0]
  )
  change = np.square(np.asarray(rounded["head"].dense() - params["head"]))
  np.testing.assert_allclose(
    unit.losses[0], 0.5 * float(trace) * change.mean(), rtol=1e-4
  )
  assert unit.choice == 1


def test_the_log_has_the_uniform_choices(net, caplog):
  options = {"choices": CHOICES, "bits_per_weight": 4.8, "sensitivity": "output"}
  with caplog.at_level(logging.INFO):
    registry.find("mixed")(*net, where=WHERE, options=options)
  lines = [r.message for r in caplog.records if r.message.startswith("mixed: ")]
  assert sum(" of 7 matrices with " in line for line in lines) == 3
  uniform = [line for line in lines if line.startswith("mixed: uniform ")]
  assert [line.split(":")[1].strip() for line in uniform] == [
    "uniform bits=2 group=32 scale_dtype=float16",
    "uniform bits=4",
    "uniform bits=8",
  ]
  assert "over the budget" in uniform[2] and "over the budget" not in uniform[1]


def test_an_unrolled_model_stays_so_and_gets_the_same(net, made):
  model, params, _, batches = net
  plain, view = layers.unstack(model, params)
  options = {"choices": CHOICES, "bits_per_weight": 4.6}
  changed, got = registry.find("mixed")(
    plain, view, specs.specs(plain), batches, where=WHERE, options=options
  )
  assert changed.runs is None
  expected = layers.unstack(made[1], made[2])[1]
  assert jax.tree.structure(got) == jax.tree.structure(expected)
  jax.tree.map(np.testing.assert_array_equal, got, expected)


def test_shapes_are_those_of_the_largest_choice(net):
  model, params, spec_tree, _ = net
  technique = registry.find("mixed")
  options = {"choices": CHOICES, "bits_per_weight": 4.6}
  shapes = jax.eval_shape(lambda: params)
  same, got = technique.shapes(model, shapes, spec_tree, where=WHERE, options=options)
  expected = registry.find("rtn")(params, spec_tree, where=WHERE, options={"bits": 8})
  assert same == model
  assert jax.tree.structure(got) == jax.tree.structure(expected)
  jax.tree.map(
    lambda a, b: np.testing.assert_array_equal(a.shape, b.shape), got, expected
  )
  refused = lambda message: pytest.raises(errors.InputError, match=message)
  with refused("group 24 does not divide the input axis of"):
    wrong = {"choices": ({"bits": 4, "group": 24}, {"bits": 8})}
    technique.shapes(model, shapes, spec_tree, where=WHERE, options=wrong)
  with refused(r"budget of 100 bytes .* cheapest choices take \d+"):
    technique.shapes(model, shapes, spec_tree, where=WHERE, options={"bytes": 100})
  with refused("head is already a quantized leaf"):
    again = jax.eval_shape(lambda: expected)
    technique.shapes(model, again, spec_tree, where=WHERE, options=options)
  with refused("no selected weight contracts an input"):
    where, output = {"kind": "embedding"}, {"sensitivity": "output"}
    technique.shapes(model, shapes, spec_tree, where=where, options=output)


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"choices": ()}, "choices are empty"),
    ({"bits_per_weight": 3.0, "bytes": 10}, "give one of them"),
    ({"bits_per_weight": 0.0}, "must be positive"),
    ({"sensitivity": "fisher"}, "unknown sensitivity"),
    ({"allocation": "lp"}, "unknown allocation"),
    ({"rounding": "awq"}, "unknown rounding"),
    ({"choices": ({"bit": 3},)}, r"field of choices\[0\] 'bit'; did you mean 'bits'"),
    ({"choices": ({"bits": 4}, {"bits": 7})}, r"choices\[1\]: bits=7"),
    ({"choices": ({"damping": 0.1},)}, "unknown field"),
  ],
)
def test_bad_options_are_refused(options, message):
  with pytest.raises(errors.InputError, match=message):
    registry.find("mixed").options(options)


def test_default_budget():
  options = registry.find("mixed").options({})
  assert options.bits_per_weight == 4.0 and options.budget_bytes(80) == 40
  assert registry.find("mixed").options({"bytes": 7}).budget_bytes(80) == 7
