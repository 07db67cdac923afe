"""A causal language model whose layers are any mixers and MLPs, named by a config.

The mixer contract, kept by every module in effjax.nn.mixers:
`y_BLD, state = mixer(x_BLD, state=None, *, positions, segments, shared=None)` and
`mixer.init_state(batch, max_len, dtype)`. Without a state the mixer works on whole,
possibly packed, sequences: tokens of different segments do not meet. With a state it
continues it: prompts are padded on the right, padding is segment 0 and never changes a
state, and prefill followed by single steps equals the parallel form. The state carries
`length_B`, the tokens each row has seen. MLPs, in effjax.nn.mlps, are `mlp(x_BLD,
valid_BL)`; padding is not valid.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from effjax.core import errors, layers, registry
from effjax.core import precision as precision_lib
from effjax.core.shard import shard
from effjax.models import config as config_lib
from effjax.models import stack
from effjax.nn import embed, norm
from effjax.weights import verbs
from effjax.weights import weight as weight_lib


class Layer(nn.Module):
  """Pre-norm residual layer: `x + mixer(norm(x))`, then `x + mlp(norm(x))`.

  Attributes:
    config: which mixer and MLP.
    embed_dim: D.
    norm_eps: of both norms.
    out_scale: factor on the initial output projections.
    norm: key of nn.norm.NORMS.
  """

  config: config_lib.LayerConfig
  embed_dim: int
  norm_eps: float
  out_scale: float
  norm: str = "rms"

  def setup(self):
    """Builds the parts named in the config."""
    norm_cls = norm.NORMS[self.norm]
    self.mixer_norm = norm_cls(eps=self.norm_eps)
    self.mixer = self.make_mixer()
    if self.config.mlp != "none":
      self.mlp_norm = norm_cls(eps=self.norm_eps)
      mlp_cls = registry.find(config_lib.MLPS, self.config.mlp)
      self.mlp = mlp_cls(
        self.config.build_mlp_options(), self.embed_dim, out_scale=self.out_scale
      )

  @nn.nowrap
  def make_mixer(self) -> nn.Module:
    """The mixer module of this layer."""
    mixer_cls = registry.find(config_lib.MIXERS, self.config.mixer)
    options = self.config.build_mixer_options()
    return mixer_cls(options, self.embed_dim, out_scale=self.out_scale)

  def __call__(
    self,
    x_BLD: jax.Array,
    state: Any,
    positions: jax.Array,
    segments: jax.Array,
    keys: Any,
  ) -> tuple[jax.Array, Any, Any]:
    """The layer's output, the mixer's new state, and the keys lent last."""
    x_norm_BLD = self.mixer_norm(x_BLD)
    places = {"positions": positions, "segments": segments}
    if self.config.keys == "lent":
      y_BLD, state, keys = self.mixer(x_norm_BLD, state, lend=True, **places)
    else:
      borrowed = {"shared": keys} if self.config.keys == "borrowed" else {}
      y_BLD, state = self.mixer(x_norm_BLD, state, **places, **borrowed)
    x_BLD = shard(x_BLD + y_BLD, ("batch", "length", "embed_act"))
    if self.config.mlp != "none":
      x_BLD = x_BLD + self.mlp(self.mlp_norm(x_BLD), segments > 0)
      x_BLD = shard(x_BLD, ("batch", "length", "embed_act"))
    return x_BLD, state, keys


class Decoder(nn.Module):
  """A causal language model.

  With `config.share = n` the parameters of `layer_<k>`, or of step k of a run, are
  those of layers `k n` to `k n + n - 1` (Lan et al. 2019, arXiv:1909.11942, section
  3.1): they exist, are counted, stored and compressed once, and their gradient is the
  sum over the uses. The computation and the decoding state are those of all layers.

  Attributes:
    config: see DecoderConfig.
    precision: dtypes of the computation; parameters are float32.
  """

  config: config_lib.DecoderConfig
  precision: precision_lib.PrecisionConfig = precision_lib.PrecisionConfig()

  @nn.compact
  def __call__(
    self,
    tokens_BL: jax.Array,
    positions: jax.Array | None = None,
    segments: jax.Array | None = None,
    state: Mapping[str, Any] | None = None,
    *,
    at_B: jax.Array | None = None,
  ) -> tuple[jax.Array, Mapping[str, Any] | None]:
    """Logits of the next token at every position.

    Args:
      tokens_BL: int32 tokens.
      positions: int32 `[B, L]`, restarting with each segment; by default they count
        from 0, or from the state's length.
      segments: int32 `[B, L]`, 0 for padding; all 1 by default.
      state: decoding state from `init_state` or an earlier call; donate it.
      at_B: int32, the only place of each row whose logits are wanted, which spares the
        head of a long prompt; None for all.

    Returns:
      Logits `[B, L, V]` float32, or `[B, 1, V]`, and the new state (None without one).
    """
    cfg = self.config
    if positions is None:
      positions = jnp.broadcast_to(jnp.arange(tokens_BL.shape[1]), tokens_BL.shape)
      if state is not None:
        positions = positions + state["length_B"][:, None]
    if segments is None:
      segments = jnp.ones(tokens_BL.shape, jnp.int32)
    table = embed.Embed(cfg.vocab_size, cfg.embed_dim, cfg.embed_std, name="embed")
    x_BLD = table(tokens_BL, self.precision.dtype)
    if cfg.position == "learned":
      x_BLD += self._position_embedding(positions)
    x_BLD = shard(x_BLD, ("batch", "length", "embed_act"))
    with weight_lib.token_weights((segments > 0).astype(jnp.float32)):
      x_BLD, new_state = stack.apply(
        cfg.layers,
        cfg.resolved_runs,
        self._make_layer,
        x_BLD,
        state,
        positions,
        segments,
      )
    seen_BL = segments > 0
    if at_B is not None:
      x_BLD = jnp.take_along_axis(x_BLD, at_B[:, None, None], axis=1)
      seen_BL = jnp.take_along_axis(seen_BL, at_B[:, None], axis=1)
    with weight_lib.token_weights(seen_BL.astype(jnp.float32)):
      x_BLD = norm.NORMS[cfg.norm](eps=cfg.norm_eps, name="final_norm")(x_BLD)
      logits_BLV = self._logits(x_BLD, table)
    if state is not None:
      seen_B = jnp.sum(segments > 0, axis=1, dtype=jnp.int32)
      new_state["length_B"] = state["length_B"] + seen_B
    return shard(logits_BLV, ("rows_out", "length", "vocab")), new_state

  @nn.nowrap
  def _make_layer(self, layer: config_lib.LayerConfig, name: str | None) -> Any:
    cfg = self.config
    cls = stack.rematerialized(Layer, cfg.remat, cfg.resolved_runs is not None)
    return stack.shared(self._layer(cls, layer, name), cfg.share)

  @nn.nowrap
  def _layer(self, cls: type[nn.Module], layer: Any, name: str | None) -> nn.Module:
    cfg = self.config
    # GPT-2's scaling: residual branches start smaller the deeper the model is.
    out_scale = (2 * cfg.num_layers) ** -0.5
    return cls(layer, cfg.embed_dim, cfg.norm_eps, out_scale, cfg.norm, name=name)

  @nn.nowrap
  def layer(self, index: int) -> nn.Module:
    """Layer number `index` alone; layers that are built equal compare equal."""
    return self._layer(Layer, self.config.layers[index], None)

  def _position_embedding(self, positions_BL: jax.Array) -> jax.Array:
    """The learned embedding `[B, L, D]` of absolute positions."""
    cfg = self.config
    if positions_BL.shape[1] > cfg.max_len:
      raise errors.InputError(
        f"{positions_BL.shape[1]} tokens in a row, the decoder has max_len="
        f"{cfg.max_len} learned positions"
      )
    learned = embed.Embed(
      cfg.max_len,
      cfg.embed_dim,
      cfg.embed_std,
      ("position", "embed"),
      name="position_embed",
    )
    return learned(positions_BL, self.precision.dtype)

  def _logits(self, x_BLD: jax.Array, table: embed.Embed) -> jax.Array:
    cfg = self.config
    if cfg.tie_embeddings:
      logits_BLV = table.logits(x_BLD)
    else:
      head = weight_lib.weight(
        self,
        "head",
        nn.initializers.lecun_normal(),
        (cfg.embed_dim, cfg.vocab_size),
        axes=("embed", "vocab"),
        reads="final_norm",
      )
      logits_BLV = verbs.contract(x_BLD, head).astype(jnp.float32)
    if cfg.logit_cap is not None:
      logits_BLV = cfg.logit_cap * jnp.tanh(logits_BLV / cfg.logit_cap)
    return logits_BLV

  @nn.nowrap
  def init_state(self, batch: int, max_len: int) -> dict[str, Any]:
    """An empty decoding state for `batch` rows of at most `max_len` tokens."""
    cfg = self.config

    def one(layer: config_lib.LayerConfig) -> Any:
      if layer.keys == "borrowed":
        return ()
      mixer = Layer(layer, cfg.embed_dim, cfg.norm_eps, 1.0).make_mixer()
      # Separate arrays, because a state is donated.
      states = [
        mixer.init_state(batch, max_len, self.precision.dtype) for _ in range(cfg.share)
      ]
      return tuple(states) if cfg.share > 1 else states[0]

    state: dict[str, Any] = {"length_B": jnp.zeros((batch,), jnp.int32)}
    if cfg.resolved_runs is None:
      return state | {f"layer_{k}": one(layer) for k, layer in enumerate(cfg.layers)}
    start = 0
    for i, run in enumerate(cfg.resolved_runs):
      state[f"run_{i}"] = {
        f"layer_{j}": jax.tree.map(
          lambda a, n=run.repeats: jnp.broadcast_to(a, (n, *a.shape)).copy(),
          one(cfg.layers[start + j]),
        )
        for j in range(run.period)
      }
      start += run.num_layers
    return state

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
    """Layers with equal keys are built equal."""
    return self.config.layer_keys

  @property
  def layer_groups(self) -> tuple[int, ...]:
    """Layers that stay together, since some borrow the keys of another."""
    return self.config.layer_groups

  @nn.nowrap
  def with_runs(self, runs: tuple[layers.Run, ...] | None) -> "Decoder":
    """The same model scanned as given, or unrolled for None."""
    return Decoder(stack.scanned_as(self.config, runs), self.precision)
