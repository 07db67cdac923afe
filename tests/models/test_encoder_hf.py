"""Logits and every gradient equal BERT and ALBERT of HF transformers."""

import numpy as np
import pytest

from tests.models import bert_oracle as oracle

pytestmark = pytest.mark.oracle

LENGTH = 11


@pytest.fixture(scope="module")
def transformers():
  return pytest.importorskip("transformers")


@pytest.fixture
def inputs():
  """Two rows, the second one padded, with two sentences each."""
  mask = np.ones((2, LENGTH), np.int64)
  mask[1, 8:] = 0
  types = (np.arange(LENGTH) >= 5).astype(np.int64)[None].repeat(2, 0)
  return {
    "input_ids": oracle.tokens(LENGTH),
    "attention_mask": mask,
    "token_type_ids": types,
  }


def _compare(cfg, model, mapping, inputs):
  """The largest difference of logits and gradients."""
  return oracle.compare(
    cfg,
    oracle.randomized(model),
    mapping,
    inputs,
    segments=inputs["attention_mask"],
    token_types_BL=inputs["token_type_ids"],
  )


def test_bert(transformers, inputs):
  sizes = oracle.hf_sizes(attn_implementation="eager")
  model = transformers.BertForMaskedLM(transformers.BertConfig(**sizes))
  assert _compare(oracle.config(), model, oracle.bert, inputs) <= 1e-4


def test_megatron_bert_is_pre_norm(transformers, inputs):
  sizes = oracle.hf_sizes(attn_implementation="eager")
  model = transformers.MegatronBertForMaskedLM(transformers.MegatronBertConfig(**sizes))
  names = oracle.LAYER | {"mixer_norm": "attention.ln", "mlp_norm": "ln"}
  mapping = lambda state: (
    oracle.bert(state, names)
    | oracle.layer_norm(state, "final_norm", "bert.encoder.ln")
  )
  cfg = oracle.config(norm="pre", embedding_norm=False)
  assert _compare(cfg, model, mapping, inputs) <= 1e-4


def test_bert_classifies(transformers, inputs):
  sizes = oracle.hf_sizes(attn_implementation="eager", num_labels=5)
  config = transformers.BertConfig(**sizes)
  model = oracle.randomized(transformers.BertForSequenceClassification(config))

  def mapping(state):
    flat = oracle.embeddings(state, "bert.embeddings")
    for i in range(2):
      flat |= oracle.layer(state, f"layer_{i}", f"bert.encoder.layer.{i}", oracle.LAYER)
    flat |= oracle.linear(state, "pooler", "bert.pooler.dense")
    return flat | oracle.linear(state, "classifier", "classifier")

  difference = oracle.compare(
    oracle.config(num_classes=5),
    model,
    mapping,
    {k: inputs[k] for k in ("input_ids", "token_type_ids")},
    token_types_BL=inputs["token_type_ids"],
  )
  assert difference <= 1e-4


def test_albert_shares_layers(transformers, inputs):
  num_layers, groups = 4, 2
  sizes = oracle.hf_sizes(
    attn_implementation="eager",
    embedding_size=16,
    num_hidden_layers=num_layers,
    num_hidden_groups=groups,
  )
  model = transformers.AlbertForMaskedLM(transformers.AlbertConfig(**sizes))
  names = {
    **{f"mixer/{n[0]}": f"attention.{n}" for n in ("query", "key", "value")},
    "mixer/o": "attention.dense",
    "mixer_norm": "attention.LayerNorm",
    "mlp/up": "ffn",
    "mlp/down": "ffn_output",
    "mlp_norm": "full_layer_layer_norm",
  }

  def mapping(state):
    flat = oracle.embeddings(state, "albert.embeddings")
    inner = "albert.encoder.embedding_hidden_mapping_in"
    flat |= oracle.linear(state, "embed_out", inner)
    for i in range(groups):
      theirs = f"albert.encoder.albert_layer_groups.{i}.albert_layers.0"
      flat |= oracle.layer(state, f"layer_{i}", theirs, names)
    where = "predictions.dense", "predictions.LayerNorm", "predictions.bias"
    return flat | oracle.head(state, *where)

  cfg = oracle.config(
    num_layers=num_layers,
    share=num_layers // groups,
    embedding_dim=16,
    head_approximate=True,
    mlp_options={"gelu": {"hidden_dim": oracle.HIDDEN, "approximate": True}},
  )
  assert _compare(cfg, model, mapping, inputs) <= 1e-4
