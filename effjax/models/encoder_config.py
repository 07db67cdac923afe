"""The config of an encoder: BERT's choices by default, ALBERT's by two fields."""

import dataclasses
import functools
import json
from collections.abc import Hashable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from effjax.core import config, errors, registry
from effjax.core import layers as layers_lib
from effjax.models import config as config_lib

NORMS = ("post", "pre")
POSITIONS = ("learned", "none")
POOLINGS = ("mean",)


@dataclasses.dataclass(frozen=True, kw_only=True)
class EncoderConfig:
  """A bidirectional masked-language model, classifier or sentence encoder.

  The short form expands to `layers` as in DecoderConfig, with BERT's choices where a
  mixer or MLP has the option and the config does not set it: biases, as many kv heads
  as heads, an initial standard deviation of `init_std`, and no positions inside the
  mixer when the embedding has learned ones.

  Attributes:
    vocab_size: V, tokens.
    embed_dim: D, width of the residual stream.
    num_layers: depth, layers applied.
    pattern: mixers by name, repeated over the depth; each must be bidirectional.
    mlp: MLP of every layer.
    mixer_options: options of each mixer, by its name.
    mlp_options: options of each MLP, by its name.
    layers: one config a parameter set, each applied `share` times in a row; empty to
      expand the short form.
    share: consecutive layers that share one parameter set (ALBERT: all of them).
    embedding_dim: E, width of the embeddings, projected to D (ALBERT); None for D.
    norm: "post" normalizes the residual stream after each branch (BERT), "pre" the
      input of each branch, and the stream once more at the end.
    embedding_norm: whether the sum of the embeddings is normalized.
    position: "learned" absolute positions in the embedding, or "none" when the mixers
      know order themselves.
    max_len: longest sequence (tokens), rows of the learned positions.
    num_token_types: rows of the token-type (sentence A or B) embedding; 0 for none.
    num_classes: None for a masked-language model; else the model classifies each row
      by its first token, through a tanh pooler.
    pooling: None for the outputs above; "mean" for a sentence encoder, without any
      head, whose output is the normalized mean over the tokens. Excludes `num_classes`.
    head_approximate: the tanh form of GELU in the masked-language head.
    init_std: standard deviation of initial embeddings, MLPs and heads.
    norm_eps: added to variances.
    runs: how equal layers are scanned; None finds the maximal runs.
    scan: False keeps every layer apart (`layer_<k>/...`), with an unrolled loop.
    remat: what the backward pass recomputes; see DecoderConfig.
    architecture: "encoder", which tells it from a decoder in a file.
  """

  vocab_size: int
  embed_dim: int
  num_layers: int = 0
  pattern: tuple[str, ...] = ("attention",)
  mlp: str = "gelu"
  mixer_options: dict[str, dict] = dataclasses.field(default_factory=dict)
  mlp_options: dict[str, dict] = dataclasses.field(default_factory=dict)
  layers: tuple[config_lib.LayerConfig, ...] = ()
  share: int = 1
  embedding_dim: int | None = None
  norm: str = "post"
  embedding_norm: bool = True
  position: str = "learned"
  max_len: int = 512
  num_token_types: int = 2
  num_classes: int | None = None
  pooling: str | None = None
  head_approximate: bool = False
  init_std: float = 0.02
  norm_eps: float = 1e-12
  runs: tuple[tuple[int, int], ...] | None = None
  scan: bool = True
  remat: str = "none"
  architecture: str = "encoder"

  def __post_init__(self):
    if self.architecture != "encoder":
      raise errors.unknown("architecture", self.architecture, ("encoder",))
    self._check()
    if not self.layers:
      config.require(
        self.num_layers > 0, f"num_layers={self.num_layers} must be positive"
      )
      object.__setattr__(self, "layers", self._expand())
    object.__setattr__(self, "num_layers", len(self.layers) * self.share)
    for layer in dict.fromkeys(self.layers):
      _check_bidirectional(layer, self.embed_dim)
    config_lib.check_layers(self.layers, self.embed_dim, self.runs)

  def _check(self) -> None:
    """Ranges and words of the fields."""
    for name in ("vocab_size", "embed_dim", "max_len", "share", "init_std", "norm_eps"):
      value = getattr(self, name)
      config.require(value > 0, f"{name}={value} must be positive")
    for name in ("embedding_dim", "num_classes"):
      value = getattr(self, name)
      config.require(
        value is None or value > 0, f"{name}={value} must be positive, or None"
      )
    config.require(
      self.num_token_types >= 0,
      f"num_token_types={self.num_token_types} must not be negative",
    )
    for name, allowed in (
      ("norm", NORMS),
      ("position", POSITIONS),
      ("remat", config_lib.REMAT),
    ):
      if getattr(self, name) not in allowed:
        raise errors.unknown(name, getattr(self, name), allowed)
    if self.pooling is not None and self.pooling not in POOLINGS:
      raise errors.unknown("pooling", self.pooling, POOLINGS)
    config.require(
      self.pooling is None or self.num_classes is None,
      f"pooling={self.pooling!r} leaves out the classes: set it, or "
      f"num_classes={self.num_classes}, but not both",
    )
    config.require(bool(self.pattern), "pattern must name at least one mixer")
    config.require(
      all(layer.keys == "own" for layer in self.layers),
      "layers of an encoder have keys='own': only a decoder's share them",
    )

  def __hash__(self) -> int:
    return hash(json.dumps(config.to_dict(self), sort_keys=True))

  def _expand(self) -> tuple[config_lib.LayerConfig, ...]:
    """The parameter sets of the short form: every `share`-th layer."""
    mixers = dict.fromkeys(self.pattern)
    layers = config_lib.expand(
      self.pattern,
      (self.mlp,) * self.num_layers,
      self.mixer_options | {name: self._mixer_defaults(name) for name in mixers},
      self.mlp_options | self._mlp_defaults(),
    )
    return config_lib.every(self.share, layers)

  def _mixer_defaults(self, name: str) -> dict[str, Any]:
    """The options given for a mixer, and BERT's choices for those that are not."""
    given = self.mixer_options.get(name, {})
    fields = registry.find(config_lib.MIXERS, name).options_cls.__dataclass_fields__
    heads = fields["num_heads"].default if "num_heads" in fields else None
    chosen = {
      "bias": True,
      "num_kv_heads": given.get("num_heads", heads),
      "init_std": self.init_std,
    }
    if self.position == "learned":
      chosen["position"] = "none"
    return {k: v for k, v in chosen.items() if k in fields} | dict(given)

  def _mlp_defaults(self) -> dict[str, dict[str, Any]]:
    """The same for the MLP, by its name."""
    if self.mlp == "none":
      return {}
    given = self.mlp_options.get(self.mlp, {})
    fields = registry.find(config_lib.MLPS, self.mlp).options_cls.__dataclass_fields__
    chosen = {"init_std": self.init_std} if "init_std" in fields else {}
    return {self.mlp: chosen | dict(given)}

  @property
  def resolved_runs(self) -> tuple[layers_lib.Run, ...] | None:
    """The scanned runs, or None for an unrolled model."""
    return config_lib.resolve_runs(self.layers, self.runs, self.scan)

  @property
  def layer_keys(self) -> tuple[Hashable, ...]:
    """One key a parameter set; sets with equal keys are built equal."""
    return self.layers


