"""Keys and values of attention kept as int8 or int4 codes while decoding.

What and from where: effjax.nn.caches.quantized. Parameters stay as they are: a model
says in its config how it keeps keys and values, and this changes that. From then on
they are rounded wherever the model is run, also where whole sequences are, so that the
quality of this stage is that of decoding with such a cache.
"""

import dataclasses
import logging
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from effjax.core import errors, select, technique
from effjax.core import layers as layers_lib
from effjax.models import config as config_lib
from effjax.models import decoder
from effjax.nn.caches import quantized

log = logging.getLogger(__name__)

# Mixers that have the option.
_MIXERS = ("attention", "bigbird")


@dataclasses.dataclass(frozen=True, kw_only=True)
class KVCacheOptions:
  """Options of the cache.

  Attributes:
    format: "int8", symmetric, or "int4", with zero points.
    group: consecutive entries of a head that share a scale; 0 for the whole head, None
      for the whole head with int8 and the divisor of it nearest to 32 with int4.
  """

  format: str = "int8"
  group: int | None = None

  def __post_init__(self):
    if self.format not in quantized.FORMATS:
      raise errors.unknown("format of a cache", self.format, quantized.FORMATS)


def change(
  model: Any,
  params: Mapping[str, Any],
  specs: Mapping[str, Any],
  batches: Sequence[Any],
  paths: Collection[str],
  options: KVCacheOptions,
) -> tuple[Any, dict[str, Any]]:
  """The model with other caches, in layers whose projection of keys is selected.

  Layers that use the keys of an earlier one follow it. Layers of other mixers stay as
  they are; the log names those.

  Raises:
    InputError: no selected layer has such a cache; a group does not divide the heads.
  """
  del batches
  made = _outcome(model, params, specs, paths, options)
  new = made[0].config.layers
  left = sorted({layer.mixer for layer in new if layer.mixer not in _MIXERS})
  held = [_held(layer) for layer in new]
  sizes = {(head.num_bytes, head.head_dim) for head in held if head is not None}
  log.info(
    "kv_cache: %s in %d of %d layers, %s%s",
    options.format,
    sum(head is not None for head in held),
    len(new),
    ", ".join(f"{n} bytes a head of {dim} entries" for n, dim in sorted(sizes)),
    f"; as they were: layers of {', '.join(left)}" if left else "",
  )
  return made


def _outcome(
  model: Any,
  params: Mapping[str, Any],
  specs: Mapping[str, Any],
  paths: Collection[str],
  options: KVCacheOptions,
) -> tuple[Any, dict[str, Any]]:
  """The model, and the parameters as they are; nothing is computed."""
  del specs
  if not isinstance(model, decoder.Decoder):
    raise errors.InputError(
      f"kv_cache needs a model that decodes; this is an {type(model).__name__}"
    )
  chosen = _chosen(model, paths)
  layers, takes = [], False
  for k, layer in enumerate(model.config.layers):
    # The keys that a layer borrows are held as its lender holds them.
    takes = takes if layer.keys == "borrowed" else k in chosen
    layers.append(_with_cache(layer, options) if takes else layer)
  if not chosen:
    mixers = ", ".join(dict.fromkeys(layer.mixer for layer in layers))
    raise errors.InputError(
      f"kv_cache is for layers of {' or '.join(_MIXERS)} whose weight k is selected; "
      f"there is none among layers of {mixers}"
    )
  config = dataclasses.replace(model.config, layers=tuple(layers))
  # Which layers are scanned together is how the parameters lie: it stays.
  made = decoder.Decoder(config, model.precision).with_runs(model.runs)
  return made, dict(params)


def _chosen(model: decoder.Decoder, paths: Collection[str]) -> set[int]:
  """Numbers of the layers with such a cache whose projection of keys is selected."""
  if model.runs is None:
    prefixes = {k: f"layer_{k}" for k in range(len(model.config.layers))}
  else:
    places = layers_lib.places(model.runs).items()
    prefixes = {k: f"{run}/{body}" for (run, body), ks in places for k in ks}
  return {
    k
    for k, layer in enumerate(model.config.layers)
    if layer.mixer in _MIXERS and f"{prefixes[k]}/mixer/k" in paths
  }


def _with_cache(
  layer: config_lib.LayerConfig, options: KVCacheOptions
) -> config_lib.LayerConfig:
  cache = {"kv_cache": options.format, "kv_group": options.group}
  return dataclasses.replace(layer, mixer_options=layer.mixer_options | cache)


def _held(layer: config_lib.LayerConfig) -> quantized.HeadFormat | None:
  """How a layer holds a head, or None as it is."""
  return getattr(layer.build_mixer_options(), "held", None)


TECHNIQUE = technique.ModelTransform(
  fn=change,
  options_cls=KVCacheOptions,
  default_where=select.Where(kind=("matrix",)),
  outcome=_outcome,
)
