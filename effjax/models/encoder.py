"""A bidirectional encoder: BERT, ALBERT, and both with any bidirectional mixer.

Sources: Devlin et al. 2019, arXiv:1810.04805 (BERT), with the layer of Vaswani et al.
2017; Lan et al. 2020, arXiv:1909.11942, section 3.1 (ALBERT: factorized embeddings,
parameters shared across layers); Reimers and Gurevych 2019, arXiv:1908.10084, section 3
(sentences as means over their tokens).
Deviations: no dropout; matrices inside mixers keep the mixer's own initializer where it
has no `init_std`; token types are counted once per token also in packed rows, where
positions restart with each document; the next-sentence head is left out; means are
normalized, as in the models that are published for cosine similarity.

Every mixer keeps the contract in effjax.models.decoder and is built with
`causal=False`. Padding is segment 0; documents packed into a row do not meet.

Local letters: E width of the embeddings, C classes.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from effjax.core import errors, layers, registry
from effjax.core import precision as precision_lib
from effjax.core.shard import shard
from effjax.models import config as config_lib
from effjax.models import encoder_config, stack
from effjax.nn import embed, norm
from effjax.weights import verbs
from effjax.weights import weight as weight_lib

# The least square of a length that is divided by.
_TINY = 1e-24


class EncoderLayer(nn.Module):
  """A mixer and an MLP, each with a residual connection and a LayerNorm.

  Attributes:
    config: which mixer and MLP.
    embed_dim: D.
    norm_eps: of both norms.
    pre_norm: `x + f(norm(x))` in place of `norm(x + f(x))`.
    out_scale: factor on the initial output projections.
  """

  config: config_lib.LayerConfig
  embed_dim: int
  norm_eps: float
  pre_norm: bool
  out_scale: float

  def setup(self):
    """Builds the parts named in the config."""
    cfg = self.config
    # After a post-norm comes the residual stream itself, so no branch has that norm to
    # itself and nothing can be moved from the norm into the weights that read it.
    reads = (lambda name: name) if self.pre_norm else (lambda name: "")
    mixer_cls = registry.find(config_lib.MIXERS, cfg.mixer)
    self.mixer = mixer_cls(
      cfg.build_mixer_options(),
      self.embed_dim,
      reads=reads("mixer_norm"),
      causal=False,
      out_scale=self.out_scale,
    )
    self.mixer_norm = norm.LayerNorm(eps=self.norm_eps)
    if cfg.mlp != "none":
      mlp_cls = registry.find(config_lib.MLPS, cfg.mlp)
      self.mlp = mlp_cls(
        cfg.build_mlp_options(),
        self.embed_dim,
        reads=reads("mlp_norm"),
        out_scale=self.out_scale,
      )
      self.mlp_norm = norm.LayerNorm(eps=self.norm_eps)

  def __call__(
    self,
    x_BLD: jax.Array,
    state: None,
    positions: jax.Array,
    segments: jax.Array,
    keys: None,
  ) -> tuple[jax.Array, None, None]:
    """The layer's output; an encoder has no decoding state and shares no keys."""
    h_BLD = self.mixer_norm(x_BLD) if self.pre_norm else x_BLD
    y_BLD, _ = self.mixer(h_BLD, positions=positions, segments=segments)
    x_BLD = self._normalized(x_BLD + y_BLD, "mixer_norm")
    if self.config.mlp != "none":
      h_BLD = self.mlp_norm(x_BLD) if self.pre_norm else x_BLD
      x_BLD = self._normalized(x_BLD + self.mlp(h_BLD, segments > 0), "mlp_norm")
    return x_BLD, state, keys

  def _normalized(self, x_BLD: jax.Array, name: str) -> jax.Array:
    """What a branch leaves in the residual stream."""
    x_BLD = x_BLD if self.pre_norm else getattr(self, name)(x_BLD)
    return shard(x_BLD, ("batch", "length", "embed_act"))


