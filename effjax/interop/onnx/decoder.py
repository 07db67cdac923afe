"""A decoder in ONNX: embedding, layers, head, and the cache between steps."""

from typing import Any

import numpy as np

from effjax.core import errors
from effjax.interop.onnx import attention, mlps, norms
from effjax.interop.onnx import matrices as matrices_lib

MIXERS = ("attention",)


def check(config: Any) -> None:
  """Raises InputError for a layer that cannot be written; names it."""
  for k, layer in enumerate(config.layers):
    for what, name, allowed in (
      ("mixer", layer.mixer, MIXERS),
      ("mlp", layer.mlp, (*mlps.MLPS, "none")),
    ):
      if name not in allowed:
        raise errors.InputError(
          f"layers[{k}] has {what}={name!r}, which an export to ONNX cannot write; "
          f"available: {', '.join(allowed)}"
        )
    router = getattr(layer.build_mlp_options(), "router", mlps.ROUTERS[0])
    if router not in mlps.ROUTERS:
      raise errors.InputError(
        f"layers[{k}] has moe router={router!r}, which an export to ONNX cannot write; "
        f"available: {', '.join(mlps.ROUTERS)}"
      )


class Decoder:
  """Writes a decoder of a config into a graph.

  Attributes:
    config: see DecoderConfig.
    cache: whether past keys and values come in and present ones go out.
    num_caches: layers that have keys and values of their own, so far (count).
  """

  def __init__(self, config: Any, matrices: matrices_lib.Matrices, cache: bool):
    """See the attributes."""
    self.config = config
    self.cache = cache
    self.num_caches = 0
    self._matrices = matrices
    self._graph = matrices.graph
    self._present: list[tuple[str, str, int, int]] = []

  def write(self) -> None:
    """All of it, with its inputs and outputs."""
    cfg, graph, matrices = self.config, self._graph, self._matrices
    ids = graph.input("input_ids", np.int64, ("batch", "length"))
    total = "total" if self.cache else "length"
    mask = graph.input("attention_mask", np.int64, ("batch", total))
    places = attention.Places(graph, ids, mask, self.cache)
    x_BLD = matrices.embedding("embed/table", ids)
    if cfg.position == "learned":
      positions_BL = graph.op("Cast", places.positions_BL, to=7)  # int64
      learned = matrices.embedding("position_embed/table", positions_BL)
      x_BLD = graph.op("Add", x_BLD, learned)
    keys = None
    for k, layer in enumerate(cfg.layers):
      for use in range(cfg.share):
        name = f"layer_{k}" if cfg.share == 1 else f"layer_{k}.{use}"
        with graph.scope(name):
          x_BLD, keys = self._layer(layer, f"layer_{k}", x_BLD, keys, places)
    with graph.scope("head"):
      logits_BLV = self._head(x_BLD)
    graph.output("logits", logits_BLV, np.float32, ("batch", "length", cfg.vocab_size))
    for name, value, groups, head_dim in self._present:
      graph.output(name, value, np.float32, ("batch", groups, "total", head_dim))

  def _layer(
    self,
    layer: Any,
    path: str,
    x_BLD: str,
    keys: tuple[str, str] | None,
    places: attention.Places,
  ) -> tuple[str, tuple[str, str] | None]:
    """A pre-norm residual layer; and the keys and values that it used."""
    graph, matrices = self._graph, self._matrices
    options = layer.build_mixer_options()
    mixer = attention.Attention(matrices, places, options, f"{path}/mixer")
    with graph.scope("mixer"):
      h_BLD = self._norm(x_BLD, f"{path}/mixer_norm")
      if layer.keys != "borrowed":
        keys = self._with_past(mixer.keys(h_BLD), options)
      x_BLD = graph.op("Add", x_BLD, mixer.mix(h_BLD, *keys))
    if layer.mlp == "none":
      return x_BLD, keys
    with graph.scope("mlp"):
      h_BLD = self._norm(x_BLD, f"{path}/mlp_norm")
      mlp = mlps.MLPS[layer.mlp]
      y_BLD = mlp(matrices, h_BLD, layer.build_mlp_options(), f"{path}/mlp")
      return graph.op("Add", x_BLD, y_BLD), keys

  def _with_past(self, keys: tuple[str, str], options: Any) -> tuple[str, str]:
    """Keys and values of the cache in front of those of the tokens at hand."""
    if not self.cache:
      return keys
    graph, sizes = self._graph, (options.num_kv_heads, options.head_dim)
    dims = ("batch", sizes[0], "past", sizes[1])
    whole = []
    for kind, new in zip(("key", "value"), keys, strict=True):
      end = f"{self.num_caches}.{kind}"
      past = graph.input(f"past_key_values.{end}", np.float32, dims)
      whole.append(graph.op("Concat", past, new, axis=2))
      self._present.append((f"present.{end}", whole[-1], *sizes))
    self.num_caches += 1
    return whole[0], whole[1]

  def _norm(self, x_BLD: str, path: str) -> str:
    norm = norms.NORMS[self.config.norm]
    return norm(self._matrices, x_BLD, path, self.config.norm_eps)

  def _head(self, x_BLD: str) -> str:
    cfg = self.config
    x_BLD = self._norm(x_BLD, "final_norm")
    if cfg.tie_embeddings:
      logits_BLV = self._matrices.product(x_BLD, "embed/table", transpose=True)
    else:
      logits_BLV = self._matrices.product(x_BLD, "head")
    if cfg.logit_cap is None:
      return logits_BLV
    return attention.capped(self._graph, logits_BLV, cfg.logit_cap)
