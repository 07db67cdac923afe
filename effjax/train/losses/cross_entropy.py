"""Cross entropy of the next token, in nats, weighted by the batch.

Deviations from the textbook form are about memory only. The log-softmax is never held:
its backward pass recomputes it from the logits and their log-sum-exp. With `chunk`, the
logits of the whole batch are never held either: the output head runs over chunks of
tokens, and since the loss is a sum, the gradient of a chunk is taken as soon as its
logits exist. T tokens, V vocabulary.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from effjax.core import config
from effjax.train.losses import base


@dataclasses.dataclass(frozen=True, kw_only=True)
class CrossEntropyOptions:
  """Options of the cross entropy.

  Attributes:
    chunk: tokens whose logits exist at once, where the model can hand its output head
      over (it has `readout` among the arguments of its call); 0 for the whole batch.
  """

  chunk: int = 1024

  def __post_init__(self):
    config.require(self.chunk >= 0, f"chunk={self.chunk} must not be negative")


def cross_entropy(options: CrossEntropyOptions) -> base.LossFn:
  """The loss function; see losses.base for its contract.

  What modules write to `losses` is added to the mean over the targets. With dropout or
  other noise the modules get `rng` as the stream "dropout".
  """

  def loss_fn(
    model: nn.Module,
    variables: Mapping[str, Any],
    batch: Mapping[str, jax.Array],
    rng: jax.Array,
  ) -> base.Loss:
    targets_BL = batch["targets"]
    weights_BL = batch["weights"].astype(jnp.float32)
    kwargs = {}
    if options.chunk and getattr(model, "has_readout", False):
      kwargs["readout"] = lambda x_BLD, head_fn, head: summed_over_chunks(
        head_fn, x_BLD, head, targets_BL, weights_BL, options.chunk
      )
    (output, _), written = model.apply(
      variables,
      batch["inputs"],
      positions=batch.get("positions"),
      segments=batch.get("segments"),
      rngs={"dropout": rng},
      mutable=list(base.WRITTEN),
      **kwargs,
    )
    weight = jnp.sum(weights_BL)
    nll = output if kwargs else jnp.sum(nll_of(output, targets_BL) * weights_BL)
    metrics = {k: v * weight for k, v in base.logged(written).items()}
    objective = nll
    if written.get("losses"):
      extra = base.auxiliary(written) * weight
      objective = nll + extra
      metrics |= {"cross_entropy": nll, "auxiliary_loss": extra}
    state = {"state": written["state"]} if "state" in written else {}
    return base.Loss(objective, weight, metrics, state)

  return loss_fn


@jax.custom_vjp
def nll_of(logits: jax.Array, targets: jax.Array) -> jax.Array:
  """Negative log-likelihood of each target, float32.

  Args:
    logits: `[..., V]`, any floating dtype; the softmax is computed in float32.
    targets: `[...]` int32.
  """
  return _nll_forward(logits, targets)[0]


def _nll_forward(logits: jax.Array, targets: jax.Array) -> tuple[jax.Array, Any]:
  wide = logits.astype(jnp.float32)
  top = jnp.max(wide, axis=-1, keepdims=True)
  lse = top[..., 0] + jnp.log(jnp.sum(jnp.exp(wide - top), axis=-1))
  hit = jnp.take_along_axis(wide, targets[..., None], axis=-1)[..., 0]
  return lse - hit, (logits, targets, lse)


def _nll_backward(residuals: Any, cotangent: jax.Array) -> tuple[jax.Array, None]:
  logits, targets, lse = residuals
  probabilities = jnp.exp(logits.astype(jnp.float32) - lse[..., None])
  vocab = jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1)
  hit = (vocab == targets[..., None]).astype(jnp.float32)
  gradient = (probabilities - hit) * cotangent[..., None]
  return gradient.astype(logits.dtype), None


nll_of.defvjp(_nll_forward, _nll_backward)


def summed_over_chunks(
  head_fn: Callable[[jax.Array, Any], jax.Array],
  x_BLD: jax.Array,
  head: Any,
  targets_BL: jax.Array,
  weights_BL: jax.Array,
  chunk: int,
) -> jax.Array:
  """The weighted sum of negative log-likelihoods, the logits a chunk at a time.

  Args:
    head_fn: pure, `head_fn(x, head) -> logits`.
    x_BLD: what the output head reads.
    head: its parameters, an array or any leaf.
    targets_BL: int32.
    weights_BL: float32.
    chunk: wanted tokens a chunk; the length is cut into equal parts of at most that.

  Returns:
    Float32 scalar. Its gradient reaches x_BLD and the floating arrays of `head`.
  """
  token_sum = lambda logits, rows: jnp.sum(nll_of(logits, rows[0]) * rows[1])
  rows = (targets_BL, weights_BL)
  return sums_over_chunks(token_sum, head_fn, x_BLD, head, rows, chunk)


def sums_over_chunks(
  token_sum: Callable[[jax.Array, Any], Any],
  head_fn: Callable[[jax.Array, Any], jax.Array],
  x_BLD: jax.Array,
  head: Any,
  rows: Any,
  chunk: int,
) -> Any:
  """What `token_sum` gives for the logits of all tokens, a chunk at a time.

  Args:
    token_sum: `token_sum(logits, rows)`, a float32 scalar or a tuple of them, each a
      sum over tokens; the first is what may be differentiated, the others get no
      gradient.
    head_fn, x_BLD, head, chunk: see `summed_over_chunks`.
    rows: pytree of what else a token has, `[B, L, ...]`; gets no gradient.

  Returns:
    What `token_sum` returns, over all tokens.
  """
  batch, length, _ = x_BLD.shape
  parts = next(
    n
    for n in range(1, length + 1)
    if length % n == 0 and (batch * length // n <= chunk or n == length)
  )

  def split(a):
    # Along the length, so that the batch stays spread over devices as it is.
    return jnp.moveaxis(a.reshape(batch, parts, length // parts, *a.shape[2:]), 1, 0)

  leaves, treedef = jax.tree.flatten(head)
  is_float = lambda a: jnp.issubdtype(a.dtype, jnp.floating)
  fixed = [None if is_float(a) else a for a in leaves]

  def chunk_sum(x, floating, rows):
    given = iter(floating)
    arrays = [next(given) if a is None else a for a in fixed]
    logits = head_fn(x, jax.tree.unflatten(treedef, arrays))
    return token_sum(logits, rows)

  floating = [a for a in leaves if is_float(a)]
  return _chunked_sum(chunk_sum, split(x_BLD), floating, jax.tree.map(split, rows))


def _chunked_sum(chunk_sum, x, floating, rows):
  """`sum_i chunk_sum(x[i], floating, ...)`, differentiated while it is computed."""
  add = lambda a, b: a + b.astype(jnp.float32)

  def zeros_of(tree):
    return jax.tree.map(lambda a: jnp.zeros(a.shape, jnp.float32), tree)

  def first_and_all(x, floating, rows):
    sums = chunk_sum(x, floating, rows)
    return jax.tree.leaves(sums)[0], sums

  gradient_fn = jax.value_and_grad(first_and_all, argnums=(0, 1), has_aux=True)
  one = lambda x, rows: chunk_sum(x[0], floating, jax.tree.map(lambda a: a[0], rows))
  start = zeros_of(jax.eval_shape(one, x, rows))

  @jax.custom_vjp
  def total(x, floating, rows):
    def body(sums, xs):
      return jax.tree.map(add, sums, chunk_sum(xs[0], floating, xs[1])), None

    return jax.lax.scan(body, start, (x, rows))[0]

  def forward(x, floating, rows):
    def body(carry, xs):
      (_, sums), (dx, new) = gradient_fn(xs[0], floating, xs[1])
      return jax.tree.map(add, carry, (sums, new)), dx

    carry = (start, zeros_of(floating))
    (sums, gradients), dx = jax.lax.scan(body, carry, (x, rows))
    gradients = jax.tree.map(lambda g, a: g.astype(a.dtype), gradients, floating)
    return sums, (dx, gradients)

  def backward(gradients, cotangents):
    cotangent = jax.tree.leaves(cotangents)[0]
    scaled = jax.tree.map(lambda g: (g * cotangent).astype(g.dtype), gradients)
    return (*scaled, None)

  total.defvjp(forward, backward)
  return total(x, floating, rows)


TECHNIQUE = base.LossTechnique(cross_entropy, CrossEntropyOptions)
