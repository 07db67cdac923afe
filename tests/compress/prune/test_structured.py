"""Scores, sizes and mistakes of structured pruning."""

import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.compress import api, calibrate
from effjax.compress.prune import _group_scores, _group_sizes, _removal, structured
from effjax.core import errors, layers
from effjax.core import groups as groups_lib
from effjax.core import specs as specs_lib
from effjax.core import tree as tree_lib
from effjax.models import config as config_lib
from effjax.models import decoder
from effjax.ops import flops
from tests.compress.prune import removals


def test_the_loss_without_a_layer_is_that_of_the_smaller_model():
  model, batches = removals.deep(), [{"inputs": removals.tokens()}]
  params = removals.params_of(model)
  got = _group_scores.of_layers("loss", model, params, batches, {}, 0)
  flat = tree_lib.flatten(layers.unstack(model, params)[1])
  for k in range(4):
    kept = [other for other in range(4) if other != k]
    smaller, fewer = _removal.without_layers(model.with_runs(None), flat, kept)
    logits = removals.logits_of(smaller, tree_lib.unflatten(fewer), removals.tokens())[
      :, :-1
    ]
    logits = logits - jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    targets = np.asarray(removals.tokens())[:, 1:, None]
    expected = -np.mean(np.take_along_axis(np.asarray(logits), targets, axis=-1))
    np.testing.assert_allclose(got[k], expected, rtol=1e-5)


@pytest.mark.parametrize("groups", ["neurons", "heads", "kv_groups"])
def test_gates_are_derivatives_by_what_groups_write(groups):
  """Taylor and Fisher against gates written out: rows of outputs times (1 - t e_j)."""
  model, tokens_BL = removals.deep(num_layers=2), removals.tokens()
  params = removals.params_of(model)
  unrolled, tree = layers.unstack(model, params)
  flat = tree_lib.flatten(tree)
  end, size, units = {
    "neurons": ("mlp/down", 1, 16),
    "heads": ("mixer/o", 4, 4),
    "kv_groups": ("mixer/o", 8, 2),
  }[groups]

  def loss(gates, rows):
    gated = dict(flat)
    for k in range(2):
      scale = jnp.repeat(gates[k], size)[:, None]
      gated[f"layer_{k}/{end}"] = flat[f"layer_{k}/{end}"] * scale
    logits = unrolled.apply({"params": tree_lib.unflatten(gated)}, rows)[0][:, :-1]
    hit = jnp.take_along_axis(logits, rows[:, 1:, None], axis=-1)[..., 0]
    return jnp.sum(jax.nn.logsumexp(logits, axis=-1) - hit)

  ones = jnp.ones((2, units))
  by_row = np.stack(
    [jax.jit(jax.grad(loss))(ones, tokens_BL[i : i + 1]) for i in range(2)]
  )
  count = 2 * (removals.LENGTH - 1)
  about = tree_lib.flatten(specs_lib.specs(unrolled))
  families = groups_lib.families(about, structured.AXES[groups])
  batches = [{"inputs": tokens_BL[:1]}, {"inputs": tokens_BL[1:]}]
  taylor, fisher = (
    _group_scores.of_families(score, model, params, batches, families, 0)
    for score in ("taylor", "fisher")
  )
  for k in range(2):
    first = np.abs(by_row.sum(0)[k]) / count
    second = 0.5 * np.square(by_row)[:, k].sum(0) / count
    np.testing.assert_allclose(taylor[k][0], first, rtol=1e-4, atol=1e-6 * first.max())
    np.testing.assert_allclose(fisher[k][0], second, rtol=1e-4)


def test_wanda_is_the_energy_of_what_groups_write():
  case = removals.CASES["neurons of shared experts and of each expert"]
  model, tokens_BL = removals.model_of(case), removals.tokens()
  params = removals.params_of(model)
  unrolled = model.with_runs(None)
  about = tree_lib.flatten(specs_lib.specs(unrolled))
  families = groups_lib.families(about, "mlp")
  batches = [{"inputs": tokens_BL}]
  scores = _group_scores.of_families("wanda", model, params, batches, families, 0)
  inputs = calibrate.calibrate(model, params, batches, collect=("hessian",))
  _, stats = layers.unstack(model, inputs)
  _, tree = layers.unstack(model, params)
  for family, got in zip(families, scores, strict=True):
    path = family.outputs[0]
    second = np.asarray(tree_lib.flatten(stats)[path].hessian)
    w = np.asarray(tree_lib.flatten(tree)[path])
    # What one unit writes is x_j w_j: its energy is x_j^2 times |w_j|^2.
    energy = np.diagonal(second, axis1=-2, axis2=-1) * np.square(w).sum(-1)
    np.testing.assert_allclose(got, np.atleast_2d(energy) / tokens_BL.size, rtol=1e-5)


