"""The decoder: one function, however it is scanned, packed, stepped or sharded."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from effjax.compress import registry as compress
from effjax.core import config as config_core
from effjax.core import errors, layers, specs
from effjax.core import shard as shard_lib
from effjax.core import tree as tree_lib
from effjax.infer import engine
from effjax.models import config, decoder
from effjax.parallel import mesh as mesh_lib
from effjax.parallel import rules, sharding
from tests.models.conftest import small_config


def _close(a, b, tolerance=1e-4):
  limit = tolerance * max(1.0, float(jnp.max(jnp.abs(b))))
  assert float(jnp.max(jnp.abs(a - b))) <= limit


def _loss(model, tokens_BL):
  def loss(params):
    logits = model.apply({"params": params}, tokens_BL)[0]
    targets = jnp.roll(tokens_BL, -1, axis=1)
    picked = jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], -1)
    return -jnp.mean(picked)

  return loss


def test_short_form_expands_and_round_trips():
  cfg = small_config()
  assert [layer.mixer for layer in cfg.layers] == ["mamba2", "attention"] * 2
  assert cfg.resolved_runs == (layers.Run(2, 2),)
  assert config.from_dict(config_core.to_dict(cfg)) == cfg
  assert cfg.layers[0].mixer_options["conv_taps"] == 4  # defaults are written out


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"pattern": ("mamba",)}, "did you mean 'mamba2'"),
    ({"mlp": "swigl"}, "did you mean 'swiglu'"),
    ({"mixer_options": {"mamba2": {"head_dim": 5}}}, "must divide its 64 inner"),
    ({"mixer_options": {"attention": {"num_kv_heads": 3}}}, "must divide num_heads"),
    ({"mixer_options": {"atention": {}}}, "did you mean 'attention'"),
    ({"mixer_options": {"attention": {"heads": 3}}}, "unknown field"),
    ({"num_layers": 0}, "num_layers must be positive"),
    ({"remat": "al"}, "unknown remat"),
    ({"runs": ((1, 3),)}, "runs cover 3 layers"),
  ],
)
def test_config_mistakes(changes, message):
  with pytest.raises(errors.InputError, match=message):
    small_config(**changes)


def test_specs_know_axes_instances_and_readers(small):
  model, params, _ = small
  tree = tree_lib.flatten(specs.specs(model))
  assert tree.keys() == tree_lib.flatten(params).keys()
  up = tree["run_0/layer_0/mlp/up"]
  down = tree["run_0/layer_0/mlp/down"]
  assert up.instances == ("embed", "run_0/layer_0/mlp:mlp")
  assert up.instances[1] == down.instances[0]
  assert up.reads == "run_0/layer_0/mlp_norm"
  assert down.reads == "run_0/layer_0/mlp/up"
  assert up.stack == ("layers",) and up.shape == (2, 32, 96)
  assert tree["run_0/layer_1/mixer/q"].head_dim == 8
  # The gated norm scales the inner channels of its mixer, so pruning them takes both.
  scale = tree["run_0/layer_0/mixer/norm/scale"]
  assert scale.instances == tree["run_0/layer_0/mixer/out"].instances[:1]


def test_unrolled_equals_scanned_in_outputs_and_gradients(small):
  model, params, tokens_BL = small
  unrolled, flat = layers.unstack(model, params)
  expected, gradient = jax.jit(jax.value_and_grad(_loss(model, tokens_BL)))(params)
  got, flat_gradient = jax.jit(jax.value_and_grad(_loss(unrolled, tokens_BL)))(flat)
  assert abs(got - expected) < 1e-6
  back, restacked = layers.restack(unrolled, flat_gradient)
  assert back.runs == model.runs
  jax.tree.map(lambda a, b: _close(a, b, 1e-5), restacked, gradient)
  assert all(jnp.any(g != 0) for g in jax.tree.leaves(gradient))


def test_layers_that_differ(small):
  """int8 in layers 0 and 1, int4 in 2, a narrower MLP in 3."""
  tokens_BL = small[2]
  model = decoder.Decoder(small_config(pattern=("attention",)))
  params = jax.jit(model.init)(jax.random.key(1), tokens_BL)["params"]
  assert model.runs == (layers.Run(1, 4),)
  unrolled, flat = layers.unstack(model, params)
  rtn = compress.find("rtn")
  spec_tree = specs.specs(unrolled)
  flat = rtn(flat, spec_tree, where={"path": "layer_[01]/", "kind": "matrix"})
  four = {"bits": 4, "group": 8}
  flat = rtn(
    flat, spec_tree, where={"path": "layer_2/", "kind": "matrix"}, options=four
  )
  mlp = flat["layer_3"]["mlp"]
  flat["layer_3"]["mlp"] = {
    "gate": mlp["gate"][:, :40],
    "up": mlp["up"][:, :40],
    "down": mlp["down"][:40],
  }
  cfg = unrolled.config
  narrow = dataclasses.replace(cfg.layers[3], mlp_options={"hidden_dim": 40})
  unrolled = decoder.Decoder(dataclasses.replace(cfg, layers=(*cfg.layers[:3], narrow)))
  expected = jax.jit(unrolled.apply)({"params": flat}, tokens_BL)[0]
  stacked_model, stacked = layers.restack(unrolled, flat)
  assert stacked_model.runs == (layers.Run(1, 2), layers.Run(1, 1), layers.Run(1, 1))
  assert stacked["run_0"]["layer_0"]["mlp"]["up"].shape == (2, 32, 96)
  _close(
    jax.jit(stacked_model.apply)({"params": stacked}, tokens_BL)[0], expected, 1e-5
  )
  again = layers.unstack(stacked_model, stacked)
  assert jax.tree.structure(again[1]) == jax.tree.structure(flat)
  jax.tree.map(np.testing.assert_array_equal, again[1], flat)


def test_a_wrong_shape_names_the_path(small):
  model, params, tokens_BL = small
  flat = tree_lib.flatten(params)
  flat["run_0/layer_0/mlp/up"] = flat["run_0/layer_0/mlp/up"][..., :-1]
  with pytest.raises(errors.InputError, match="run_0/layer_0/mlp/up has shape"):
    model.apply({"params": tree_lib.unflatten(flat)}, tokens_BL)


def test_causal_by_gradient(small):
  model, params, tokens_BL = small

  def future(table_rows):
    """Logits at position 5 as a function of every position's embedding."""
    changed = {**params, "embed": {"table": table_rows}}
    ids = jnp.arange(12)[None]
    return jnp.sum(model.apply({"params": changed}, ids)[0][0, 5])

  untied = small_config(tie_embeddings=False, embed_std=0.5)
  model = decoder.Decoder(untied)
  params = jax.jit(model.init)(jax.random.key(1), tokens_BL)["params"]
  assert 0.45 < float(jnp.std(params["embed"]["table"])) < 0.55
  gradient = jax.jit(jax.grad(future))(params["embed"]["table"])
  moved = jnp.any(gradient[:12] != 0, axis=1)
  assert moved.tolist() == [True] * 6 + [False] * 6


