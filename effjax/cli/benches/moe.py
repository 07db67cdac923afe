"""Mixtures of experts: does the cost know how many experts there are?

One layer alone: 8,192 tokens of width 256, experts of 512 hidden units, two a token,
random tokens and a random router, so loads are uneven as they are at the start of a
training. Each dispatch at growing numbers of experts: forward, and forward and backward
with the gradients of inputs and parameters. All rows take turns, and the best of their
runs counts. Dropless takes whatever comes, capacity drops what exceeds 1.25 even
shares, dense is the reference that computes every expert for every token.

`flops` is what a forward pass multiplies over what it must: three products of 2 D F a
token and expert. Of dropless the products are those in the compiled program, each as
often as the routing that was timed runs it.
"""

import collections
import dataclasses
import itertools
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from effjax.cli import timing
from effjax.measure import hlo_costs
from effjax.nn.mlps import moe
from effjax.ops import flops
from effjax.ops.moe import grouped

EXPERTS = (4, 16, 64)
TOP_K, CAPACITY_FACTOR = 2, 1.25
# The reference at many experts would take minutes and gigabytes.
_LIMIT_BYTES = 4 * 2**30


@dataclasses.dataclass
class _Lane:
  """One dispatch at one number of experts while it is being timed."""

  dispatch: str
  num_experts: int
  forward: Any
  gradient: Any
  args: tuple[Any, ...]
  temp_bytes: int
  flops: float | None
  load_max: float
  dropped: float
  forward_secs: list[float] = dataclasses.field(default_factory=list)
  gradient_secs: list[float] = dataclasses.field(default_factory=list)


def bench(quick: bool = False) -> timing.Table:
  """Times every dispatch at every number of experts.

  Args:
    quick: tiny sizes, to see that it works; the numbers mean nothing.
  """
  tokens, width, hidden, rounds = (64, 16, 32, 1) if quick else (8192, 256, 512, 9)
  lanes = [
    _lane(dispatch, num_experts, tokens, width, hidden)
    for num_experts, dispatch in itertools.product(EXPERTS, moe.DISPATCHES)
  ]
  timed = [lane for lane in lanes if lane.temp_bytes <= _LIMIT_BYTES]
  for lane in timed:
    jax.block_until_ready((lane.forward(*lane.args), lane.gradient(*lane.args)))
  for _ in range(rounds):
    for lane in timed:
      lane.forward_secs.append(_secs(lane.forward, lane.args))
      lane.gradient_secs.append(_secs(lane.gradient, lane.args))
  return timing.Table(
    title="one layer of experts, by dispatch and number of experts",
    rows=[_row(lane, timed) for lane in lanes],
    notes=[
      f"{tokens:,} tokens, width {width}, hidden {hidden}, top_k {TOP_K}, float32; "
      f"best of {rounds} runs, taking turns",
      f"over_first: time over that with {EXPERTS[0]} experts; flops: multiplied over "
      "needed, forward",
      f"capacity: {CAPACITY_FACTOR} even shares an expert; what exceeds it is dropped",
      f"device: {jax.devices()[0].device_kind}",
    ],
  )


def _secs(fn: Any, args: tuple[Any, ...]) -> float:
  start = time.perf_counter()
  jax.block_until_ready(fn(*args))
  return time.perf_counter() - start


def _row(lane: _Lane, lanes: list[_Lane]) -> dict[str, Any]:
  (first,) = [
    other
    for other in lanes
    if (other.dispatch, other.num_experts) == (lane.dispatch, EXPERTS[0])
  ]
  row: dict[str, Any] = {"dispatch": lane.dispatch, "experts": lane.num_experts}
  for name in ("forward", "gradient"):
    secs = min(getattr(lane, f"{name}_secs"), default=None)
    base = min(getattr(first, f"{name}_secs"))
    row[f"{name}_ms"] = None if secs is None else 1e3 * secs
    row[f"{name}_over_first"] = None if secs is None else secs / base
  return row | {
    "flops": lane.flops,
    "temp_mb": lane.temp_bytes / 1e6,
    "load_max": lane.load_max,
    "dropped": lane.dropped,
  }


def _lane(
  dispatch: str, num_experts: int, tokens: int, width: int, hidden: int
) -> _Lane:
  module = moe.MoE(
    moe.MoEOptions(
      num_experts=num_experts,
      top_k=TOP_K,
      hidden_dim=hidden,
      dispatch=dispatch,
      eval_capacity_factor=CAPACITY_FACTOR,
    ),
    width,
  )
  x_BLD = jax.random.normal(jax.random.key(0), (1, tokens, width))
  params = jax.jit(module.init)(jax.random.key(1), x_BLD[:, :4])["params"]
  apply = lambda params, x_BLD, **kwargs: module.apply(
    {"params": params}, x_BLD, **kwargs
  )

  def loss(params: Any, x_BLD: jax.Array, probe_BLD: jax.Array) -> jax.Array:
    return jnp.vdot(apply(params, x_BLD), probe_BLD)

  probe_BLD = jax.random.normal(jax.random.key(2), x_BLD.shape)
  args = (params, x_BLD, probe_BLD)
  gradient = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(*args).compile()
  written = jax.jit(lambda p, x: apply(p, x, mutable=["metrics"])[1])(params, x_BLD)
  return _Lane(
    dispatch,
    num_experts,
    jax.jit(loss).lower(*args).compile(),
    gradient,
    args,
    gradient.memory_analysis().temp_size_in_bytes,
    _flops(module, params, x_BLD),
    float(written["metrics"]["router_load_max"]),
    float(written["metrics"]["router_dropped"]),
  )


def _flops(module: moe.MoE, params: Any, x_BLD: jax.Array) -> float | None:
  """Multiplied over needed, forward; router and weighted sums left out of both.

  None where the products are a kernel's, which no program shows.
  """
  opts = module.options
  num_tokens, width = x_BLD.shape[1:]
  unit = 3 * 2 * width * opts.width(width)
  needed = unit * num_tokens * opts.k
  apply = lambda x_BLD: module.apply({"params": params}, x_BLD)
  router = 2 * num_tokens * width * opts.num_experts
  if opts.dispatch == "dropless":
    if grouped.choose(jax.default_backend()).name != "windows":
      return None
    logits_TE = x_BLD[0] @ params["router"]
    chosen = np.asarray(jax.lax.top_k(logits_TE, opts.k)[1])
    sizes = np.bincount(chosen.ravel(), minlength=opts.num_experts).tolist()
    text = jax.jit(apply).lower(x_BLD).compile().as_text()
    return (executed(text, sizes) - router) / needed
  gates = _gate_flops(opts, num_tokens, width)
  return (flops.dot_flops(apply, x_BLD) - router - gates) / needed


def executed(text: str, group_sizes: Sequence[int]) -> int:
  """FLOPs of the products of a compiled program of grouped products.

  Args:
    text: of the program.
    group_sizes: rows of each group, which say how often each window runs.
  """
  times = collections.Counter(grouped.window_rows(group_sizes))
  found = 0
  for shape, cost in hlo_costs.dots(text):
    # A window's product has its rows; any other product of the program runs once.
    is_window = len(shape) == 2 and shape[0] in grouped.WINDOW_SIZES
    found += cost * (times[shape[0]] if is_window else 1)
  return found


def _gate_flops(opts: moe.MoEOptions, num_tokens: int, width: int) -> int:
  """Of the weighted sums over experts or choices."""
  if opts.dispatch == "dense":
    return 2 * num_tokens * opts.num_experts * (width + opts.k)
  return 2 * num_tokens * opts.k * width


TECHNIQUE = bench
