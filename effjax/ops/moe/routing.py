"""Routers: which experts a token goes to, and with which weight.

Pure functions of the logits `[T, E]`, computed in float32. The choice has no gradient,
the weights have one. What to do with the choice (drop, sort, compute all) is
`dispatch`'s business.

Letters: K experts a token, C tokens an expert takes in expert choice.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

# As in DeepSeek-V3's code.
_EPS = 1e-20


class Routing(NamedTuple):
  """What a router decided.

  Attributes:
    experts_TK: int32, the experts of each token, best first.
    weights_TK: float32, factor of each expert's output.
    probabilities_TE: float32, rows sum to 1; for balancing losses and metrics.
  """

  experts_TK: jax.Array
  weights_TK: jax.Array
  probabilities_TE: jax.Array


def switch(logits_TE: jax.Array) -> Routing:
  """The one most probable expert, weighted by its probability.

  Source: Fedus et al. 2021, arXiv:2101.03961, eq. 1 and 2 with k = 1.
  """
  return top_k(logits_TE, 1, renormalize=False)


def top_k(logits_TE: jax.Array, k: int, *, renormalize: bool = True) -> Routing:
  """The k most probable experts.

  Source: Shazeer et al. 2017, arXiv:1701.06538, section 2.1 without noise; renormalized
  this is Mixtral's softmax over the chosen logits (Jiang et al. 2024, arXiv:2401.04088,
  section 2.1).

  Args:
    logits_TE: of the router.
    k: experts a token.
    renormalize: whether the weights of a token sum to 1.
  """
  probabilities_TE = jax.nn.softmax(logits_TE.astype(jnp.float32), axis=-1)
  weights_TK, experts_TK = lax.top_k(probabilities_TE, k)
  if renormalize:
    weights_TK /= jnp.sum(weights_TK, axis=-1, keepdims=True)
  return Routing(experts_TK, weights_TK, probabilities_TE)


def sigmoid(
  logits_TE: jax.Array,
  bias_E: jax.Array,
  k: int,
  *,
  renormalize: bool = True,
  scale: float = 1.0,
  num_groups: int = 1,
  top_groups: int = 1,
) -> Routing:
  """Scores of their own, balanced by a bias that only the choice sees.

  Source: DeepSeek-V3, arXiv:2412.19437, eq. 13 to 16 and section 2.1.2; the bias is
  Wang et al. 2024, arXiv:2408.15664. Groups limit a token to experts of the
  `top_groups` groups whose two best biased scores sum to most.

  Args:
    logits_TE: of the router.
    bias_E: added to the scores for the choice; no gradient.
    k: experts a token.
    renormalize: whether the weights of a token sum to `scale`.
    scale: factor of all weights (2.5 in DeepSeek-V3).
    num_groups: equal groups of neighbouring experts (8 there); 1 for none.
    top_groups: groups a token may choose from (4 there).
  """
  scores_TE = jax.nn.sigmoid(logits_TE.astype(jnp.float32))
  biased_TE = lax.stop_gradient(scores_TE + bias_E[None, :])
  if num_groups > 1:
    biased_TE = _best_groups(biased_TE, num_groups, top_groups)
  _, experts_TK = lax.top_k(biased_TE, k)
  weights_TK = jnp.take_along_axis(scores_TE, experts_TK, axis=1)
  if renormalize:
    weights_TK /= jnp.sum(weights_TK, axis=-1, keepdims=True) + _EPS
  total_T1 = jnp.sum(scores_TE, axis=-1, keepdims=True) + _EPS
  return Routing(experts_TK, scale * weights_TK, scores_TE / total_T1)


def _best_groups(scores_TE: jax.Array, num_groups: int, top_groups: int) -> jax.Array:
  """The scores with those outside the best groups at minus infinity."""
  scores_TGX = scores_TE.reshape(len(scores_TE), num_groups, -1)
  best_TG2, _ = lax.top_k(scores_TGX, 2)
  _, kept_TJ = lax.top_k(jnp.sum(best_TG2, axis=-1), top_groups)
  keep_TG = jnp.any(kept_TJ[:, :, None] == jnp.arange(num_groups)[None, None], axis=1)
  return jnp.where(keep_TG[:, :, None], scores_TGX, -jnp.inf).reshape(scores_TE.shape)


class ExpertChoice(NamedTuple):
  """What the experts chose.

  Attributes:
    tokens_EC: int32, the tokens of each expert, best first.
    weights_EC: float32, factor of each output; 0 for tokens that are padding.
    probabilities_TE: float32, rows sum to 1.
  """

  tokens_EC: jax.Array
  weights_EC: jax.Array
  probabilities_TE: jax.Array


def expert_choice(
  logits_TE: jax.Array, capacity: int, valid_T: jax.Array | None = None
) -> ExpertChoice:
  """Every expert takes its `capacity` best tokens of all that are given.

  A token may get no expert, or many, and which it gets depends on the tokens that come
  after it: in a causal model this leaks the future.
  Source: Zhou et al. 2022, arXiv:2202.09368, section 3.2.

  Args:
    logits_TE: of the router.
    capacity: tokens of an expert.
    valid_T: whether each token is real; padding is taken last, with weight 0.
  """
  probabilities_TE = jax.nn.softmax(logits_TE.astype(jnp.float32), axis=-1)
  scores_TE = probabilities_TE
  if valid_T is not None:
    scores_TE = jnp.where(valid_T[:, None], scores_TE, 0.0)
  weights_EC, tokens_EC = lax.top_k(scores_TE.T, capacity)
  return ExpertChoice(tokens_EC, weights_EC, probabilities_TE)


def counts(experts_TK: jax.Array, num_experts: int, valid_T: jax.Array) -> jax.Array:
  """How many valid tokens chose each expert, `[E]` float32, without gradient."""
  valid_TK = jnp.broadcast_to(valid_T[:, None], experts_TK.shape)
  ones_P = valid_TK.reshape(-1).astype(jnp.float32)
  return jnp.zeros(num_experts).at[experts_TK.reshape(-1)].add(ones_P)


def balancing_loss(
  probabilities_TE: jax.Array, counts_E: jax.Array, valid_T: jax.Array
) -> jax.Array:
  """`E sum_e f_e P_e`: 1 for one expert a token and uniform routing, k for k experts.

  f_e is the share of valid tokens that chose expert e (no gradient), P_e its mean
  probability over them. Source: Fedus et al. 2021, eq. 4 to 6 without alpha.
  """
  num_valid = jnp.maximum(jnp.sum(valid_T), 1)
  shares_E = lax.stop_gradient(counts_E) / num_valid
  means_E = jnp.einsum("t,te->e", valid_T.astype(jnp.float32), probabilities_TE)
  return len(counts_E) * jnp.dot(shares_E, means_E / num_valid)


def z_loss(logits_TE: jax.Array, valid_T: jax.Array) -> jax.Array:
  """Mean of `logsumexp(logits)^2` over valid tokens; keeps logits small.

  Source: Zoph et al. 2022, arXiv:2202.08906, eq. 5.
  """
  squares_T = jax.nn.logsumexp(logits_TE.astype(jnp.float32), axis=-1) ** 2
  valid_T = valid_T.astype(jnp.float32)
  return jnp.dot(squares_T, valid_T) / jnp.maximum(jnp.sum(valid_T), 1)


def balancing_gradient(bias_E: jax.Array, counts_E: jax.Array) -> jax.Array:
  """0, whose gradient to the bias is each expert's load less the mean, over the sum.

  Loads add up over parts of a batch and over devices, as gradients do. An optimizer
  that steps by minus the sign of it raises the bias of experts below the mean load and
  lowers the others: Wang et al. 2024, arXiv:2408.15664, algorithm 1 (their rate is
  0.001). Tiny numbers, so that they do not show in the norm of all gradients.
  """
  excess_E = (counts_E - jnp.mean(counts_E)) / jnp.maximum(jnp.sum(counts_E), 1)
  pull = jnp.dot(bias_E, lax.stop_gradient(1e-6 * excess_E))
  return pull - lax.stop_gradient(pull)


def metrics(
  probabilities_TE: jax.Array, counts_E: jax.Array, valid_T: jax.Array
) -> dict[str, jax.Array]:
  """What a log shows of a router, float32 scalars.

  `router_load_max`: load of the busiest expert over the mean (1 is even).
  `router_load_min`: of the idlest.
  `router_entropy`: mean entropy of a token's probabilities (nats).
  """
  mean = jnp.maximum(jnp.mean(counts_E), 1e-9)
  logs_TE = jnp.log(jnp.maximum(probabilities_TE, 1e-30))
  entropy_T = -jnp.sum(probabilities_TE * logs_TE, axis=-1)
  valid_T = valid_T.astype(jnp.float32)
  entropy = jnp.dot(entropy_T, valid_T) / jnp.maximum(jnp.sum(valid_T), 1)
  return {
    "router_load_max": jnp.max(counts_E) / mean,
    "router_load_min": jnp.min(counts_E) / mean,
    "router_entropy": entropy,
  }
