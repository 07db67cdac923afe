"""Layers that use the keys and values of an earlier one: cross-layer attention."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.core import config as core_config
from effjax.core import errors, layers, specs
from effjax.core import tree as tree_lib
from effjax.models import config as config_lib
from effjax.models import decoder, encoder_config
from effjax.ops.attention import rope
from tests.models.conftest import small_config

CONFIG = {"num_layers": 4, "pattern": ("attention",), "share_keys": 2}
HEADS, KV_HEADS, HEAD_DIM = 4, 2, 8


def _model(**changes):
  """`(model, params, tokens_BL)`."""
  model = decoder.Decoder(small_config(**CONFIG | changes))
  tokens_BL = jax.random.randint(jax.random.key(0), (2, 9), 0, 64)
  return model, jax.jit(model.init)(jax.random.key(1), tokens_BL)["params"], tokens_BL


def _reference(params, tokens_BL):
  """Brandon et al. 2024, section 2.2, one layer after the other."""
  normed = lambda x, p: x * jax.lax.rsqrt((x**2).mean(-1, keepdims=True) + 1e-5) * p
  heads = lambda x, n: x.reshape(*x.shape[:2], n, HEAD_DIM)
  positions = jnp.broadcast_to(jnp.arange(tokens_BL.shape[1]), tokens_BL.shape)
  rotated = lambda x: rope.rope(x, positions, 10_000.0)
  mask = jnp.tril(jnp.ones((tokens_BL.shape[1],) * 2, bool))[None, None]
  table = params["embed"]["table"]
  x = table[tokens_BL]
  for k in range(4):
    layer = params[f"layer_{k}"]
    mixer, mlp = layer["mixer"], layer["mlp"]
    h = normed(x, layer["mixer_norm"]["scale"][None, None])
    if k % 2 == 0:  # The next layer finds these keys and values still there.
      keys = jnp.repeat(rotated(heads(h @ mixer["k"], KV_HEADS)), 2, axis=2)
      values = jnp.repeat(heads(h @ mixer["v"], KV_HEADS), 2, axis=2)
    queries = rotated(heads(h @ mixer["q"], HEADS))
    scores = jnp.einsum("blhk,bshk->bhls", queries, keys) / HEAD_DIM**0.5
    weights = jax.nn.softmax(jnp.where(mask, scores, -jnp.inf))
    y = jnp.einsum("bhls,bshk->blhk", weights, values)
    x += y.reshape(*x.shape[:2], -1) @ mixer["o"]
    h = normed(x, layer["mlp_norm"]["scale"][None, None])
    x += (jax.nn.silu(h @ mlp["gate"]) * (h @ mlp["up"])) @ mlp["down"]
  x = normed(x, params["final_norm"]["scale"][None, None])
  return x @ table.T


def test_equals_the_reference_in_outputs_and_gradients():
  model, params, tokens_BL = _model()
  probe = jax.random.normal(jax.random.key(2), (2, 9, 64))
  assert [(run.period, run.repeats) for run in model.runs] == [(2, 2)]

  def ours(params):
    return jnp.sum(model.apply({"params": params}, tokens_BL)[0] * probe)

  def reference(params):
    apart = layers.unstack(model, params)[1]
    return jnp.sum(_reference(apart, tokens_BL) * probe)

  value, gradients = jax.jit(jax.value_and_grad(ours))(params)
  expected, of_reference = jax.jit(jax.value_and_grad(reference))(params)
  np.testing.assert_allclose(value, expected, rtol=1e-4)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4, rtol=1e-4),
    gradients,
    of_reference,
  )


def test_borrowers_hold_no_keys_and_no_cache():
  model, params, _ = _model()
  flat = tree_lib.flatten(specs.specs(model))
  names = lambda body: {p.split("/")[-1] for p in flat if f"{body}/mixer/" in p}
  assert names("layer_0") == {"q", "k", "v", "o"}
  assert names("layer_1") == {"q", "o"}
  size = sum(a.size for a in jax.tree.leaves(params))
  own, of_own, _ = _model(share_keys=1)
  saved = 2 * 2 * 32 * KV_HEADS * HEAD_DIM  # k and v of two layers
  assert sum(a.size for a in jax.tree.leaves(of_own)) - size == saved
  held = lambda model: sum(
    a.nbytes for a in jax.tree.leaves(model.init_state(1, 32)) if a.ndim > 2
  )
  assert held(own) == 2 * held(model)


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("unrolled", [False, True])
def test_prefill_and_steps_equal_the_parallel_form(window, unrolled):
  options = {"attention": {"head_dim": HEAD_DIM, "window": window}}
  model, params, tokens_BL = _model(mixer_options=options)
  whole = jax.jit(model.apply)({"params": params}, tokens_BL)[0]
  if unrolled:
    model, params = layers.unstack(model, params)
  apply = jax.jit(model.apply)
  state = model.init_state(2, 12)
  # The second row is one shorter: padding must not reach the shared cache.
  segments = jnp.array([[1] * 6, [1] * 5 + [0]])
  first, state = apply(
    {"params": params}, tokens_BL[:, :6], segments=segments, state=state
  )
  np.testing.assert_allclose(first[0], whole[0, :6], atol=1e-4)
  np.testing.assert_allclose(first[1, :5], whole[1, :5], atol=1e-4)
  for step in range(3):
    places = np.array([6, 5]) + step
    tokens = tokens_BL[np.arange(2), places][:, None]
    logits, state = apply({"params": params}, tokens, state=state)
    np.testing.assert_allclose(logits[:, 0], whole[np.arange(2), places], atol=1e-4)


def test_taken_apart_and_put_together_again():
  model, params, tokens_BL = _model()
  expected = jax.jit(model.apply)({"params": params}, tokens_BL)[0]
  apart, of_apart = layers.unstack(model, params)
  again, of_again = layers.restack(apart, of_apart)
  assert again.runs == model.runs
  jax.tree.map(np.testing.assert_array_equal, of_again, params)
  found = jax.jit(apart.apply)({"params": of_apart}, tokens_BL)[0]
  np.testing.assert_allclose(found, expected, atol=1e-5)


def test_layers_that_belong_together_are_scanned_together():
  config = small_config(**CONFIG | {"share_keys": 4})
  assert [(run.period, run.repeats) for run in config.resolved_runs] == [(4, 1)]
  mixed = small_config(
    num_layers=8,
    pattern=("mamba2",) * 4 + ("attention",) * 4,
    mlp="none",
    share_keys=1,
  )
  lent = config_lib.lending(2, mixed.layers[4:])
  both = small_config(layers=mixed.layers[:4] + lent)
  assert [(run.period, run.repeats) for run in both.resolved_runs] == [(1, 4), (2, 2)]
  assert config_lib.from_dict(core_config.to_dict(both)) == both


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"share_keys": 3}, "share_keys=3 must divide num_layers=4"),
    ({"share_keys": 0}, "share_keys must be positive"),
    ({"share": 2}, "cannot both be more than 1"),
    ({"pattern": ("mamba2",)}, "'mamba2' has no keys and values"),
    ({"pattern": ("longformer",)}, "'longformer' has no keys and values"),
    (
      {"pattern": ("mamba2", "attention")},
      r"layer 1 \(attention\) the keys of layer 0",
    ),
    ({"runs": ((1, 1), (3, 1))}, "part a layer from the one whose keys it borrows"),
  ],
)
def test_bad_sharing_is_one_clear_line(changes, message):
  with pytest.raises(errors.InputError, match=message):
    small_config(**CONFIG | changes)


def test_nobody_borrows_where_nobody_lends():
  layer = config_lib.LayerConfig(mixer="attention", keys="borrowed")
  with pytest.raises(errors.InputError, match="no layer before it has keys='lent'"):
    small_config(layers=(layer,))
  lender = config_lib.LayerConfig(mixer="attention", keys="lent")
  with pytest.raises(errors.InputError, match="only a decoder's share them"):
    encoder_config.EncoderConfig(vocab_size=8, embed_dim=32, layers=(lender,))
  with pytest.raises(errors.InputError, match="did you mean 'borrowed'"):
    config_lib.LayerConfig(mixer="attention", keys="borowed")
