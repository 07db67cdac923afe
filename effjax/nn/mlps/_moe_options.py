"""Options of a mixture of experts."""

import dataclasses

from effjax.core import config, errors
from effjax.nn.mlps import swiglu

ROUTERS = ("top_k", "switch", "sigmoid", "expert_choice")
DISPATCHES = ("dropless", "capacity", "dense")


@dataclasses.dataclass(frozen=True, kw_only=True)
class MoEOptions:
  """Options of a mixture of experts.

  Attributes:
    num_experts: E, routed experts.
    top_k: experts a token uses; ignored by "switch" (1).
    hidden_dim: F, hidden units of one expert; None for a SwiGLU's default.
    num_shared: experts every token uses, beside the routed ones.
    shared_dim: hidden units of those together; None for `num_shared` times those of a
      routed one.
    router: "top_k" (softmax), "switch" (its best one, not renormalized), "sigmoid"
      (with a bias that balances the load), or "expert_choice" (experts take tokens).
    renormalize: whether the weights of a token sum to 1; ignored by "switch" and
      "expert_choice".
    routed_scale: factor of the weights of "sigmoid" (2.5 in DeepSeek-V3).
    num_groups: groups of experts for "sigmoid"; a token uses experts of `top_groups`.
    top_groups: groups a token uses experts of.
    dispatch: "dropless", "capacity" (what does not fit is dropped) or "dense" (all
      experts for all tokens: the reference, for tests).
    capacity_factor: rows of an expert over an even share, in training; also the tokens
      that each expert takes in expert choice.
    eval_capacity_factor: the same, elsewhere.
    balancing_loss: weight of the balancing loss (0.01 in Switch).
    z_loss: weight of the router's z-loss (0.001 in ST-MoE).
    jitter: the router's input is multiplied by noise in 1 - jitter to 1 + jitter while
      training.
    leak_future: allows expert choice in a causal model, where which tokens an expert
      takes depends on those that follow.
  """

  num_experts: int = 8
  top_k: int = 2
  hidden_dim: int | None = None
  num_shared: int = 0
  shared_dim: int | None = None
  router: str = "top_k"
  renormalize: bool = True
  routed_scale: float = 1.0
  num_groups: int = 1
  top_groups: int = 1
  dispatch: str = "dropless"
  capacity_factor: float = 1.25
  eval_capacity_factor: float = 2.0
  balancing_loss: float = 0.01
  z_loss: float = 0.0
  jitter: float = 0.0
  leak_future: bool = False

  def __post_init__(self):
    sizes = ("hidden_dim", "shared_dim", "num_groups", "top_groups")
    for name in ("num_experts", "top_k", *sizes):
      value = getattr(self, name)
      config.require(
        value is None or value > 0, f"moe {name} must be positive, got {value}"
      )
    for name in ("num_shared", "balancing_loss", "z_loss"):
      value = getattr(self, name)
      config.require(value >= 0, f"moe {name} must not be negative, got {value}")
    for name in ("capacity_factor", "eval_capacity_factor", "routed_scale"):
      value = getattr(self, name)
      config.require(value > 0, f"moe {name} must be positive, got {value}")
    config.require(
      0 <= self.jitter < 1, f"moe jitter must be from 0 to below 1, got {self.jitter}"
    )
    for name, allowed in (("router", ROUTERS), ("dispatch", DISPATCHES)):
      if getattr(self, name) not in allowed:
        raise errors.unknown(f"moe {name}", getattr(self, name), allowed)
    config.require(
      self.k <= self.num_experts,
      f"moe top_k={self.top_k} must not exceed num_experts={self.num_experts}",
    )
    config.require(
      self.shared_dim is None or self.num_shared > 0,
      f"moe shared_dim={self.shared_dim} needs num_shared above 0",
    )
    self._check_groups()

  def _check_groups(self) -> None:
    if self.num_groups == 1:
      return
    config.require(
      self.router == "sigmoid", "moe num_groups above 1 needs router='sigmoid'"
    )
    size, rest = divmod(self.num_experts, self.num_groups)
    config.require(
      not rest and size >= 2,
      f"moe num_groups={self.num_groups} must divide num_experts={self.num_experts} "
      "into groups of at least 2",
    )
    config.require(
      self.top_groups <= self.num_groups and self.k <= self.top_groups * size,
      f"moe top_groups={self.top_groups} must not exceed num_groups="
      f"{self.num_groups} and must hold top_k={self.top_k} experts",
    )

  @property
  def k(self) -> int:
    """Experts a token uses."""
    return 1 if self.router == "switch" else self.top_k

  @property
  def sees_future(self) -> bool:
    """Whether it must be refused in a causal model."""
    return self.router == "expert_choice" and not self.leak_future

  def width(self, embed_dim: int) -> int:
    """Hidden units of an expert in a model of width `embed_dim`."""
    return swiglu.SwiGLUOptions(hidden_dim=self.hidden_dim).width(embed_dim)

  def shared_width(self, embed_dim: int) -> int:
    """Hidden units of the shared experts in a model of width `embed_dim`."""
    return self.shared_dim or self.num_shared * self.width(embed_dim)

  def narrowed(self, axis: str, count: int, embed_dim: int) -> "MoEOptions":
    """The options with `count` experts, or hidden units of each or of the shared ones.

    Raises:
      InputError: a token would use more experts than are left.
    """
    if axis == "experts":
      return dataclasses.replace(self, num_experts=count)
    hidden, shared = self.width(embed_dim), self.shared_width(embed_dim)
    if axis == "shared/mlp":
      shared = count
    else:
      hidden = count
    usual = shared == self.num_shared * hidden
    return dataclasses.replace(
      self, hidden_dim=hidden, shared_dim=None if usual else shared
    )
