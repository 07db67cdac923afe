"""What is removed equals what is zero, for everything that can be removed.

Each case sets some groups to zero, by indices written out by hand, and prunes by
magnitude as many: the smaller model must compute what the one with zeros does.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.compress import api, registry
from effjax.core import errors, layers
from effjax.core import specs as specs_lib
from effjax.core import tree as tree_lib
from effjax.models import encoder, encoder_config
from effjax.nn.mlps import moe
from effjax.weights.leaves import masked
from tests import selection
from tests.compress.prune import removals

_EACH_TIME = (
  "neurons with biases",
  "heads, one of each key head",
  "key groups",
  "latent heads",
  "neurons of shared experts and of each expert",
  "heads of a state space",
  "heads of each group of a state space",
  "value heads of the gated delta rule",
)


@pytest.mark.parametrize("name", selection.quick(removals.CASES, _EACH_TIME))
def test_removed_equals_zero(name):
  case = removals.CASES[name]
  model = removals.model_of(case)
  params = removals.with_zeros(model, removals.params_of(model), case.zero)
  smaller, fewer = removals.pruned(
    model, params, groups=case.groups, sparsity=case.sparsity, score="magnitude"
  )
  tokens_BL = removals.tokens()
  expected = removals.logits_of(model, params, tokens_BL)
  got = removals.logits_of(smaller, fewer, tokens_BL)
  np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
  # Nothing is left of them: every group that was zero is gone, and nothing else.
  removed = sum(a.size for a in jax.tree.leaves(params)) - sum(
    a.size for a in jax.tree.leaves(fewer)
  )
  _, tree = layers.unstack(model, params)
  flat = tree_lib.flatten(tree)
  zeros = sum(
    flat[f"layer_{k}/{end}"].size
    * np.size(at)
    // np.prod([flat[f"layer_{k}/{end}"].shape[d] for d in _counted(at, dim)])
    for k, own in enumerate(case.zero)
    for end, (dim, at) in own.items()
  )
  assert removed == zeros > 0
  assert smaller.runs == model.runs


def _counted(at, dim):
  return (0, dim) if isinstance(at[0], list) else (dim,)


@pytest.mark.parametrize(
  ("router", "gone"),
  [
    ({"router": "top_k"}, ([1], [2])),
    ({"router": "sigmoid", "num_groups": 2, "num_experts": 6}, ([1, 4], [0, 5])),
  ],
)
def test_a_removed_expert_is_one_that_is_never_chosen(monkeypatch, router, gone):
  options = removals.EXPERTS | router
  case = removals.Case(
    groups="experts", sparsity=0, mlp="moe", mlp_options=options, zero=({}, {})
  )
  model = removals.model_of(case, scan=False)
  dims = {"mlp/gate": -3, "mlp/up": -3, "mlp/down": -3, "mlp/router": -1}
  zero = removals.zeros(dims, *gone)
  params = removals.with_zeros(model, removals.params_of(model), zero)
  smaller, fewer = removals.pruned(
    model, params, groups="experts", sparsity=0.3, score="magnitude"
  )
  left = options["num_experts"] - len(gone[0])
  assert smaller.config.layers[0].mlp_options["num_experts"] == left
  got = removals.logits_of(smaller, fewer, removals.tokens())
  number = iter(gone)
  if router["router"] == "sigmoid":
    never = removals.zeros({"mlp/balance": -1}, *gone)
    params = removals.with_zeros(model, params, never, -1e9)
  logits = moe.MoE._logits

  def without(self, x_TD):
    return logits(self, x_TD).at[:, jnp.array(next(number))].set(-jnp.inf)

  monkeypatch.setattr(moe.MoE, "_logits", without)
  expected = removals.logits_of(model, params, removals.tokens())
  np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("share", [1, 2])
def test_removed_layers_pass_the_stream_by(share):
  model = removals.deep(num_layers=4 * share, share=share)
  dims = {"mixer/o": -1, "mlp/down": -1}
  whole = {end: (dim, list(range(removals.DIM))) for end, dim in dims.items()}
  params = removals.with_zeros(model, removals.params_of(model), ({}, whole, {}, whole))
  batches = [{"inputs": removals.tokens()}]
  for score in ("influence", "fisher", "wanda"):
    smaller, fewer = removals.pruned(
      model, params, batches, groups="layers", sparsity=0.5, score=score
    )
    assert smaller.config.num_layers == 2 * share
    expected = removals.logits_of(model, params, removals.tokens())
    got = removals.logits_of(smaller, fewer, removals.tokens())
    atol = 1e-5 * np.abs(expected).max()
    np.testing.assert_allclose(got, expected, rtol=0, atol=atol)


def test_groups_of_shared_parameters_go_from_every_use():
  model = removals.deep(num_layers=4, share=2)
  dims = {"mlp/gate": -1, "mlp/up": -1, "mlp/down": -2}
  zero = removals.zeros(dims, (1, 6, 9, 15), (0, 2, 3, 8))
  params = removals.with_zeros(model, removals.params_of(model), zero)
  smaller, fewer = removals.pruned(model, params, sparsity=0.25, score="magnitude")
  expected = removals.logits_of(model, params, removals.tokens())
  got = removals.logits_of(smaller, fewer, removals.tokens())
  np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_layers_of_equal_sizes_stay_scanned_together_and_a_mask_goes_along():
  model = removals.deep()
  params = removals.params_of(model)
  flat = tree_lib.flatten(params)
  path = "run_0/layer_0/mlp/up"
  mask = jnp.asarray(np.random.default_rng(2).random(flat[path].shape) < 0.5)
  flat[path] = masked.Masked.create(flat[path], mask)
  params = tree_lib.unflatten(flat)
  smaller, fewer = removals.pruned(model, params, sparsity=0.5, score="magnitude")
  assert smaller.runs == model.runs
  up = tree_lib.flatten(fewer)[path]
  assert isinstance(up, masked.Masked)
  assert up.shape == (4, removals.DIM, 8)
  removals.logits_of(smaller, fewer, removals.tokens())


def test_an_encoder_is_pruned_like_a_decoder():
  config = encoder_config.EncoderConfig(
    vocab_size=removals.VOCAB,
    embed_dim=removals.DIM,
    num_layers=2,
    max_len=16,
    mixer_options={"attention": removals.GQA | {"num_kv_heads": 4, "position": "none"}},
  )
  model = encoder.Encoder(config)
  dims = {f"mixer/{n}": -1 for n in ("q", "k", "v")} | {"mixer/o": -2}
  flat = tree_lib.flatten(removals.params_of(model))
  ends = [f"mixer/{name}_bias" for name in "qkv"]
  biased = [end for end in ends if any(path.endswith(end) for path in flat)]
  dims |= dict.fromkeys(biased, -1)
  zero = removals.zeros(dims, (0,), (3,), sizes=4)
  params = removals.with_zeros(model, removals.params_of(model), zero)
  smaller, fewer = removals.pruned(
    model, params, groups="heads", sparsity=0.25, score="magnitude"
  )
  expected = removals.logits_of(model, params, removals.tokens())
  got = removals.logits_of(smaller, fewer, removals.tokens())
  np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
  with pytest.raises(errors.InputError, match="an encoder has no loss"):
    removals.pruned(model, params, [{"inputs": removals.tokens()}], score="taylor")


def test_a_lender_stays_and_its_borrower_may_go():
  model = removals.deep(share_keys=2)
  params = removals.params_of(model)
  smaller, fewer = removals.pruned(
    model, params, groups="layers", sparsity=0.5, score="random"
  )
  assert [layer.keys for layer in smaller.config.layers] == ["lent", "lent"]
  removals.logits_of(smaller, fewer, removals.tokens())
  with pytest.raises(errors.InputError, match="of which 2 can go"):
    removals.pruned(model, params, groups="layers", sparsity=0.75, score="random")


def test_a_compressed_leaf_has_no_parts_to_take_out():
  model = removals.deep()
  params = removals.params_of(model)
  specs = specs_lib.specs(model)
  _, params = api.transform(registry.find("rtn"), model, params, specs)
  with pytest.raises(errors.InputError, match="remove groups first and compress"):
    removals.pruned(model, params, score="random")


def test_shapes_are_those_of_the_outcome():
  model = removals.deep()
  params = removals.params_of(model)
  specs = specs_lib.specs(model)
  for options in ({"groups": "kv_groups", "sparsity": 0.5}, {"groups": "layers"}):
    options = {"score": "magnitude"} | options
    changed, shapes = api.shapes(
      removals.STRUCTURED, model, params, specs, options=options
    )
    smaller, fewer = removals.pruned(model, params, **options)
    assert changed == smaller
    assert jax.tree.map(jnp.shape, fewer) == jax.tree.map(lambda a: a.shape, shapes)