def test_packed_segments_are_isolated(small):
  model, params, tokens_BL = small
  apply = jax.jit(model.apply)
  segments = jnp.array([[1] * 5 + [2] * 7, [1] * 8 + [2] * 2 + [0] * 2])
  positions = jnp.array([[*range(5), *range(7)], [*range(8), 0, 1, 0, 0]])
  packed = apply({"params": params}, tokens_BL, positions, segments)[0]
  for row, start, end in [(0, 0, 5), (0, 5, 12), (1, 0, 8), (1, 8, 10)]:
    alone = apply({"params": params}, tokens_BL[row : row + 1, start:end])[0]
    _close(packed[row, start:end], alone[0])
  assert jnp.all(jnp.isfinite(packed))


@pytest.mark.parametrize("unroll", [False, True])
def test_prefill_and_steps_equal_the_parallel_form(small, unroll):
  model, params, tokens_BL = small
  expected = jax.jit(model.apply)({"params": params}, tokens_BL)[0]
  if unroll:
    model, params = layers.unstack(model, params)
  lengths = jnp.array([7, 4])
  segments = (jnp.arange(8)[None] < lengths[:, None]).astype(jnp.int32)
  state = model.init_state(2, 32)
  apply = jax.jit(model.apply)
  prompt = tokens_BL[:, :8] * segments
  logits, state = apply({"params": params}, prompt, segments=segments, state=state)
  for row, n in enumerate([7, 4]):
    _close(logits[row, :n], expected[row, :n])
  for i in range(4):
    token_B1 = jnp.take_along_axis(tokens_BL, (lengths + i)[:, None], axis=1)
    logits, state = apply({"params": params}, token_B1, state=state)
    for row, n in enumerate([7, 4]):
      _close(logits[row, 0], expected[row, n + i])
  assert state["length_B"].tolist() == [11, 8]


