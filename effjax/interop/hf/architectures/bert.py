"""BERT: masked-language models, classifiers and sentence encoders.

Sources: Devlin et al. 2019, arXiv:1810.04805; Reimers and Gurevych 2019,
arXiv:1908.10084; BertForMaskedLM, BertForSequenceClassification and BertModel of
transformers. A BertModel says nothing of how its states become one embedding: here it
is a sentence encoder with their mean, so its own pooler is left out.
"""

from collections.abc import Mapping
from typing import Any

from effjax.core import errors
from effjax.interop import rules
from effjax.interop.fields import Fields
from effjax.interop.hf import architecture, llama_like
from effjax.models import encoder_config

# What follows the name of the architecture in that of the class, by the kind of model.
_SUFFIXES = {
  "tokens": "ForMaskedLM",
  "classes": "ForSequenceClassification",
  "sentences": "Model",
}
# The names in TensorFlow's files, which the first conversions kept.
OLDER = (
  ("LayerNorm.gamma", "LayerNorm.weight"),
  ("LayerNorm.beta", "LayerNorm.bias"),
)
_LAYER = "encoder.layer.{k}."
_MATRICES = {
  **{f"mixer/{n[0]}": f"attention.self.{n}" for n in ("query", "key", "value")},
  "mixer/o": "attention.output.dense",
  "mlp/up": "intermediate.dense",
  "mlp/down": "output.dense",
}
_NORMS = {"mixer_norm": "attention.output.LayerNorm", "mlp_norm": "output.LayerNorm"}
_TABLES = {
  "embed/table": "embeddings.word_embeddings.weight",
  "position_embed/table": "embeddings.position_embeddings.weight",
  "type_embed/table": "embeddings.token_type_embeddings.weight",
}


def read(fields: Fields) -> Any:
  """Our config."""
  fields.refuse(add_cross_attention=False, is_decoder=False)
  return read_encoder(fields, "Bert", "gelu")


