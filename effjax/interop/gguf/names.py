"""Names of GGUF's tensors: where llama.cpp has the parameters of common layers."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from effjax.interop import rules

TOKENS, OUTPUT = "token_embd.weight", "output.weight"
_LAYER = "blk.{k}."


def usual_model_rules(config: Any) -> rules.Rules:
  """Parameters outside of the layers."""
  found = {
    "embed/table": rules.same(TOKENS),
    "final_norm/scale": rules.same("output_norm.weight"),
  }
  if not config.tie_embeddings:
    found["head"] = rules.matrix(OUTPUT)
  return found


def in_layer(table: Mapping[str, rules.Rule]) -> rules.Rules:
  """Rules of a layer, whose tensors stand below `blk.<k>.`."""
  return {
    ours: dataclasses.replace(rule, name=_LAYER + rule.name)
    for ours, rule in table.items()
  }


def attention_rules(options: Mapping[str, Any], *, pairs: bool) -> rules.Rules:
  """Projections of attention, with biases and norms of heads where there are any.

  Args:
    options: of attention.
    pairs: whether llama.cpp rotates neighbours in this architecture.
  """
  theirs = {"q": "attn_q", "k": "attn_k", "v": "attn_v", "o": "attn_output"}
  found = {f"mixer/{n}": rules.matrix(f"{name}.weight") for n, name in theirs.items()}
  found |= {f"mixer/{n}_bias": rules.same(f"{name}.bias") for n, name in theirs.items()}
  if pairs:
    for n, heads in (("q", "num_heads"), ("k", "num_kv_heads")):
      for ours, part, turned in ((n, "weight", True), (f"{n}_bias", "bias", False)):
        found[f"mixer/{ours}"] = rules.pair_rows(
          f"attn_{n}.{part}", options[heads], transposed=turned
        )
  if options["qk_norm"]:
    found |= {
      f"mixer/{n}_norm/scale": rules.same(f"attn_{n}_norm.weight") for n in "qk"
    }
  return found


def mlp_rules(kind: str) -> rules.Rules:
  """A gated MLP ("swiglu") or experts ("moe"), and the norms of the layer."""
  end = "_exps" if kind == "moe" else ""
  found = {
    f"mlp/{n}": rules.matrix(f"ffn_{n}{end}.weight") for n in ("gate", "up", "down")
  }
  if kind == "moe":
    found["mlp/router"] = rules.matrix("ffn_gate_inp.weight")
  return found | {
    "mixer_norm/scale": rules.same("attn_norm.weight"),
    "mlp_norm/scale": rules.same("ffn_norm.weight"),
  }