@pytest.mark.parametrize("groups", ["neurons", ("neurons", "heads")])
@pytest.mark.parametrize("budget", ["global", "params", "flops"])
def test_budgets_save_what_they_are_asked_for(groups, budget):
  model = removals.deep(num_layers=3)
  params = removals.params_of(model)
  share = 0.3 if budget == "global" else 0.15
  smaller, fewer = removals.pruned(
    model,
    params,
    groups=groups,
    sparsity=share,
    score="random",
    budget=budget,
    tokens=removals.LENGTH,
  )
  cost = lambda m, p: _cost(budget, groups, m, p)
  before, after = cost(model, params), cost(smaller, fewer)
  assert after <= (1 - share) * before
  # Nothing more than one size further than asked for.
  step = 4 if budget == "global" else 0.08 * before
  assert after > (1 - share) * before - step
  sizes = {layer.build_mlp_options().hidden_dim for layer in smaller.config.layers}
  assert len(sizes) > 1 or groups != "neurons"


def _cost(budget, groups, model, params):
  if budget == "global":
    heads = int(groups != "neurons")
    return sum(
      layer.build_mlp_options().hidden_dim
      + heads * layer.build_mixer_options().num_heads
      for layer in model.config.layers
    )
  if budget == "params":
    layers_only = {k: v for k, v in params.items() if k.startswith(("run", "layer"))}
    return sum(a.size for a in jax.tree.leaves(layers_only))
  whole = lambda p, t: model.apply({"params": p}, t)[0]
  outside = 2 * removals.LENGTH * removals.VOCAB * removals.DIM
  return flops.dot_flops(whole, params, removals.tokens()[:1]) - outside


def test_a_budget_chooses_as_trying_everything_does():
  """One family a layer, every combination of sizes tried by hand."""
  model = removals.deep(num_layers=3)
  unrolled = model.with_runs(None)
  about = tree_lib.flatten(specs_lib.specs(unrolled))
  families = groups_lib.families(about, "kv") + groups_lib.families(about, "mlp")
  rng = np.random.default_rng(3)
  scores = [rng.random((1, f.num_units)) for f in families]
  options = structured.StructuredOptions(
    groups=("kv_groups", "neurons"), sparsity=0.3, budget="params", multiple_of=1
  )
  found = _group_sizes.choices(unrolled, families, options)
  counts = _group_sizes.budgeted(families, scores, found)
  per_unit = [4 * removals.DIM * (2 + 4), 3 * removals.DIM]
  total = 3 * (2 * per_unit[0] + 16 * per_unit[1] + 2 * removals.DIM)
  rate = [per_unit[0]] * 3 + [per_unit[1]] * 3
  rising = [np.concatenate([[0], np.cumsum(np.sort(s[0]))]) for s in scores]
  saved = sum(
    r * (f.num_units - n) for r, f, n in zip(rate, families, counts, strict=True)
  )
  lost = sum(
    c[f.num_units - n] for c, f, n in zip(rising, families, counts, strict=True)
  )
  assert saved >= 0.3 * total
  best = np.inf
  ranges = [range(f.num_units) for f in families]
  for gone in itertools.product(*ranges[:3]):
    left = 0.3 * total - sum(r * g for r, g in zip(rate, gone, strict=False))
    each = max(0, int(np.ceil(left / per_unit[1])))
    loss = sum(c[g] for c, g in zip(rising, gone, strict=False))
    pool = np.sort(np.concatenate([np.sort(s[0])[:-1] for s in scores[3:]]))
    if each <= pool.size:
      best = min(best, loss + pool[:each].sum())
  # Greedy steps along hulls: the last one may be worth less than all it saves.
  assert best <= lost <= best + max(s.max() for s in scores)


def test_latency_removes_layers_that_take_time():
  model = removals.deep(num_layers=3)
  params = removals.params_of(model)
  smaller, _ = removals.pruned(
    model,
    params,
    groups="layers",
    sparsity=0.3,
    score="random",
    budget="latency",
    tokens=removals.LENGTH,
  )
  assert 1 <= smaller.config.num_layers < 3