def read_encoder(
  fields: Fields, family: str, activation: str, **more: Any
) -> encoder_config.EncoderConfig:
  """The config of an encoder that is built like BERT.

  Args:
    fields: of config.json.
    family: what the names of its classes begin with.
    activation: its `hidden_act` where the config has none.
    **more: other fields of the encoder.
  """
  fields.refuse(
    hidden_act=("gelu", "gelu_new", "gelu_pytorch_tanh"),
    position_embedding_type="absolute",
    tie_word_embeddings=True,
  )
  width, heads = fields.get("hidden_size", int), fields.get("num_attention_heads", int)
  if heads < 1 or width % heads:
    raise errors.InputError(
      f"{fields.where}: num_attention_heads={heads} must divide hidden_size={width}"
    )
  types = fields.get("type_vocab_size", int, 2)
  if types < 1:
    raise errors.InputError(f"{fields.where}: type_vocab_size={types} must be positive")
  approximate = fields.get("hidden_act", str, activation) != "gelu"
  kind = _kind(fields, family)
  return encoder_config.EncoderConfig(
    vocab_size=fields.get("vocab_size", int),
    embed_dim=width,
    num_layers=fields.get("num_hidden_layers", int),
    mixer_options={"attention": {"num_heads": heads, "head_dim": width // heads}},
    mlp_options={
      "gelu": {
        "hidden_dim": fields.get("intermediate_size", int),
        "approximate": approximate,
      }
    },
    max_len=fields.get("max_position_embeddings", int, 512),
    num_token_types=types,
    num_classes=_num_classes(fields) if kind == "classes" else None,
    pooling="mean" if kind == "sentences" else None,
    head_approximate=approximate,
    init_std=fields.get("initializer_range", float, 0.02),
    norm_eps=fields.get("layer_norm_eps", float, 1e-12),
    **more,
  )


def _kind(fields: Fields, family: str) -> str:
  """What the class of transformers that was saved makes of the states."""
  kinds = {f"{family}{suffix}": kind for kind, suffix in _SUFFIXES.items()}
  # Both heads of the pretraining, of which the sentence's is left out.
  kinds[f"{family}ForPreTraining"] = "tokens"
  (name, *_) = fields.get("architectures", list, []) or [f"{family}ForMaskedLM"]
  if name not in kinds:
    raise errors.unknown(f"class in {fields.where}", str(name), kinds)
  return kinds[name]


def _num_classes(fields: Fields) -> int:
  """How many labels there are: transformers writes their names, if not two."""
  return len(fields.get("id2label", dict, {})) or fields.get("num_labels", int, 2)


def write(config: Any) -> dict[str, Any]:
  """Their fields."""
  options = architecture.options(config, "mixer", "attention")
  mlp = architecture.options(config, "mlp", "gelu")
  fields = {
    "vocab_size": config.vocab_size,
    "hidden_size": config.embed_dim,
    "num_hidden_layers": config.num_layers,
    "num_attention_heads": options["num_heads"],
    "intermediate_size": mlp["hidden_dim"] or 4 * config.embed_dim,
    "hidden_act": "gelu_new" if mlp["approximate"] else "gelu",
    "max_position_embeddings": config.max_len,
    "type_vocab_size": config.num_token_types,
    "initializer_range": config.init_std,
    "layer_norm_eps": config.norm_eps,
    "tie_word_embeddings": True,
  }
  if config.num_classes is not None:
    names = [f"LABEL_{number}" for number in range(config.num_classes)]
    fields["id2label"] = {str(number): name for number, name in enumerate(names)}
    fields["label2id"] = {name: number for number, name in enumerate(names)}
  return fields


def kind_of(config: Any) -> str:
  """What a model makes of its states: a key of `_SUFFIXES`."""
  if config.pooling is not None:
    return "sentences"
  return "tokens" if config.num_classes is None else "classes"


def class_name(family: str, config: Any) -> str:
  """The class of transformers for a model."""
  return family + _SUFFIXES[kind_of(config)]


def prefix(family: str, config: Any) -> str:
  """What the names of the tensors below the heads begin with."""
  return "" if config.pooling is not None else f"{family}."


def model_rules(config: Any) -> rules.Rules:
  """Where the parameters outside of the layers are."""
  return prefixed(prefix("bert", config), embedding_rules()) | head_rules(
    config, "bert.pooler.dense", "cls.predictions.", "transform."
  )


def embedding_rules() -> rules.Rules:
  """The three tables and their norm."""
  return rules.named(_TABLES, rules.same) | norm("embed_norm", "embeddings.LayerNorm")


def head_rules(
  config: Any, pooler: str, predictions: str, transform: str
) -> rules.Rules:
  """The head for tokens, that for classes, or none.

  Args:
    config: of the model.
    pooler: name of the layer over the first token.
    predictions: what the names of the head for tokens begin with.
    transform: what follows where it is no bias.
  """
  kind = kind_of(config)
  if kind == "sentences":
    return {}
  if kind == "classes":
    return linear("pooler", pooler) | linear("classifier", "classifier")
  inner = predictions + transform
  return {
    **linear("head", f"{inner}dense"),
    **norm("head_norm", f"{inner}LayerNorm"),
    "vocab_bias": rules.same(f"{predictions}bias"),
  }


def layer_rules(config: Any, layer: Any) -> rules.Rules:
  """Where the parameters of a layer are."""
  del layer
  return prefixed(prefix("bert", config) + _LAYER, block_rules(_MATRICES, _NORMS))


def block_rules(matrices: Mapping[str, str], norms: Mapping[str, str]) -> rules.Rules:
  """Matrices with biases, and norms, by our names."""
  found: dict[str, rules.Rule] = {}
  for ours, theirs in matrices.items():
    found |= linear(ours, theirs)
  for ours, theirs in norms.items():
    found |= norm(ours, theirs)
  return found


def linear(ours: str, theirs: str) -> dict[str, rules.Rule]:
  """A matrix and its bias."""
  return {
    ours: rules.matrix(f"{theirs}.weight"),
    f"{ours}_bias": rules.same(f"{theirs}.bias"),
  }


def norm(ours: str, theirs: str) -> dict[str, rules.Rule]:
  """A LayerNorm."""
  return {
    f"{ours}/scale": rules.same(f"{theirs}.weight"),
    f"{ours}/bias": rules.same(f"{theirs}.bias"),
  }


def prefixed(theirs: str, found: rules.Rules) -> dict[str, rules.Rule]:
  """The rules for tensors whose names begin with `theirs`."""
  return {ours: llama_like.below(theirs, rule) for ours, rule in found.items()}


TECHNIQUE = architecture.Architecture(
  model_type="bert",
  class_name=lambda config: class_name("Bert", config),
  read=read,
  write=write,
  model_rules=model_rules,
  layer_rules=layer_rules,
  ignored=("*embeddings.position_ids", "*pooler.dense.*", "cls.seq_relationship.*"),
  tied=("cls.predictions.decoder.weight", "cls.predictions.decoder.bias"),
  older=OLDER,
  config_cls=encoder_config.EncoderConfig,
)
