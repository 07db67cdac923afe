"""Mixture of experts: many gated MLPs, of which each token uses a few.

Sources: the routers and dispatches of `effjax.ops.moe`, which see; shared experts and
experts cut finer than an MLP (`hidden_dim`) are DeepSeekMoE's, Dai et al. 2024,
arXiv:2401.06066, section 3. Experts are SwiGLUs without biases, as in Mixtral; the
shared ones are one SwiGLU of their summed width, which is the same function.
Deviations: router jitter multiplies the router's input alone (Fedus et al. 2021,
section 2.4, multiply what the experts see, too).

In training the module writes `losses` (balancing and z-loss, scaled) and `metrics`
(load, entropy, dropped share). Loss-free balancing needs no collection: the gradient of
the bias is set to each expert's excess load, and the optimizer moves biases of the kind
"balance" by the sign of it (see optim.config).

Letters: F hidden units of an expert, N rows of all experts.
"""

import functools
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from flax import linen as nn

from effjax.nn.mlps import _moe_options, swiglu
from effjax.ops.moe import dispatch, exchange, routing
from effjax.weights import verbs
from effjax.weights import weight as weight_lib

MoEOptions = _moe_options.MoEOptions
DISPATCHES = _moe_options.DISPATCHES

# All experts on rows `[N, D]` in groups of the given sizes, or `[E, C, D]` without.
ExpertFn = Callable[..., jax.Array]


