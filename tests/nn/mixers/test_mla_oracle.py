"""A decoder of latent attention equals DeepSeek-V3 of HF transformers."""

import numpy as np
import pytest

from effjax.models import config
from tests.models import test_hf_oracle as oracle

pytestmark = pytest.mark.oracle

HEADS, HEAD_DIM, ROPE_DIM, VALUE_DIM, KV_RANK, HIDDEN = 4, 8, 6, 5, 12, 56
YARN = {
  "factor": 4.0,
  "original_max_position_embeddings": 32,
  "beta_fast": 8.0,
  "beta_slow": 1.0,
  "mscale": 1.0,
  "mscale_all_dim": 0.5,
}


def _hf(q_rank, interleave, yarn):
  transformers = pytest.importorskip("transformers")
  rope = {"rope_type": "yarn", **YARN} if yarn else {"rope_type": "default"}
  return transformers.DeepseekV3ForCausalLM(
    transformers.DeepseekV3Config(
      vocab_size=oracle.VOCAB,
      hidden_size=oracle.WIDTH,
      intermediate_size=HIDDEN,
      num_hidden_layers=2,
      first_k_dense_replace=2,
      num_attention_heads=HEADS,
      num_key_value_heads=HEADS,
      q_lora_rank=q_rank,
      kv_lora_rank=KV_RANK,
      qk_nope_head_dim=HEAD_DIM,
      qk_rope_head_dim=ROPE_DIM,
      v_head_dim=VALUE_DIM,
      rms_norm_eps=1e-5,
      max_position_embeddings=128,
      rope_interleave=interleave,
      rope_parameters=rope | {"rope_theta": 100.0},
      tie_word_embeddings=False,
      attn_implementation="eager",
    )
  )


def _ours(q_rank, interleave, yarn):
  names = {"original_max_position_embeddings": "original_max_len"}
  scaling = {"kind": "yarn"} | {names.get(k, k): v for k, v in YARN.items()}
  return config.DecoderConfig(
    vocab_size=oracle.VOCAB,
    embed_dim=oracle.WIDTH,
    num_layers=2,
    pattern=("mla",),
    mixer_options={
      "mla": {
        "num_heads": HEADS,
        "head_dim": HEAD_DIM,
        "rope_dim": ROPE_DIM,
        "value_dim": VALUE_DIM,
        "kv_rank": KV_RANK,
        "q_rank": q_rank,
        "rope_theta": 100.0,
        "rope_interleaved": interleave,
        "rope_scaling": scaling if yarn else None,
      }
    },
    mlp_options={"swiglu": {"hidden_dim": HIDDEN}},
    tie_embeddings=False,
  )


def _layer(theirs, q_rank):
  """One layer of theirs, by names without prefix, as ours; linear in its input."""
  down = theirs["self_attn.kv_a_proj_with_mqa.weight"].T
  up = theirs["self_attn.kv_b_proj.weight"].T.reshape(KV_RANK, HEADS, -1)
  flat = {
    "mixer_norm/scale": theirs["input_layernorm.weight"],
    "mlp_norm/scale": theirs["post_attention_layernorm.weight"],
    "mixer/kv_down": down[:, :KV_RANK],
    "mixer/k_rope": down[:, KV_RANK:],
    "mixer/kv_norm/scale": theirs["self_attn.kv_a_layernorm.weight"],
    "mixer/k_up": up[..., :HEAD_DIM].reshape(KV_RANK, -1),
    "mixer/v_up": up[..., HEAD_DIM:].reshape(KV_RANK, -1),
    "mixer/o": theirs["self_attn.o_proj.weight"].T,
  }
  if q_rank is None:
    flat["mixer/q"] = theirs["self_attn.q_proj.weight"].T
  else:
    flat["mixer/q_down"] = theirs["self_attn.q_a_proj.weight"].T
    flat["mixer/q_norm/scale"] = theirs["self_attn.q_a_layernorm.weight"]
    flat["mixer/q_up"] = theirs["self_attn.q_b_proj.weight"].T
  for name in ("gate", "up", "down"):
    flat[f"mlp/{name}"] = theirs[f"mlp.{name}_proj.weight"].T
  return flat


@pytest.mark.parametrize(
  ("q_rank", "interleave", "yarn"),
  [(None, True, False), (10, True, True), (10, False, False)],
)
def test_equals_deepseek_v3(q_rank, interleave, yarn):
  def mapping(state):
    flat = {
      "embed/table": state["model.embed_tokens.weight"],
      "final_norm/scale": state["model.norm.weight"],
      "head": state["lm_head.weight"].T,
    }
    for i in range(2):
      prefix = f"model.layers.{i}."
      theirs = {
        name.removeprefix(prefix): np.asarray(value)
        for name, value in state.items()
        if name.startswith(prefix)
      }
      ours = _layer(theirs, q_rank)
      flat |= {f"layer_{i}/{name}": value for name, value in ours.items()}
    return flat

  hf = oracle._randomize(_hf(q_rank, interleave, yarn))
  oracle._compare(_ours(q_rank, interleave, yarn), mapping, hf)