def test_logits_of_one_place_are_those_of_all(small):
  model, params, tokens_BL = small
  at_B = jnp.arange(len(tokens_BL)) + 1
  every_BLV = model.apply({"params": params}, tokens_BL)[0]
  one_B1V, _ = model.apply({"params": params}, tokens_BL, at_B=at_B)
  assert one_B1V.shape == (len(tokens_BL), 1, every_BLV.shape[-1])
  expected = jnp.take_along_axis(every_BLV, at_B[:, None, None], axis=1)
  np.testing.assert_allclose(one_B1V, expected, atol=1e-5)


def test_decoding_step_copies_no_cache():
  options = {"attention": {"head_dim": 32}}
  cfg = small_config(
    pattern=("attention",), num_layers=2, max_len=4096, mixer_options=options
  )
  model = decoder.Decoder(cfg)
  params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))[
    "params"
  ]
  decoding = engine.Decoding(model, params, 1, 4096)
  state = decoding.init_state()
  compiled = engine.step.lower(
    decoding.model, decoding.params, jnp.zeros((1,), jnp.int32), state
  ).compile()
  cache_bytes = sum(a.nbytes for a in jax.tree.leaves(state))
  assert compiled.memory_analysis().temp_size_in_bytes < 0.1 * cache_bytes
  assert compiled.memory_analysis().alias_size_in_bytes >= 0.99 * cache_bytes


@pytest.mark.parametrize("remat", ["full", "dots"])
def test_remat_changes_nothing(small, remat):
  model, params, tokens_BL = small
  changed = decoder.Decoder(dataclasses.replace(model.config, remat=remat))
  expected = jax.jit(jax.grad(_loss(model, tokens_BL)))(params)
  got = jax.jit(jax.grad(_loss(changed, tokens_BL)))(params)
  jax.tree.map(lambda a, b: _close(a, b, 1e-5), got, expected)


def test_statistics_of_inputs_are_weighted_by_tokens(small):
  model, params, tokens_BL = small
  ones = jnp.ones_like(tokens_BL)
  half = ones.at[:, 6:].set(0)
  apply = lambda segments: model.apply(
    {"params": params}, tokens_BL, segments=segments, mutable=["stats"]
  )[1]["stats"]["run_0"]["layer_1"]["mixer"]["q"]
  whole, part = apply(ones), apply(half)
  assert (
    whole["count"].tolist() == [24.0, 24.0] and part["count"].tolist() == [12.0] * 2
  )
  prefix = model.apply({"params": params}, tokens_BL[:, :6], mutable=["stats"])[1]
  alone = prefix["stats"]["run_0"]["layer_1"]["mixer"]["q"]
  _close(part["square_sum"], alone["square_sum"])
  _close(part["absmax"], alone["absmax"])


@pytest.mark.parametrize("preset", ["dp", "fsdp", "tp"])
def test_eight_devices_equal_one(small, preset):
  cfg = small_config(
    embed_dim=64,
    num_layers=2,
    mixer_options={
      "mamba2": {"head_dim": 16, "state_dim": 8, "chunk": 4},
      "attention": {"head_dim": 8, "num_heads": 8, "num_kv_heads": 2},
    },
  )
  model = decoder.Decoder(cfg)
  tokens_BL = jax.random.randint(jax.random.key(0), (8, 12), 0, 64)
  params = jax.jit(model.init)(jax.random.key(1), tokens_BL)["params"]
  expected = jax.jit(jax.value_and_grad(_loss(model, tokens_BL)))(params)
  mesh = mesh_lib.make(mesh_lib.MeshConfig(preset=preset))
  table = rules.find(preset)
  placed = sharding.tree_shardings(mesh, table.params, specs.specs(model), params)
  batch = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
  with shard_lib.use_rules(mesh, table.activations):
    got = jax.jit(
      jax.value_and_grad(_loss(model, jax.device_put(tokens_BL, batch))),
      in_shardings=(placed,),
      out_shardings=(NamedSharding(mesh, PartitionSpec()), placed),
    )(jax.device_put(params, placed))
  assert abs(float(got[0]) - float(expected[0])) < 1e-5
  jax.tree.map(lambda a, b: _close(np.asarray(a), b, 1e-5), got[1], expected[1])