class MoE(nn.Module):
  """Mixture of experts.

  Attributes:
    options: see MoEOptions.
    embed_dim: D, width of the model.
    reads: name of the norm whose output it is given.
    out_scale: factor on the initial standard deviation of the output projections.
  """

  options_cls = MoEOptions

  options: MoEOptions
  embed_dim: int
  reads: str = "mlp_norm"
  out_scale: float = 1.0

  @nn.compact
  def __call__(self, x_BLD: jax.Array, valid_BL: jax.Array | None = None) -> jax.Array:
    """`[B, L, D] -> [B, L, D]`; padding (not valid) is not routed to any expert.

    At padding the output is that of the shared experts, zero without any. Decoding
    equals the parallel form where nothing is dropped: with "capacity" and in expert
    choice, what a token gets depends on the tokens it is given with.
    """
    opts = self.options
    if valid_BL is None:
      valid_BL = jnp.ones(x_BLD.shape[:2], bool)
    width = opts.width(self.embed_dim)
    devices = exchange.layout(*x_BLD.shape[:2], opts.num_experts, width)
    x_TD, valid_T = exchange.flat(devices, x_BLD), exchange.flat(devices, valid_BL)
    experts, logits_TE = self._experts(), self._logits(x_TD)
    args = (x_TD, logits_TE, valid_T, experts)
    if opts.router == "expert_choice":
      y_TD = self._expert_choice(*args)
    else:
      y_TD = self._token_choice(*args, devices)
    y_BLD = exchange.unflat(devices, y_TD, len(x_BLD))
    if opts.num_shared:
      shared = swiglu.SwiGLUOptions(hidden_dim=opts.shared_width(self.embed_dim))
      y_BLD += swiglu.SwiGLU(
        shared, self.embed_dim, self.reads, self.out_scale, name="shared"
      )(x_BLD, valid_BL)
    return y_BLD

  def _experts(self) -> dict[str, weight_lib.Weight]:
    opts = self.options
    size = (opts.num_experts, self.embed_dim, opts.width(self.embed_dim))
    axes = ("experts", "embed", "mlp")
    init = nn.initializers.lecun_normal(batch_axis=(0,))
    down_init = nn.initializers.variance_scaling(
      self.out_scale**2, "fan_in", "normal", batch_axis=(0,)
    )
    return {
      "gate": weight_lib.weight(self, "gate", init, size, axes=axes, reads=self.reads),
      "up": weight_lib.weight(self, "up", init, size, axes=axes, reads=self.reads),
      "down": weight_lib.weight(
        self,
        "down",
        down_init,
        (size[0], size[2], size[1]),
        axes=("experts", "mlp", "embed"),
        reads="up",
      ),
    }

  def _logits(self, x_TD: jax.Array) -> jax.Array:
    """The router's, in float32: rounding would change close choices."""
    opts = self.options
    router = weight_lib.weight(
      self,
      "router",
      nn.initializers.lecun_normal(),
      (self.embed_dim, opts.num_experts),
      axes=("embed", "experts"),
      kind="router",
      reads=self.reads,
      parts=opts.num_groups,
    )
    x_TD = x_TD.astype(jnp.float32)
    if opts.jitter and self._training:
      low, high = 1 - opts.jitter, 1 + opts.jitter
      x_TD *= jax.random.uniform(
        self.make_rng("dropout"), x_TD.shape, minval=low, maxval=high
      )
    return verbs.contract(x_TD, router)

  def _token_choice(
    self,
    x_TD: jax.Array,
    logits_TE: jax.Array,
    valid_T: jax.Array,
    experts: Mapping[str, weight_lib.Weight],
    devices: exchange.Layout | None,
  ) -> jax.Array:
    """Every token goes to the experts it chose."""
    opts = self.options
    expert_fn = functools.partial(_swiglu, experts)
    routed = self._route(logits_TE, valid_T)
    counts_E = routing.counts(routed.experts_TK, opts.num_experts, valid_T)
    dropped = jnp.float32(0)
    if opts.dispatch == "dense":
      weights_TK = routed.weights_TK * valid_T[:, None]
      routed = routed._replace(weights_TK=weights_TK)
      # Every expert sees every token here; it is calibrated on those it was chosen for.
      experts_E11 = jnp.arange(opts.num_experts)[:, None, None]
      chosen_ET = jnp.any(routed.experts_TK[None] == experts_E11, axis=-1)
      chosen_ET = (chosen_ET & valid_T[None]).astype(jnp.float32)
      with weight_lib.token_weights(chosen_ET):
        y_TD = dispatch.all_experts(x_TD, routed, opts.num_experts, expert_fn)
    elif devices is not None and opts.dispatch == "dropless":
      plain = {n: verbs.dense(w).astype(x_TD.dtype) for n, w in experts.items()}
      y_TD = exchange.dropless(devices, x_TD, routed, valid_T, plain, _swiglu)
    elif devices is not None:
      y_TD, kept = exchange.with_capacity(
        devices, x_TD, routed, valid_T, opts.num_experts, self._capacity, expert_fn
      )
      dropped = 1 - kept / jnp.maximum(jnp.sum(counts_E), 1)
    elif opts.dispatch == "dropless":
      places = dispatch.sorted_places(routed.experts_TK, opts.num_experts, valid_T)
      y_TD = _through_rows(x_TD, routed, places, expert_fn)
    else:
      capacity = self._capacity(len(x_TD))
      places = dispatch.capacity_places(
        routed.experts_TK, opts.num_experts, capacity, valid_T
      )
      shape = (opts.num_experts, capacity)
      y_TD = _through_rows(x_TD, routed, places, expert_fn, shape)
      kept = jnp.sum(places.pair_of_row_N < routed.experts_TK.size)
      dropped = 1 - kept / jnp.maximum(jnp.sum(counts_E), 1)
    self._write(logits_TE, routed.probabilities_TE, counts_E, valid_T, dropped)
    return y_TD

  def _expert_choice(
    self,
    x_TD: jax.Array,
    logits_TE: jax.Array,
    valid_T: jax.Array,
    experts: Mapping[str, weight_lib.Weight],
  ) -> jax.Array:
    """Every expert takes its best tokens, of all devices."""
    expert_fn = functools.partial(_swiglu, experts)
    chosen = routing.expert_choice(logits_TE, self._capacity(len(x_TD)), valid_T)
    held_EC = (chosen.weights_EC > 0).astype(jnp.float32)
    with weight_lib.token_weights(held_EC):
      y_TD = dispatch.chosen_tokens(x_TD, chosen, expert_fn)
    used_T = jnp.zeros(len(x_TD)).at[chosen.tokens_EC].max(held_EC)
    dropped = 1 - jnp.sum(used_T) / jnp.maximum(jnp.sum(valid_T), 1)
    counts_E = jnp.sum(held_EC, axis=1)
    self._write(logits_TE, chosen.probabilities_TE, counts_E, valid_T, dropped)
    return y_TD

  def _route(self, logits_TE: jax.Array, valid_T: jax.Array) -> routing.Routing:
    opts = self.options
    if opts.router == "switch":
      return routing.switch(logits_TE)
    if opts.router == "top_k":
      return routing.top_k(logits_TE, opts.k, renormalize=opts.renormalize)
    bias = weight_lib.weight(
      self,
      "balance",
      nn.initializers.zeros,
      (opts.num_experts,),
      axes=("experts",),
      kind="balance",
    )
    bias_E = verbs.dense(bias)
    routed = routing.sigmoid(
      logits_TE,
      bias_E,
      opts.k,
      renormalize=opts.renormalize,
      scale=opts.routed_scale,
      num_groups=opts.num_groups,
      top_groups=opts.top_groups,
    )
    if self.is_mutable_collection("losses"):
      counts_E = routing.counts(routed.experts_TK, opts.num_experts, valid_T)
      self._add("losses", "balance", routing.balancing_gradient(bias_E, counts_E))
    return routed

  def _capacity(self, num_tokens: int) -> int:
    opts = self.options
    factor = opts.capacity_factor if self._training else opts.eval_capacity_factor
    return dispatch.rows_of_capacity(num_tokens, opts.k, opts.num_experts, factor)

  @property
  def _training(self) -> bool:
    """Whether there is a stream of noise, as in training."""
    return self.has_rng("dropout") and not self.is_initializing()

  def _write(
    self,
    logits_TE: jax.Array,
    probabilities_TE: jax.Array,
    counts_E: jax.Array,
    valid_T: jax.Array,
    dropped: jax.Array,
  ) -> None:
    """Losses and metrics, where somebody collects them."""
    opts = self.options
    if self.is_mutable_collection("losses"):
      if opts.balancing_loss and opts.router != "expert_choice":
        loss = routing.balancing_loss(probabilities_TE, counts_E, valid_T)
        self._add("losses", "balancing", opts.balancing_loss * loss)
      if opts.z_loss:
        loss = opts.z_loss * routing.z_loss(logits_TE, valid_T)
        self._add("losses", "z", loss)
    if self.is_mutable_collection("metrics"):
      found = routing.metrics(probabilities_TE, counts_E, valid_T)
      for name, value in (found | {"router_dropped": dropped}).items():
        self._add("metrics", name, value)

  def _add(self, collection: str, name: str, value: jax.Array) -> None:
    # Shared layers run several times a step; what they say adds up or is the last word.
    old = self.get_variable(collection, name)
    if collection == "losses" and old is not None:
      value = old + value
    self.put_variable(collection, name, value)


