"""Models taken apart, and transforms calibrated layer by layer."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.compress import api as compress
from effjax.compress import blocks, calibrate, sequential
from effjax.compress import registry as transforms
from effjax.core import errors, layers, specs
from effjax.core import tree as tree_lib
from effjax.models import decoder
from tests.models.conftest import small_config

_MOE = {"moe": {"num_experts": 3, "hidden_dim": 32, "router": "sigmoid"}}


def made(**changes):
  model = decoder.Decoder(small_config(**({"pattern": ("attention",)} | changes)))
  tokens_BL = jax.random.randint(jax.random.key(0), (8, 16), 0, 64)
  params = jax.jit(model.init)(jax.random.key(1), tokens_BL)["params"]
  segments_BL = jnp.ones((8, 16), jnp.int32).at[1, 5:].set(0)
  return model, params, [{"inputs": tokens_BL, "segments": segments_BL}]


def walked(model, params, batch):
  _, flat = layers.unstack(model, params)
  parts = blocks.Blocks(model)
  stream = parts.embed(flat, batch)
  for k in range(parts.num_layers):
    stream = blocks.run(parts.layer(k), flat[f"layer_{k}"], stream)
  return parts.head(flat, stream)


@pytest.mark.parametrize(
  "changes",
  [
    {"num_layers": 4},
    {"num_layers": 2, "pattern": ("mamba2", "attention")},
    {"num_layers": 4, "share": 2},
    {"num_layers": 4, "share_keys": 2},
    {"num_layers": 2, "mlp_pattern": ("swiglu", "moe"), "mlp_options": _MOE},
    {"num_layers": 2, "position": "learned", "tie_embeddings": False},
    {"num_layers": 2, "remat": "full"},
  ],
  ids=lambda c: "-".join(c),
)
def test_the_parts_in_a_row_are_the_model(changes):
  model, params, (batch,) = made(**changes)
  got = walked(model, params, batch)
  apply = jax.jit(lambda p, b: model.apply(p, b["inputs"], segments=b["segments"])[0])
  np.testing.assert_allclose(got, apply({"params": params}, batch), atol=1e-5)


def test_equal_layers_share_a_program():
  model, params, (batch,) = made(num_layers=4)
  parts = blocks.Blocks(model)
  assert len({parts.layer(k) for k in range(4)}) == 1
  blocks.run.clear_cache()
  walked(model, params, batch)
  assert blocks.run._cache_size() == 1


@pytest.mark.parametrize(
  "changes", [{"num_layers": 2}, {"num_layers": 4, "share": 2}], ids=("plain", "share")
)
def test_statistics_of_layers_are_those_of_the_model(changes):
  model, params, (batch,) = made(**changes)
  expected = calibrate.calibrate(model, params, [batch], collect=("hessian",))
  unrolled, flat = layers.unstack(model, params)
  expected = tree_lib.flatten(layers.unstack(model, expected)[1])
  parts, stream, found = blocks.Blocks(model), None, {}
  stream = parts.embed(flat, batch)
  for k in range(parts.num_layers):
    name = f"layer_{k}"
    paths = tree_lib.flatten(flat[name])
    args = (parts.layer(k), flat[name], {}, stream, ("hessian",), paths)
    found[name] = calibrate.finished(blocks.observe(*args))
    stream = blocks.run(parts.layer(k), flat[name], stream)
  head = parts.observe_head(flat, {}, stream, ("hessian",), flat["embed"])
  assert not head  # Paths are those of the model, not of a part of it.
  head = parts.observe_head(flat, {}, stream, ("hessian",), ["embed/table"])
  found |= calibrate.finished(head)
  found = tree_lib.flatten(found)
  assert found.keys() == expected.keys()
  for path, stats in found.items():
    for a, b in zip(*map(jax.tree.leaves, (stats, expected[path])), strict=True):
      np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def test_weights_in_the_order_of_their_use():
  model, params, (batch,) = made(num_layers=1)
  _, flat = layers.unstack(model, params)
  parts = blocks.Blocks(model)
  paths = [p for p in tree_lib.flatten(flat["layer_0"]) if "norm" not in p]
  found = blocks.uses(parts.layer(0), flat["layer_0"], parts.embed(flat, batch), paths)
  assert [set(paths) for paths in found] == [
    {"mixer/q", "mixer/k", "mixer/v"},
    {"mixer/o"},
    {"mlp/gate", "mlp/up"},
    {"mlp/down"},
  ]


def test_layer_by_layer_is_calibrated_on_the_quantized_layers_before():
  """Against doing the same by hand, one layer of an unrolled model after the other."""
  model, params, batches = made(num_layers=2)
  gptq, options = transforms.find("gptq"), {"bits": 3}
  args = (gptq, model, params, specs.specs(model), batches)
  _, got = compress.transform(*args, options=options, order="sequential")
  unrolled, flat = layers.unstack(model, params)
  tree = specs.specs(unrolled)
  for k in range(2):
    where = {"kind": "matrix", "path": f"layer_{k}/"}
    flat = compress.transform(
      gptq, unrolled, flat, tree, batches, where=where, options=options
    )[1]
  expected = layers.restack(unrolled, flat)[1]
  assert jax.tree.structure(got) == jax.tree.structure(expected)
  same = [
    np.mean(np.asarray(a) == np.asarray(b))
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True)
    if a.dtype == jnp.uint8
  ]
  assert same and min(same) > 0.995
  one_shot = compress.transform(*args, options=options)[1]
  first, later = ("run_0/layer_0/mlp/down", 0), ("run_0/layer_0/mlp/down", 1)
  codes = lambda tree, at: np.asarray(tree_lib.flatten(tree)[at[0]].codes[at[1]])
  assert np.mean(codes(got, first) == codes(one_shot, first)) > 0.995
  assert np.mean(codes(got, later) == codes(one_shot, later)) < 0.995


def test_true_sequential_sees_what_was_quantized_in_the_same_layer():
  model, params, batches = made(num_layers=1)
  gptq, tree = transforms.find("gptq"), specs.specs(model)
  args = (gptq, model, params, tree, batches)
  options = {"bits": 2}
  plain, true = (
    tree_lib.flatten(compress.transform(*args, options=options, order=order)[1])
    for order in ("sequential", "true_sequential")
  )
  same = lambda name: np.mean(
    np.asarray(plain[name].codes) == np.asarray(true[name].codes)
  )
  assert same("run_0/layer_0/mixer/q") > 0.995
  assert same("run_0/layer_0/mlp/down") < 0.995


def test_a_head_and_a_tied_embedding_come_last():
  for tied in (True, False):
    model, params, batches = made(num_layers=2, tie_embeddings=tied)
    where = {"path": "embed/table" if tied else "head"}
    args = (transforms.find("gptq"), model, params, specs.specs(model), batches)
    got = compress.transform(*args, where=where, order="sequential")[1]
    expected = compress.transform(*args, where=where)[1]
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    assert any(a.dtype == jnp.uint8 for a in jax.tree.leaves(got))


def test_one_layers_statistics_must_fit():
  model, params, batches = made(num_layers=2)
  gptq = transforms.find("gptq")
  with pytest.raises(errors.InputError, match="the limit is 1000"):
    sequential.transform(
      gptq,
      model,
      params,
      batches,
      ["run_0/layer_0/mlp/up"],
      gptq.options({}),
      limit_bytes=1000,
    )


def test_mistakes_have_one_line():
  model, params, batches = made(num_layers=1)
  gptq, tree = transforms.find("gptq"), specs.specs(model)
  with pytest.raises(errors.InputError, match="at least one batch"):
    compress.transform(gptq, model, params, tree)
  with pytest.raises(errors.InputError, match="sequential"):
    compress.transform(gptq, model, params, tree, batches, order="sequentail")
  with pytest.raises(errors.InputError, match="num_tokens"):
    compress.CalibrationConfig(num_tokens=0)


def test_a_function_that_changed_is_noticed():
  model, params, batches = made(num_layers=1)
  scaled = jax.tree.map(lambda a: a * 1.01, params)
  for given in (batches, ()):
    compress.require_equal((model, params), (model, params), given)
    with pytest.raises(errors.InputError, match="changed what the model computes"):
      compress.require_equal((model, params), (model, scaled), given)