def test_kept_numbers_are_multiples():
  model = removals.deep()
  smaller, _ = removals.pruned(
    model, removals.params_of(model), sparsity=0.4, score="random", multiple_of=4
  )
  assert {x.build_mlp_options().hidden_dim for x in smaller.config.layers} == {8}


@pytest.mark.parametrize(
  ("model", "options", "message"),
  [
    ({}, {"sparsity": 1.0}, "sparsity=1.0 must be at least 0 and below 1"),
    ({}, {"groups": "head"}, "unknown groups 'head'"),
    ({}, {"groups": ("layers", "heads")}, "groups='layers' goes alone"),
    ({}, {"score": "influence"}, "unknown score of neurons 'influence'"),
    ({}, {"budget": "erk"}, "unknown budget 'erk'"),
    ({}, {"score": "taylor"}, "needs at least one batch"),
    ({}, {"groups": "experts"}, "no selected module has experts"),
    ({}, {"groups": ("heads", "kv_groups")}, "overlap in layer_0/mixer"),
    (
      {},
      {"groups": "heads", "sparsity": 0.8},
      "nothing would be left of layer_0/mi",
    ),
    (
      {},
      {"groups": "layers", "sparsity": 0.9, "score": "random"},
      "would remove 4 of 4 layers, of which 3 can go",
    ),
    (
      {},
      {"sparsity": 0.9, "budget": "params"},
      "of the parameters of all layers cannot be saved: without all neurons",
    ),
    (
      {"mixer_options": {"attention": removals.GQA | {"position": "alibi"}}},
      {"groups": "heads"},
      "the slope of a head is that of its number",
    ),
    (
      {"pattern": ("retnet",), "mixer_options": {"retnet": {"head_dim": 4}}},
      {"groups": "ssm_heads"},
      "the decay of a head is that of its number",
    ),
    ({"share_keys": 2}, {"groups": "heads"}, "its heads are tied to those of other"),
    (
      {"mlp": "moe", "mlp_options": {"moe": removals.EXPERTS}},
      {"groups": "experts", "sparsity": 0.75},
      "top_k=2 must not exceed num_experts=1",
    ),
  ],
)
def test_mistakes_get_one_line(model, options, message):
  fields = {
    "vocab_size": removals.VOCAB,
    "embed_dim": removals.DIM,
    "num_layers": 4,
    "mixer_options": {"attention": removals.GQA},
    "mlp_options": {"swiglu": {"hidden_dim": 16}},
  }
  model = decoder.Decoder(config_lib.DecoderConfig(**fields | model))
  params = removals.params_of(model)
  options = {"score": "random"} | options
  with pytest.raises(errors.InputError, match=re.escape(message)) as caught:
    removals.pruned(model, params, **options)
  assert "\n" not in str(caught.value)
  if options["score"] == "random":
    # A plan says so, too, on shapes.
    specs = specs_lib.specs(model)
    with pytest.raises(errors.InputError, match=re.escape(message)):
      api.shapes(removals.STRUCTURED, model, params, specs, options=options)


def test_what_cannot_be_saved_is_found_before_anything_is_scored(monkeypatch):
  def score(*args):
    raise AssertionError("scored")

  monkeypatch.setattr(_group_scores, "of_families", score)
  model = removals.deep()
  with pytest.raises(errors.InputError, match="cannot be saved"):
    removals.pruned(
      model, removals.params_of(model), sparsity=0.9, budget="flops", score="magnitude"
    )


def test_a_plan_of_layers_that_differ_has_the_largest_outcome():
  config = config_lib.DecoderConfig(
    vocab_size=removals.VOCAB,
    embed_dim=removals.DIM,
    num_layers=4,
    mlp_pattern=("swiglu", "none"),
    mixer_options={"attention": removals.GQA},
  )
  model = decoder.Decoder(config)
  params, specs = removals.params_of(model), specs_lib.specs(model)
  options = {"groups": "layers", "sparsity": 0.5, "score": "random"}
  planned, shapes = api.shapes(
    removals.STRUCTURED, model, params, specs, options=options
  )
  assert [layer.mlp for layer in planned.config.layers] == ["swiglu", "swiglu"]
  _, made = removals.pruned(model, params, **options)
  size = lambda tree: sum(a.size for a in jax.tree.leaves(tree))
  assert size(made) <= size(shapes) < size(params)