def _swiglu(
  experts: Mapping[str, weight_lib.Weight | jax.Array],
  x: jax.Array,
  sizes_E: jax.Array | None = None,
) -> jax.Array:
  """All experts on their rows; see ExpertFn."""
  h = nn.silu(verbs.grouped_contract(x, experts["gate"], sizes_E))
  h = h * verbs.grouped_contract(x, experts["up"], sizes_E)
  return verbs.grouped_contract(h, experts["down"], sizes_E)


def _through_rows(
  x_TD: jax.Array,
  routed: routing.Routing,
  places: dispatch.Places,
  expert_fn: ExpertFn,
  shape: tuple[int, int] | None = None,
) -> jax.Array:
  """Tokens through rows of experts: in groups, or in a batch of `shape` (E, C)."""
  rows_ND = dispatch.to_rows(x_TD, places)
  held_N = places.pair_of_row_N < routed.experts_TK.size
  with weight_lib.token_weights(held_N.astype(jnp.float32)):
    if shape is None:
      y_ND = expert_fn(rows_ND, places.group_sizes_E)
    else:
      y_ND = expert_fn(rows_ND.reshape(*shape, -1)).reshape(rows_ND.shape)
  return dispatch.from_rows(y_ND, routed.weights_TK, places)


TECHNIQUE = MoE
