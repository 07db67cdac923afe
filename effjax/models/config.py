"""The config of a decoder: a short form that expands to one config per layer."""

import dataclasses
import itertools
import json
from collections.abc import Hashable, Mapping
from typing import Any

from effjax.core import config, errors, registry
from effjax.core import layers as layers_lib

MIXERS = "effjax.nn.mixers"
MLPS = "effjax.nn.mlps"
KEYS = ("own", "lent", "borrowed")
REMAT = ("none", "full", "dots")
NORMS = ("rms", "layer")
POSITIONS = ("none", "learned")
_SHARES = ("share", "share_keys")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerConfig:
  """One layer: a mixer and an MLP by name, with all of their options.

  Attributes:
    mixer: registry key in effjax.nn.mixers.
    mlp: registry key in effjax.nn.mlps, or "none".
    mixer_options: fields of the mixer's options; missing ones get their defaults.
    mlp_options: fields of the MLP's options, likewise.
    keys: whose keys and values the mixer uses: "own", "lent" (own ones, which the next
      layers use, too) or "borrowed" (those of the last layer that lends).
  """

  mixer: str
  mlp: str = "swiglu"
  mixer_options: dict[str, Any] = dataclasses.field(default_factory=dict)
  mlp_options: dict[str, Any] = dataclasses.field(default_factory=dict)
  keys: str = "own"

  def __post_init__(self):
    if self.keys not in KEYS:
      raise errors.unknown("keys of a layer", self.keys, KEYS)
    mixer_cls = registry.find(MIXERS, self.mixer)
    config.require(
      self.keys == "own" or getattr(mixer_cls, "lends_keys", False),
      f"keys={self.keys!r} (share_keys) needs layers of 'attention': {self.mixer!r} "
      "has no keys and values that another layer could use",
    )
    mixer = config.to_dict(self.build_mixer_options())
    mlp = config.to_dict(self.build_mlp_options())
    object.__setattr__(self, "mixer_options", mixer)
    object.__setattr__(self, "mlp_options", mlp)

  def __hash__(self) -> int:
    return hash(json.dumps(config.to_dict(self), sort_keys=True))

  def build_mixer_options(self) -> Any:
    """The mixer's options dataclass."""
    options_cls = registry.find(MIXERS, self.mixer).options_cls
    return config.build(options_cls, self.mixer_options, f"{self.mixer} options")

  def build_mlp_options(self) -> Any:
    """The MLP's options dataclass, or an empty dict without an MLP."""
    if self.mlp == "none":
      config.require(not self.mlp_options, "mlp 'none' takes no mlp_options")
      return {}
    options_cls = registry.find(MLPS, self.mlp).options_cls
    return config.build(options_cls, self.mlp_options, f"{self.mlp} options")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderConfig:
  """A causal language model.

  The short form (`pattern`, `mlp`, their options, `num_layers`) expands to `layers`;
  given `layers`, it is ignored. Structural transforms only ever change `layers`.

  Attributes:
    vocab_size: V, tokens.
    embed_dim: D, width of the residual stream.
    num_layers: number of layers.
    pattern: mixers by name, repeated over the depth.
    mlp: MLP of every layer, unless `mlp_pattern` names several.
    mlp_pattern: MLPs by name, repeated over the depth, such as ("swiglu", "moe") for
      experts in every second layer.
    first_mlps: MLPs of the first layers, before the pattern begins.
    mixer_options: options of each mixer, by its name.
    mlp_options: options of each MLP, by its name.
    share: layers in a row that have the same parameters; 1 shares none.
    share_keys: layers in a row that use the keys and values, and when decoding the
      cache, of the first of them (cross-layer attention); 1 shares none.
    layers: one config a set of parameters; empty to expand the short form.
    runs: how equal layers are scanned; None finds the maximal runs.
    scan: False keeps every layer apart (`layer_<k>/...`), with an unrolled loop.
    tie_embeddings: whether the output head is the embedding.
    embed_std: standard deviation of the initial embedding.
    max_len: longest sequence the model is meant for (tokens).
    remat: what the backward pass recomputes: "none" nothing, "full" every layer,
      "dots" all but matrix products.
    norm: "rms" or "layer" (mean and variance, with a bias), of all norms of the stream.
    norm_eps: added to mean squares or variances.
    position: "learned" adds an embedding of absolute positions, `max_len` of them, to
      that of the tokens; "none" leaves order to the mixers.
    logit_cap: c of `c * tanh(logits / c)`, or None.
    architecture: "decoder", which tells it from an encoder in a file.
  """

  vocab_size: int
  embed_dim: int
  num_layers: int = 0
  pattern: tuple[str, ...] = ("attention",)
  mlp: str = "swiglu"
  mlp_pattern: tuple[str, ...] = ()
  first_mlps: tuple[str, ...] = ()
  mixer_options: dict[str, dict] = dataclasses.field(default_factory=dict)
  mlp_options: dict[str, dict] = dataclasses.field(default_factory=dict)
  share: int = 1
  share_keys: int = 1
  layers: tuple[LayerConfig, ...] = ()
  runs: tuple[tuple[int, int], ...] | None = None
  scan: bool = True
  tie_embeddings: bool = True
  embed_std: float = 0.02
  max_len: int = 2048
  remat: str = "none"
  norm: str = "rms"
  norm_eps: float = 1e-5
  position: str = "none"
  logit_cap: float | None = None
  architecture: str = "decoder"

  def __post_init__(self):
    if self.architecture != "decoder":
      raise errors.unknown("architecture", self.architecture, ("decoder",))
    for name in ("vocab_size", "embed_dim", "embed_std", "max_len", *_SHARES):
      config.require(getattr(self, name) > 0, f"{name} must be positive")
    for name, allowed in (
      ("remat", REMAT),
      ("norm", NORMS),
      ("position", POSITIONS),
    ):
      if getattr(self, name) not in allowed:
        raise errors.unknown(name, getattr(self, name), allowed)
    config.require(bool(self.pattern), "pattern must name at least one mixer")
    if not self.layers:
      config.require(self.num_layers > 0, "num_layers must be positive")
      config.require(
        len(self.first_mlps) <= self.num_layers,
        f"first_mlps names {len(self.first_mlps)} MLPs, the model has "
        f"{self.num_layers} layers",
      )
      layers = expand(
        self.pattern,
        self._mlps(),
        self.mixer_options,
        self.mlp_options,
      )
      layers = lending(self.share_keys, every(self.share, layers))
      object.__setattr__(self, "layers", layers)
    config.require(
      1 in (self.share, self.share_keys),
      "share and share_keys cannot both be more than 1: layers of equal parameters "
      "have keys of their own",
    )
    object.__setattr__(self, "num_layers", len(self.layers) * self.share)
    check_layers(self.layers, self.embed_dim, self.runs)
    for layer in self.layers:
      if getattr(layer.build_mlp_options(), "sees_future", False):
        raise errors.InputError(
          "moe router='expert_choice' in a causal decoder lets tokens depend on those "
          "that follow; use 'top_k', 'switch' or 'sigmoid', or ask for it by "
          "leak_future=True"
        )

  def _mlps(self) -> tuple[str, ...]:
    """The MLP of each layer, by name."""
    repeated = self.mlp_pattern or (self.mlp,)
    rest = range(self.num_layers - len(self.first_mlps))
    return (*self.first_mlps, *(repeated[i % len(repeated)] for i in rest))

  def __hash__(self) -> int:
    return hash(json.dumps(config.to_dict(self), sort_keys=True))

  @property
  def resolved_runs(self) -> tuple[layers_lib.Run, ...] | None:
    """The scanned runs, or None for an unrolled model."""
    return resolve_runs(self.layers, self.runs, self.scan)

  @property
  def layer_keys(self) -> tuple[Hashable, ...]:
    """One key a set of parameters; sets with equal keys are built equal."""
    return self.layers

  @property
  def layer_groups(self) -> tuple[int, ...]:
    """Layers in a row that a run must keep together, as it hands keys around."""
    return groups(self.layers)


