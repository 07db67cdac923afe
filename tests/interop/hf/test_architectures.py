"""Every architecture in and out: logits of transformers, bits of the files."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.core import errors
from effjax.interop.hf import architecture, folder, weights_files
from effjax.parallel import spread as spread_lib

pytestmark = pytest.mark.oracle

VOCAB, WIDTH, LENGTH = 48, 32, 13
_ATTENTION = {
  "num_attention_heads": 4,
  "num_key_value_heads": 2,
  "head_dim": 8,
  "max_position_embeddings": 64,
}
_DENSE = {"hidden_size": WIDTH, "intermediate_size": 56, "num_hidden_layers": 3}
# Fields of a tiny model of every architecture, by a name of its own.
MODELS = {
  "llama": _DENSE | _ATTENTION | {"tie_word_embeddings": True},
  "llama-3": _DENSE
  | _ATTENTION
  | {
    "tie_word_embeddings": False,
    "attention_bias": True,
    "rope_parameters": {
      "rope_type": "llama3",
      "rope_theta": 1000.0,
      "factor": 4.0,
      "low_freq_factor": 1.0,
      "high_freq_factor": 4.0,
      "original_max_position_embeddings": 16,
    },
  },
  "mistral": _DENSE | _ATTENTION | {"sliding_window": 5},
  "qwen2": _DENSE | _ATTENTION,
  "qwen2-windows": _DENSE
  | _ATTENTION
  | {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
  "qwen3": _DENSE | _ATTENTION,
  "qwen3_moe": _DENSE
  | _ATTENTION
  | {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "mlp_only_layers": [0],
    "norm_topk_prob": True,
  },
  "mixtral": _DENSE
  | _ATTENTION
  | {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None},
  "gpt2": {"n_embd": WIDTH, "n_layer": 2, "n_head": 4, "n_positions": 64},
  "mamba": {
    "hidden_size": WIDTH,
    "num_hidden_layers": 2,
    "state_size": 5,
    "time_step_rank": 3,
    "intermediate_size": 2 * WIDTH,
  },
  "mamba2": {
    "hidden_size": WIDTH,
    "num_hidden_layers": 2,
    "num_heads": 4,
    "head_dim": 16,
    "state_size": 8,
    "n_groups": 2,
    "chunk_size": 4,
  },
  "jamba": {
    "hidden_size": WIDTH,
    "intermediate_size": 56,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "attn_layer_period": 4,
    "attn_layer_offset": 2,
    "expert_layer_period": 2,
    "expert_layer_offset": 1,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "mamba_d_state": 5,
    "mamba_dt_rank": 3,
    "use_mamba_kernels": False,
  },
  "deepseek_v3": {
    "hidden_size": WIDTH,
    "intermediate_size": 56,
    "moe_intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "n_group": 4,
    "topk_group": 2,
    "routed_scaling_factor": 2.5,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 12,
    "q_lora_rank": 10,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 6,
    "v_head_dim": 5,
    "max_position_embeddings": 64,
  },
}


def _model_type(name):
  return name.partition("-")[0]


@pytest.fixture(scope="session")
def saved(tmp_path_factory):
  """Makes and saves a tiny random model of transformers, once each."""
  transformers = pytest.importorskip("transformers")
  torch = pytest.importorskip("torch")
  made = {}

  def get(name):
    if name not in made:
      config = transformers.AutoConfig.for_model(
        _model_type(name),
        vocab_size=VOCAB,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        attn_implementation="eager",
        **MODELS[name],
      )
      model = transformers.AutoModelForCausalLM.from_config(config).float().eval()
      generator = torch.Generator().manual_seed(0)
      with torch.no_grad():
        for parameter, values in model.state_dict().items():
          if parameter.endswith(("A_log", "dt_bias", "dt_proj.bias")):
            continue
          center = 1.0 if "norm" in parameter and "bias" not in parameter else 0.0
          if values.is_floating_point() and "inv_freq" not in parameter:
            values.copy_(center + 0.1 * torch.randn(values.shape, generator=generator))
      path = tmp_path_factory.mktemp("hf") / name
      model.save_pretrained(path)
      made[name] = path, model
    return made[name]

  return get


def _tokens():
  return np.random.default_rng(0).integers(0, VOCAB, (2, LENGTH))


def _logits_of(model):
  torch = pytest.importorskip("torch")
  with torch.no_grad():
    return model(torch.tensor(_tokens()), use_cache=False).logits.numpy()


def _ours(opened):
  apply = jax.jit(opened.model.apply)
  tokens_BL = jnp.asarray(_tokens(), jnp.int32)
  return np.asarray(apply({"params": opened.load()}, tokens_BL)[0])


@pytest.mark.parametrize("name", MODELS)
def test_logits_equal_those_of_transformers(name, saved):
  path, model = saved(name)
  expected = _logits_of(model)
  difference = np.abs(_ours(folder.open_folder(path)) - expected).max()
  assert difference <= 1e-4 * expected.std()


@pytest.mark.parametrize("name", MODELS)
def test_a_folder_comes_back_bit_for_bit(name, saved, tmp_path):
  transformers = pytest.importorskip("transformers")
  path, model = saved(name)
  opened = folder.open_folder(path)
  written = folder.save(
    tmp_path / "out",
    opened.model,
    opened.load(),
    opened.specs,
    model_type=_model_type(name),
  )
  assert written == _model_type(name)
  before, after = weights_files.Tensors(path), weights_files.Tensors(tmp_path / "out")
  assert dict(after.shapes()) == dict(before.shapes())
  for tensor in before.shapes():
    np.testing.assert_array_equal(after.read(tensor), before.read(tensor), tensor)
  again = transformers.AutoModelForCausalLM.from_pretrained(
    tmp_path / "out", attn_implementation="eager"
  )
  # The length of a chunk, which no config here has, changes the order of sums.
  np.testing.assert_allclose(_logits_of(again.eval()), _logits_of(model), atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_the_architecture_is_found_again(name, saved):
  path, _ = saved(name)
  fields = folder.read_fields(path)
  config = architecture.find(_model_type(name), "test").read(fields)
  found = architecture.fitting(config)
  assert architecture.what_is_lost(found, config) == []


def test_every_architecture_is_tested():
  encoders = {"albert", "bert"}
  tested = {_model_type(name) for name in MODELS} | encoders
  assert tested == set(architecture.names())


def test_bfloat16_files_are_kept_or_widened(saved, tmp_path):
  pytest.importorskip("torch")
  path, _ = saved("llama")
  opened = folder.open_folder(path)
  model, specs = opened.model, opened.specs
  folder.save(tmp_path / "half", model, opened.load(), specs, dtype="bfloat16")
  half = folder.open_folder(tmp_path / "half")
  kept, wide = half.load(None), half.load()
  assert {leaf.dtype.name for leaf in jax.tree.leaves(kept)} == {"bfloat16"}
  assert {leaf.dtype.name for leaf in jax.tree.leaves(wide)} == {"float32"}
  folder.save(tmp_path / "again", model, wide, specs, dtype="bfloat16")
  same = (tmp_path / "again" / weights_files.SINGLE).read_bytes()
  assert same == (tmp_path / "half" / weights_files.SINGLE).read_bytes()


@pytest.mark.parametrize("preset", ["fsdp", "tp"])
@pytest.mark.parametrize("name", ["qwen3_moe", "mamba2"])
def test_weights_go_straight_onto_a_mesh(name, preset, saved):
  opened = folder.open_folder(saved(name)[0])
  sharded = opened.load(np.float32, spread_lib.over(preset))
  plain = opened.load()
  jax.tree.map(np.testing.assert_array_equal, sharded, plain)
  split = [a for a in jax.tree.leaves(sharded) if not a.sharding.is_fully_replicated]
  assert split
  for array in split:
    assert array.addressable_shards[0].data.size < array.size


def test_shards_are_read_like_one_file(saved, tmp_path):
  path, model = saved("llama")
  model.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
  assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
  one = folder.open_folder(path).load()
  many = folder.open_folder(tmp_path / "shards").load()
  jax.tree.map(np.testing.assert_array_equal, one, many)
  (first, *_) = sorted((tmp_path / "shards").glob("*.safetensors"))
  first.unlink()
  with pytest.raises(errors.InputError, match=f"{first.name} is missing"):
    folder.open_folder(tmp_path / "shards")


def _changed(saved, tmp_path, name="llama", **fields):
  path, _ = saved(name)
  out = tmp_path / "changed"
  out.mkdir()
  values = json.loads((path / "config.json").read_text()) | fields
  (out / "config.json").write_text(json.dumps(values))
  for file in path.glob("*.safetensors"):
    (out / file.name).write_bytes(file.read_bytes())
  return out


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"model_type": "lama"}, "unknown model_type .*'lama'; did you mean 'llama'"),
    ({"hidden_act": "relu"}, "hidden_act='relu' is not supported; effjax has 'silu'"),
    ({"num_hidden_layers": 4}, "missing 9 tensors model.layers.3.self_attn.k_proj"),
    ({"num_hidden_layers": 2}, "9 tensors model.layers.2.* no place for"),
    ({"intermediate_size": 60}, "down_proj.weight has shape .32, 56., .*32, 60"),
    ({"hidden_size": "x"}, "hidden_size must be int, got 'x'"),
    ({"rope_parameters": {"rope_type": "dynamic"}}, "unknown rope_type .*'dynamic'"),
  ],
)
def test_a_config_that_does_not_fit_is_one_clear_line(fields, message, saved, tmp_path):
  with pytest.raises(errors.InputError, match=message) as raised:
    folder.open_folder(_changed(saved, tmp_path, **fields))
  assert "\n" not in str(raised.value)


def test_what_an_architecture_cannot_say_is_named(saved):
  path, _ = saved("llama")
  config = folder.open_folder(path).model.config
  with pytest.raises(errors.InputError, match="logit_cap"):
    architecture.fitting(dataclasses.replace(config, logit_cap=30.0))