class Encoder(nn.Module):
  """A bidirectional masked-language model, classifier or sentence encoder.

  With `config.share = n` the parameters of `layer_<k>`, or of step k of a run, are
  those of layers `k n` to `k n + n - 1`: they exist, are counted, stored and compressed
  once, their gradient is the sum over the uses, and `core.unstack` gives one copy a
  parameter set.

  Attributes:
    config: see EncoderConfig.
    precision: dtypes of the computation; parameters are float32.
  """

  config: encoder_config.EncoderConfig
  precision: precision_lib.PrecisionConfig = precision_lib.PrecisionConfig()

  @nn.compact
  def __call__(
    self,
    tokens_BL: jax.Array,
    positions: jax.Array | None = None,
    segments: jax.Array | None = None,
    *,
    token_types_BL: jax.Array | None = None,
  ) -> tuple[jax.Array, None]:
    """Logits of tokens or classes, or an embedding of every row.

    Args:
      tokens_BL: int32 tokens, masked ones replaced already.
      positions: int32 `[B, L]`, restarting with each segment; by default from 0.
      segments: int32 `[B, L]`, 0 for padding; all 1 by default.
      token_types_BL: int32, sentence A or B of each token; all 0 by default.

    Returns:
      float32 logits `[B, L, V]`, or of the row's first document: with `num_classes`
      logits `[B, C]`, with `pooling` an embedding `[B, D]` of length 1 (of length 0
      where the row is padding only); and None in the place of a decoder's state.

    Raises:
      InputError: a row longer than the learned positions, or token types that the
        config has no embedding for.
    """
    cfg = self.config
    length = tokens_BL.shape[1]
    if cfg.position == "learned" and positions is None and length > cfg.max_len:
      raise errors.InputError(
        f"{length} tokens in a row, the encoder has max_len={cfg.max_len} positions"
      )
    if positions is None:
      positions = jnp.broadcast_to(jnp.arange(length), tokens_BL.shape)
    if segments is None:
      segments = jnp.ones(tokens_BL.shape, jnp.int32)
    width = cfg.embedding_dim or cfg.embed_dim
    axis = "embed" if width == cfg.embed_dim else "embedding"
    table = embed.Embed(
      cfg.vocab_size, width, cfg.init_std, ("vocab", axis), name="embed"
    )
    with weight_lib.token_weights((segments > 0).astype(jnp.float32)):
      x_BLE = self._embeddings(table, tokens_BL, positions, token_types_BL)
      x_BLD = self._widened(x_BLE)
      x_BLD = shard(x_BLD, ("batch", "length", "embed_act"))
      x_BLD, _ = stack.apply(
        cfg.layers,
        cfg.resolved_runs,
        self._make_layer,
        x_BLD,
        None,
        positions,
        segments,
      )
      if cfg.norm == "pre":
        x_BLD = norm.LayerNorm(eps=cfg.norm_eps, name="final_norm")(x_BLD)
      if cfg.pooling is not None:
        return _mean(x_BLD, segments), None
      if cfg.num_classes is None:
        logits_BLV = self._token_logits(x_BLD, table)
        return shard(logits_BLV, ("rows_out", "length", "vocab")), None
    with weight_lib.token_weights((segments[:, 0] > 0).astype(jnp.float32)):
      return self._class_logits(x_BLD[:, 0]), None

  def _embeddings(
    self,
    table: embed.Embed,
    tokens_BL: jax.Array,
    positions_BL: jax.Array,
    token_types_BL: jax.Array | None,
  ) -> jax.Array:
    """The normalized sum `[B, L, E]` of token, position and type embeddings."""
    cfg, dtype = self.config, self.precision.dtype
    width, axis = table.embed_dim, table.axes[1]
    x_BLE = table(tokens_BL, dtype)
    if cfg.position == "learned":
      axes = ("position", axis)
      learned = embed.Embed(
        cfg.max_len, width, cfg.init_std, axes, name="position_embed"
      )
      x_BLE = x_BLE + learned(positions_BL, dtype)
    if cfg.num_token_types:
      axes = ("token_type", axis)
      types = embed.Embed(
        cfg.num_token_types, width, cfg.init_std, axes, name="type_embed"
      )
      if token_types_BL is None:
        token_types_BL = jnp.zeros(tokens_BL.shape, jnp.int32)
      x_BLE = x_BLE + types(token_types_BL, dtype)
    elif token_types_BL is not None:
      raise errors.InputError(
        "token types given, but num_token_types=0; set it or leave them out"
      )
    if cfg.embedding_norm:
      x_BLE = norm.LayerNorm(axis, cfg.norm_eps, name="embed_norm")(x_BLE)
    return x_BLE

  def _widened(self, x_BLE: jax.Array) -> jax.Array:
    """Embeddings in the width of the model: ALBERT projects, BERT has it already."""
    cfg = self.config
    if x_BLE.shape[-1] == cfg.embed_dim:
      return x_BLE
    reads = "embed_norm" if cfg.embedding_norm else ""
    axes = ("embedding", "embed")
    return self._project(x_BLE, "embed_out", cfg.embed_dim, axes, reads)

  @nn.nowrap
  def _make_layer(self, layer: config_lib.LayerConfig, name: str) -> Any:
    cfg = self.config
    cls = stack.rematerialized(EncoderLayer, cfg.remat, cfg.resolved_runs is not None)
    return stack.shared(self._layer(cls, layer, name), cfg.share)

  @nn.nowrap
  def _layer(self, cls: type[nn.Module], layer: Any, name: str | None) -> nn.Module:
    cfg = self.config
    pre_norm = cfg.norm == "pre"
    # A post-norm rescales the stream after each branch; only a sum that grows with the
    # depth needs branches that start small (GPT-2's factor).
    out_scale = (2 * cfg.num_layers) ** -0.5 if pre_norm else 1.0
    return cls(layer, cfg.embed_dim, cfg.norm_eps, pre_norm, out_scale, name=name)

  @nn.nowrap
  def layer(self, index: int) -> nn.Module:
    """Layer number `index` alone; layers that are built equal compare equal."""
    return self._layer(EncoderLayer, self.config.layers[index], None)

  def _token_logits(self, x_BLD: jax.Array, table: embed.Embed) -> jax.Array:
    """BERT's masked-language head over the tied embedding."""
    cfg = self.config
    axes = ("embed", table.axes[1])
    h_BLE = self._project(x_BLD, "head", table.embed_dim, axes, self._stream())
    h_BLE = nn.gelu(h_BLE, approximate=cfg.head_approximate)
    h_BLE = norm.LayerNorm(table.axes[1], cfg.norm_eps, name="head_norm")(h_BLE)
    bias = weight_lib.weight(
      self,
      "vocab_bias",
      nn.initializers.zeros,
      (cfg.vocab_size,),
      axes=("vocab",),
      kind="bias",
    )
    return table.logits(h_BLE) + verbs.dense(bias)[None, None, :]

  def _class_logits(self, x_BD: jax.Array) -> jax.Array:
    """BERT's pooler and classifier, over one token a row."""
    cfg = self.config
    # The pooled units are no part of the residual stream.
    axes = ("embed", "pooled")
    h_BP = self._project(x_BD, "pooler", cfg.embed_dim, axes, self._stream())
    axes = ("pooled", "classes")
    # Through tanh no scale can move from the pooler into the classifier.
    logits_BC = self._project(jnp.tanh(h_BP), "classifier", cfg.num_classes, axes, "")
    return logits_BC.astype(jnp.float32)

  @nn.nowrap
  def _stream(self) -> str:
    """The norm whose output the heads have to themselves, if there is one."""
    return "final_norm" if self.config.norm == "pre" else ""

  def _project(
    self, x: jax.Array, name: str, size: int, axes: tuple[str, str], reads: str
  ) -> jax.Array:
    """`x @ w + b`."""
    init = nn.initializers.normal(self.config.init_std)
    w = weight_lib.weight(self, name, init, (x.shape[-1], size), axes=axes, reads=reads)
    b = weight_lib.weight(
      self,
      f"{name}_bias",
      nn.initializers.zeros,
      (size,),
      axes=axes[1:],
      kind="bias",
    )
    bias = verbs.dense(b).astype(x.dtype)
    return verbs.contract(x, w) + jnp.expand_dims(bias, tuple(range(x.ndim - 1)))

  @nn.nowrap
  def example_inputs(self) -> tuple[jax.Array]:
    """Arguments of a smallest call, to trace the model with."""
    return (jnp.zeros((1, 2), jnp.int32),)

  @property
  def runs(self) -> tuple[layers.Run, ...] | None:
    """The scanned runs, or None for an unrolled model."""
    return self.config.resolved_runs

  @property
  def layer_keys(self) -> tuple[Any, ...]:
    """One key a parameter set; sets with equal keys are built equal."""
    return self.config.layer_keys

  @property
  def layer_groups(self) -> tuple[int, ...]:
    """Each layer alone: none borrows keys."""
    return (1,) * len(self.layer_keys)

  @nn.nowrap
  def with_runs(self, runs: tuple[layers.Run, ...] | None) -> "Encoder":
    """The same model scanned as given, or unrolled for None."""
    return Encoder(stack.scanned_as(self.config, runs), self.precision)


def _mean(x_BLD: jax.Array, segments_BL: jax.Array) -> jax.Array:
  """The normalized mean `[B, D]` over the tokens of each row's first document."""
  first_BL = (segments_BL == segments_BL[:, :1]) & (segments_BL > 0)
  # The length makes the number of tokens cancel out: the sum says as much as the mean.
  sum_BD = jnp.sum(x_BLD.astype(jnp.float32), axis=1, where=first_BL[..., None])
  square_B1 = jnp.sum(jnp.square(sum_BD), axis=-1, keepdims=True)
  # Rows without any token are zero, and so is their gradient.
  return sum_BD * jax.lax.rsqrt(jnp.maximum(square_B1, _TINY))