def expand(
  pattern: tuple[str, ...],
  mlps: tuple[str, ...],
  mixer_options: Mapping[str, dict],
  mlp_options: Mapping[str, dict],
) -> tuple[LayerConfig, ...]:
  """One config a layer from the short form; see DecoderConfig.

  Args:
    pattern: mixers, repeated over the depth.
    mlps: the MLP of each layer.
    mixer_options, mlp_options: options by name.

  Raises:
    InputError: a name that is not a mixer or MLP, or a mistake in its options.
  """
  for field, options, package, extra in (
    ("mixer_options", mixer_options, MIXERS, ()),
    ("mlp_options", mlp_options, MLPS, ("none",)),
  ):
    for name in options:
      known = (*registry.names(package), *extra)
      if name not in known:
        raise errors.unknown(f"name in {field}", name, known)
  return tuple(
    LayerConfig(
      mixer=mixer,
      mlp=mlp,
      mixer_options=mixer_options.get(mixer, {}),
      mlp_options=mlp_options.get(mlp, {}),
    )
    for mixer, mlp in zip(itertools.cycle(pattern), mlps, strict=False)
  )


def every(share: int, layers: tuple[LayerConfig, ...]) -> tuple[LayerConfig, ...]:
  """The sets of parameters where `share` layers in a row have the same.

  Raises:
    InputError: `share` does not divide the layers, or ties unequal ones.
  """
  config.require(
    len(layers) % share == 0,
    f"share={share} must divide num_layers={len(layers)}",
  )
  for k, layer in enumerate(layers):
    first = k - k % share
    one, other = (f"{a.mixer} with {a.mlp}" for a in (layers[first], layer))
    config.require(
      layer == layers[first],
      f"share={share} ties layers {first} and {k}, but they are {one} and {other}; "
      "share needs equal layers",
    )
  return layers[::share]


