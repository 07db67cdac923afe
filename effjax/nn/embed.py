"""Embeddings: of tokens (also the output head when tied), positions, token types."""

import jax
import jax.numpy as jnp
from flax import linen as nn

from effjax.weights import verbs
from effjax.weights import weight as weight_lib


class Embed(nn.Module):
  """A table `[V, D]`: looked up for tokens, contracted on D for tied logits.

  Attributes:
    vocab_size: V, number of tokens.
    embed_dim: D.
    init_std: standard deviation of the initial entries.
    axes: logical axes of the table: what its rows are, and its width.
  """

  vocab_size: int
  embed_dim: int
  init_std: float = 0.02
  axes: tuple[str, str] = ("vocab", "embed")

  def setup(self):
    """Declares the table."""
    self.table = weight_lib.weight(
      self,
      "table",
      nn.initializers.normal(self.init_std),
      (self.vocab_size, self.embed_dim),
      axes=self.axes,
      kind="embedding",
    )

  def __call__(self, tokens_BL: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
    """Embeds int32 tokens `[B, L]` to `[B, L, D]` of `dtype`."""
    return verbs.lookup(self.table, tokens_BL).astype(dtype)

  def logits(self, x_BLD: jax.Array) -> jax.Array:
    """Tied output head: float32 logits `[B, L, V]`."""
    return verbs.contract(x_BLD, self.table, transpose=True).astype(jnp.float32)