def from_dict(values: Mapping[str, Any]) -> EncoderConfig:
  """The config written by `core.config.to_dict`.

  Raises:
    InputError: it is not the config of an encoder.
  """
  return config.build(EncoderConfig, values, "model")


def bidirectional_mixers() -> tuple[str, ...]:
  """Names of the mixers that can see both ways, found by asking each."""
  return tuple(
    name
    for name in registry.names(config_lib.MIXERS)
    # A width that the default options of every mixer divide.
    if _refusal(config_lib.LayerConfig(mixer=name), 1024, causal=False) is None
  )


def _check_bidirectional(layer: config_lib.LayerConfig, embed_dim: int) -> None:
  refusal = _refusal(layer, embed_dim, causal=False)
  if refusal is None:
    return
  if _refusal(layer, embed_dim, causal=True) == refusal:
    raise errors.InputError(refusal)
  raise errors.InputError(
    f"an encoder cannot use mixer {layer.mixer!r} ({refusal}); bidirectional mixers: "
    + ", ".join(bidirectional_mixers())
  )


@functools.cache
def _refusal(
  layer: config_lib.LayerConfig, embed_dim: int, *, causal: bool
) -> str | None:
  """What the mixer answers when it is traced, or None if it works."""
  mixer_cls = registry.find(config_lib.MIXERS, layer.mixer)
  mixer = mixer_cls(layer.build_mixer_options(), embed_dim, causal=causal)
  ids_BL = jnp.ones((1, 2), jnp.int32)
  try:
    jax.eval_shape(
      lambda x_BLD: mixer.init(
        jax.random.key(0), x_BLD, positions=ids_BL, segments=ids_BL
      ),
      jax.ShapeDtypeStruct((1, 2, embed_dim), jnp.float32),
    )
  except errors.InputError as error:
    return str(error)
  return None