def lending(
  share_keys: int, layers: tuple[LayerConfig, ...]
) -> tuple[LayerConfig, ...]:
  """The layers, of which every `share_keys`-th lends its keys to those that follow.

  Raises:
    InputError: `share_keys` does not divide the layers, or joins unequal mixers.
  """
  if share_keys == 1:
    return layers
  config.require(
    len(layers) % share_keys == 0,
    f"share_keys={share_keys} must divide num_layers={len(layers)}",
  )
  for k, layer in enumerate(layers):
    lender = k - k % share_keys
    config.require(
      (layer.mixer, layer.mixer_options)
      == (layers[lender].mixer, layers[lender].mixer_options),
      f"share_keys={share_keys} gives layer {k} ({layer.mixer}) the keys of layer "
      f"{lender} ({layers[lender].mixer}); they must be equal mixers",
    )
  return tuple(
    dataclasses.replace(layer, keys="borrowed" if k % share_keys else "lent")
    for k, layer in enumerate(layers)
  )


def groups(layers: tuple[LayerConfig, ...]) -> tuple[int, ...]:
  """How many layers belong together: each with those that borrow from it.

  Raises:
    InputError: a layer borrows, and none before it lends.
  """
  sizes: list[int] = []
  for k, layer in enumerate(layers):
    if layer.keys != "borrowed":
      sizes.append(1)
      continue
    config.require(
      bool(sizes) and layers[k - sizes[-1]].keys == "lent",
      f"layers[{k}] has keys='borrowed', but no layer before it has keys='lent'",
    )
    sizes[-1] += 1
  return tuple(sizes)


def check_layers(
  layers: tuple[LayerConfig, ...],
  embed_dim: int,
  runs: tuple[tuple[int, int], ...] | None,
) -> None:
  """Raises InputError if a mixer does not fit the width, or runs the layers."""
  sizes = groups(layers)
  for layer in layers:
    options = layer.build_mixer_options()
    if hasattr(options, "width"):
      options.width(embed_dim)
  if runs is not None:
    total = sum(period * repeats for period, repeats in runs)
    config.require(
      total == len(layers), f"runs cover {total} layers, the model has {len(layers)}"
    )
    starts = set(itertools.accumulate((0, *sizes)))
    bodies = itertools.chain(*([period] * repeats for period, repeats in runs))
    config.require(
      starts.issuperset(itertools.accumulate(bodies)),
      "runs part a layer from the one whose keys it borrows",
    )


def resolve_runs(
  layers: tuple[LayerConfig, ...], runs: tuple[tuple[int, int], ...] | None, scan: bool
) -> tuple[layers_lib.Run, ...] | None:
  """The scanned runs, the maximal ones by default, or None without `scan`."""
  if not scan:
    return None
  if runs is None:
    return layers_lib.find_runs(layers, groups(layers))
  return tuple(layers_lib.Run(*run) for run in runs)


def from_dict(values: Mapping[str, Any]) -> DecoderConfig:
  """The config written by `core.config.to_dict`.

  Raises:
    InputError: it is not the config of a decoder.
  """
  return config.build(DecoderConfig, values, "model")
