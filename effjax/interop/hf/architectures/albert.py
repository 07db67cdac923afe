"""ALBERT: BERT with narrow embeddings and layers that share their parameters.

Source: Lan et al. 2020, arXiv:1909.11942; AlbertForMaskedLM,
AlbertForSequenceClassification and AlbertModel of transformers. The last is a sentence
encoder here, as in the map of BERT.
"""

from typing import Any

from effjax.core import errors
from effjax.interop import rules
from effjax.interop.fields import Fields
from effjax.interop.hf import architecture
from effjax.interop.hf.architectures import bert
from effjax.models import encoder_config

_LAYER = "encoder.albert_layer_groups.{k}.albert_layers.0."
_MATRICES = {
  **{f"mixer/{n[0]}": f"attention.{n}" for n in ("query", "key", "value")},
  "mixer/o": "attention.dense",
  "mlp/up": "ffn",
  "mlp/down": "ffn_output",
}
_NORMS = {"mixer_norm": "attention.LayerNorm", "mlp_norm": "full_layer_layer_norm"}


def read(fields: Fields) -> Any:
  """Our config."""
  fields.refuse(inner_group_num=1)
  layers = fields.get("num_hidden_layers", int)
  groups = fields.get("num_hidden_groups", int, 1)
  if groups < 1 or layers % groups:
    raise errors.InputError(
      f"{fields.where}: num_hidden_groups={groups} must divide "
      f"num_hidden_layers={layers}"
    )
  narrow, width = fields.get("embedding_size", int, 128), fields.get("hidden_size", int)
  if narrow == width:
    raise errors.InputError(
      f"{fields.where}: embedding_size={narrow} equals hidden_size: ALBERT projects "
      "even then, an encoder here only from another width"
    )
  return bert.read_encoder(
    fields, "Albert", "gelu_new", embedding_dim=narrow, share=layers // groups
  )


def write(config: Any) -> dict[str, Any]:
  """Their fields."""
  return bert.write(config) | {
    "embedding_size": config.embedding_dim or config.embed_dim,
    "num_hidden_groups": len(config.layers),
    "inner_group_num": 1,
  }


def model_rules(config: Any) -> rules.Rules:
  """Where the parameters outside of the layers are."""
  found = bert.embedding_rules()
  found |= bert.linear("embed_out", "encoder.embedding_hidden_mapping_in")
  return bert.prefixed(bert.prefix("albert", config), found) | bert.head_rules(
    config, "albert.pooler", "predictions.", ""
  )


def layer_rules(config: Any, layer: Any) -> rules.Rules:
  """Where the parameters of a group of layers are."""
  del layer
  names = bert.prefix("albert", config) + _LAYER
  return bert.prefixed(names, bert.block_rules(_MATRICES, _NORMS))


TECHNIQUE = architecture.Architecture(
  model_type="albert",
  class_name=lambda config: bert.class_name("Albert", config),
  read=read,
  write=write,
  model_rules=model_rules,
  layer_rules=layer_rules,
  ignored=("*embeddings.position_ids", "*pooler.*", "sop_classifier.*"),
  tied=("predictions.decoder.weight", "predictions.decoder.bias"),
  older=bert.OLDER,
  config_cls=encoder_config.EncoderConfig,
)
