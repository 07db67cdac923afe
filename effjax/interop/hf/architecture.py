"""What a map of an architecture is, and the parts that many of them share.

A map turns a foreign config into ours and back, and says where each parameter lies.
Whether a model of ours can be written as an architecture is not a list of conditions:
its config is written, read again and compared, and what got lost is named.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from effjax.core import config as config_lib
from effjax.core import errors, registry
from effjax.interop import caches, rules
from effjax.interop.fields import Fields
from effjax.models import config as model_config
from effjax.models import encoder_config

ARCHITECTURES = "effjax.interop.hf.architectures"
# Fields that say how a model is initialized, trained or computed, not which function it
# is: no foreign config has them.
_IMPLEMENTATION = frozenset(
  {
    "balancing_loss",
    "capacity_factor",
    "chunk",
    "dispatch",
    "dt_max",
    "dt_min",
    "embed_std",
    "eval_capacity_factor",
    "expand",
    "first_mlps",
    "implementation",
    "init_std",
    "jitter",
    "leak_future",
    "mlp",
    "mlp_options",
    "mlp_pattern",
    "mixer_options",
    "pattern",
    "remat",
    "runs",
    "scan",
    "share_keys",
    "z_loss",
  }
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Architecture:
  """A map between an architecture of Hugging Face and a model here.

  Attributes:
    model_type: what config.json calls it; also the name of the map's file.
    class_name: the class of transformers that loads it, or which one by our config.
    read: our config from its fields.
    write: its fields from our config, as well as they can say it.
    model_rules: where the parameters outside of the layers are.
    layer_rules: where those of a layer are, by the layer's config.
    ignored: patterns of tensors that are no parameters.
    tied: names of the output head, which files of tied models may repeat.
    older: ends of names in older files, and what they are today.
    config_cls: what our config is.
  """

  model_type: str
  class_name: str | Callable[[Any], str]
  read: Callable[[Fields], Any]
  write: Callable[[Any], dict[str, Any]]
  model_rules: Callable[[Any], rules.Rules]
  layer_rules: Callable[[Any, Any], rules.Rules]
  ignored: tuple[str, ...] = ("*.rotary_emb.inv_freq",)
  tied: tuple[str, ...] = ("lm_head.weight",)
  older: tuple[tuple[str, str], ...] = ()
  config_cls: type = model_config.DecoderConfig

  def fields(self, config: Any) -> dict[str, Any]:
    """All of config.json that follows from our config."""
    name = self.class_name
    return self.write(config) | {
      "architectures": [name if isinstance(name, str) else name(config)],
      "model_type": self.model_type,
    }

  def rules_of(self, config: Any) -> Callable[[int | None], rules.Rules]:
    """Rules by the number of the layer; see assemble.places."""

    def of(layer: int | None) -> rules.Rules:
      if layer is None:
        return self.model_rules(config)
      return self.layer_rules(config, config.layers[layer])

    return of


def find(model_type: str, where: str) -> Architecture:
  """The map of an architecture.

  Raises:
    InputError: there is none; the message lists those there are.
  """
  known = names()
  if model_type not in known:
    raise errors.unknown(f"model_type in {where}", model_type, known)
  return registry.find(ARCHITECTURES, model_type)


def names() -> tuple[str, ...]:
  """Every architecture there is a map of."""
  return registry.names(ARCHITECTURES)


def fitting(config: Any, model_type: str | None = None) -> Architecture:
  """The architecture that a model is an instance of.

  Args:
    config: of the model.
    model_type: which one to take; None takes the first that fits.

  Raises:
    InputError: the model has something that the architecture, or each of them, cannot
      express; the message names it.
  """
  caches.require_float(config, "a Hugging Face folder")
  tried = names() if model_type is None else (model_type,)
  lost: dict[str, list[str]] = {}
  for name in sorted(tried, key=_preference):
    architecture = find(name, "--architecture")
    if model_type is None and not isinstance(config, architecture.config_cls):
      continue
    lost[name] = what_is_lost(architecture, config)
    if not lost[name]:
      return architecture
  if not lost:
    raise errors.InputError(
      f"no architecture of Hugging Face here is a {type(config).__name__}"
    )
  nearest = min(lost, key=lambda name: len(lost[name]))
  raise errors.InputError(
    f"no architecture of Hugging Face here can express this model; the nearest is "
    f"{nearest}, which loses {'; '.join(lost[nearest][:3])}"
  )


def what_is_lost(architecture: Architecture, config: Any) -> list[str]:
  """Differences of a config after it was written as an architecture and read again."""
  if not isinstance(config, architecture.config_cls):
    ours, theirs = type(config).__name__, architecture.config_cls.__name__
    return [f"it is a {ours}, not a {theirs}"]
  try:
    fields = Fields(architecture.fields(config), architecture.model_type)
    again = architecture.read(fields)
  except errors.InputError as error:
    return [str(error)]
  return config_lib.differences(_function(config), _function(again), "model")


def _function(config: Any) -> Any:
  """The part of a config that says which function the model is."""
  plain = config_lib.to_dict(config)
  kept = {k: v for k, v in plain.items() if k not in _IMPLEMENTATION}
  kept["layers"] = [
    {
      "mixer": layer.mixer,
      "mlp": layer.mlp,
      "keys": layer.keys,
      **{
        part: {k: v for k, v in values.items() if k not in _IMPLEMENTATION}
        for part, values in _resolved(layer, config.embed_dim).items()
      },
    }
    for layer in config.layers
  ]
  if isinstance(config, encoder_config.EncoderConfig):
    kept["embedding_dim"] = config.embedding_dim or config.embed_dim
    if config.num_classes is not None or config.pooling is not None:
      # An option of a head that the model does not have.
      kept.pop("head_approximate")
  return kept


def _resolved(layer: Any, embed_dim: int) -> dict[str, dict[str, Any]]:
  """Options of a layer, sizes that follow from the width of the model filled in."""
  mixer, mlp = dict(layer.mixer_options), dict(layer.mlp_options)
  built = layer.build_mixer_options()
  if "inner_dim" in mixer:
    mixer["inner_dim"] = built.width(embed_dim)
  if "dt_rank" in mixer:
    mixer["dt_rank"] = built.rank(embed_dim)
  if "hidden_dim" in mlp:
    mlp["hidden_dim"] = layer.build_mlp_options().width(embed_dim)
  return {"mixer_options": mixer, "mlp_options": mlp}


# Where several fit, the plainest name first.
_FIRST = ("llama", "mistral", "qwen2", "qwen3", "mixtral")


def _preference(name: str) -> tuple[int, str]:
  return (_FIRST.index(name) if name in _FIRST else len(_FIRST), name)


def decoder_config(
  layers: Sequence[Mapping[str, Any]], **values: Any
) -> model_config.DecoderConfig:
  """A decoder of these layers, in the short form where they are all equal.

  Args:
    layers: fields of a LayerConfig each.
    **values: other fields of the decoder.
  """
  first = dict(layers[0])
  if all(dict(layer) == first for layer in layers):
    mixer, mlp = first["mixer"], first.get("mlp", "swiglu")
    values |= {
      "pattern": (mixer,),
      "mlp": mlp,
      "mixer_options": {mixer: first.get("mixer_options", {})},
      "mlp_options": {} if mlp == "none" else {mlp: first.get("mlp_options", {})},
      "num_layers": len(layers),
    }
  else:
    values["layers"] = tuple(model_config.LayerConfig(**layer) for layer in layers)
  return model_config.DecoderConfig(**values)


def kinds(config: Any, part: str) -> list[str]:
  """Names of the mixer or MLP of every layer."""
  return [getattr(layer, part) for layer in config.layers]


def options(config: Any, part: str, name: str) -> dict[str, Any]:
  """Options of the first layer whose mixer or MLP (`part`) has a name, sizes filled in.

  Raises:
    InputError: no layer has it.
  """
  for layer in getattr(config, "layers", ()):
    if getattr(layer, part) == name:
      return _resolved(layer, config.embed_dim)[f"{part}_options"]
  raise errors.InputError(f"the model has no {part} {name!r}")
