"""Tokens and experts on many devices: each routes its own tokens, and sends them.

Under active sharding rules every device lays out the rows of its own tokens (sorting
those of all devices would move them all). Where experts are split ("ep"), rows go to
the devices of their experts and back by `all_to_all`: GShard, Lepikhin et al. 2020,
arXiv:2006.16668, section 3.3. With a capacity, every device has room for its share of
rows, and drops what does not fit there: what is dropped depends on the number of
devices. Dropless, it sends as many rows as could go to one device at most,
`T * min(K, experts there)`, of which most are empty: nothing is dropped and shapes are
static, but memory and traffic are those of the worst case.

Tokens are in the order of the devices that hold them (see `flat`), which is another one
than that of the sequences where those are split.

Letters: T tokens of a device, K experts a token, J experts of a device, N rows sent to
one device, Z devices that experts are split over.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from effjax.core import shard
from effjax.ops.moe import dispatch, routing


class Layout(NamedTuple):
  """Where tokens and experts lie.

  Attributes:
    mesh: the devices.
    batch, length: mesh axes that rows and positions are split over.
    experts: mesh axes that experts are split over; of these all are among `tokens`.
    hidden: mesh axes that the hidden units of each expert are split over.
  """

  mesh: Mesh
  batch: tuple[str, ...]
  length: tuple[str, ...]
  experts: tuple[str, ...]
  hidden: tuple[str, ...]

  @property
  def tokens(self) -> tuple[str, ...]:
    """Mesh axes that tokens are split over."""
    return self.batch + self.length

  @property
  def ways(self) -> int:
    """Z, devices that experts are split over."""
    return math.prod(self.mesh.shape[axis] for axis in self.experts)

  @property
  def replicas(self) -> tuple[str, ...]:
    """Mesh axes that tokens are split over and experts are not."""
    return tuple(axis for axis in self.tokens if axis not in self.experts)

  def map(self, fn: Callable[..., Any], in_specs: Any, out_specs: Any) -> Any:
    """`fn` on every device; no rules are active inside."""

    def inside(*args: Any) -> Any:
      with shard.use_rules(None):
        return fn(*args)

    return jax.shard_map(
      inside,
      mesh=self.mesh,
      in_specs=in_specs,
      out_specs=out_specs,
      check_vma=False,
    )


def layout(rows: int, length: int, num_experts: int, width: int) -> Layout | None:
  """Where the active rules put tokens and experts; None if nothing is split.

  Args:
    rows, length: of the batch.
    num_experts: E.
    width: hidden units of an expert.
  """
  active = shard.current()
  if active is None or active[0].size == 1:
    return None
  mesh, rules = active

  def cut(axes: tuple[str, ...], sizes: tuple[int, ...]) -> list[tuple[str, ...]]:
    spec = shard.partition_spec(axes, sizes, mesh, rules)
    named = lambda e: () if e is None else (e,) if isinstance(e, str) else tuple(e)
    return [named(entry) for entry in spec] + [()] * (len(axes) - len(spec))

  batch, positions = cut(("batch", "length"), (rows, length))
  experts, hidden = cut(("experts", "mlp"), (num_experts, width))
  # Devices that all hold the same tokens have nothing to exchange.
  experts = tuple(axis for axis in experts if axis in (*batch, *positions))
  hidden = tuple(axis for axis in hidden if axis not in (*batch, *positions))
  return Layout(mesh, batch, positions, experts, hidden)


def flat(devices: Layout | None, x_BL: jax.Array) -> jax.Array:
  """`[B, L, ...]` as tokens `[B * L, ...]`, none of which leaves its device."""
  merged = lambda x: x.reshape(-1, *x.shape[2:])
  if devices is None or not devices.length:
    return merged(x_BL)
  rest = (None,) * (x_BL.ndim - 2)
  specs = P(devices.batch, devices.length, *rest), P(devices.tokens, *rest)
  return devices.map(merged, *specs)(x_BL)


def unflat(devices: Layout | None, y_TD: jax.Array, rows: int) -> jax.Array:
  """The inverse of `flat`: `[B * L, ...]` as `[B, L, ...]` of `rows` rows."""
  if devices is None or not devices.length:
    return y_TD.reshape(rows, -1, *y_TD.shape[1:])
  rows //= math.prod(devices.mesh.shape[axis] for axis in devices.batch)
  split = lambda y: y.reshape(rows, -1, *y.shape[1:])
  rest = (None,) * (y_TD.ndim - 1)
  specs = P(devices.tokens, *rest), P(devices.batch, devices.length, *rest)
  return devices.map(split, *specs)(y_TD)


def with_capacity(
  devices: Layout,
  x_TD: jax.Array,
  routed: routing.Routing,
  valid_T: jax.Array,
  num_experts: int,
  capacity_of: Callable[[int], int],
  expert_fn: Callable[[jax.Array], jax.Array],
) -> tuple[jax.Array, jax.Array]:
  """At most so many rows of each device for an expert; see `dispatch.capacity_places`.

  Args:
    devices: where things lie.
    x_TD: tokens, in the order of `flat`.
    routed: what the router decided.
    valid_T: whether each token is real.
    num_experts: E.
    capacity_of: rows of an expert for a number of tokens.
    expert_fn: all experts on rows `[E, C, D]`, for the whole mesh; weights of any kind.

  Returns:
    y_TD, and how many pairs were kept, float32.
  """
  tokens, experts = P(devices.tokens), devices.experts
  rows_spec = P(experts or None, devices.replicas or None, None)

  def send(x_TD, experts_TK, valid_T):
    capacity = capacity_of(len(x_TD))
    places = dispatch.capacity_places(experts_TK, num_experts, capacity, valid_T)
    rows_ECD = dispatch.to_rows(x_TD, places).reshape(num_experts, capacity, -1)
    if experts:
      rows_ECD = lax.all_to_all(rows_ECD, experts, 0, 1, tiled=True)
    return rows_ECD, places.pair_of_row_N, places.row_of_pair_TK

  def bring_back(y_ECD, weights_TK, pair_of_row_N, row_of_pair_TK):
    if experts:
      y_ECD = lax.all_to_all(y_ECD, experts, 1, 0, tiled=True)
    sizes_E = jnp.zeros(num_experts, jnp.int32)  # Nobody asks.
    places = dispatch.Places(pair_of_row_N, row_of_pair_TK, sizes_E)
    return dispatch.from_rows(y_ECD.reshape(-1, y_ECD.shape[-1]), weights_TK, places)

  rows_ECD, pair_of_row, row_of_pair = devices.map(
    send, (tokens, tokens, tokens), (rows_spec, tokens, tokens)
  )(x_TD, routed.experts_TK, valid_T)
  y_ECD = expert_fn(rows_ECD)
  y_TD = devices.map(bring_back, (rows_spec, tokens, tokens, tokens), tokens)(
    y_ECD, routed.weights_TK, pair_of_row, row_of_pair
  )
  kept = jnp.sum(row_of_pair < len(pair_of_row) // _size(devices), dtype=jnp.float32)
  return y_TD, kept


def dropless(
  devices: Layout,
  x_TD: jax.Array,
  routed: routing.Routing,
  valid_T: jax.Array,
  weights: Mapping[str, jax.Array],
  expert_fn: Callable[[Mapping[str, jax.Array], jax.Array, jax.Array], jax.Array],
) -> jax.Array:
  """Every pair's row, on the device of its expert.

  Args:
    devices: where things lie.
    x_TD: tokens, in the order of `flat`.
    routed: what the router decided.
    valid_T: whether each token is real.
    weights: plain arrays: "gate" and "up" `[E, D, F]`, "down" `[E, F, D]`.
    expert_fn: `expert_fn(weights, rows, sizes)`: experts on their rows, in groups.

  Returns:
    y_TD.
  """
  tokens = P(devices.tokens)
  experts, hidden = devices.experts or None, devices.hidden or None
  by_weight = {
    "gate": P(experts, None, hidden),
    "up": P(experts, None, hidden),
    "down": P(experts, hidden, None),
  }

  def run(x_TD, experts_TK, weights_TK, valid_T, weights):
    num_here = weights["gate"].shape[0]
    num_experts = num_here * devices.ways
    places = dispatch.sorted_places(experts_TK, num_experts, valid_T)
    rows_ND = dispatch.to_rows(x_TD, places)
    sizes_E = places.group_sizes_E
    if devices.experts:
      most = len(x_TD) * min(experts_TK.shape[1], num_here)
      y_ND = _elsewhere(devices, rows_ND, sizes_E, most, weights, expert_fn)
    else:
      y_ND = expert_fn(weights, rows_ND, sizes_E)
    y_TD = dispatch.from_rows(y_ND, weights_TK, places)
    # Hidden units that are split give parts of a sum.
    return lax.psum(y_TD, devices.hidden) if devices.hidden else y_TD

  in_specs = (tokens, tokens, tokens, tokens, by_weight)
  return devices.map(run, in_specs, tokens)(
    x_TD, routed.experts_TK, routed.weights_TK, valid_T, dict(weights)
  )


def _elsewhere(
  devices: Layout,
  rows_PD: jax.Array,
  sizes_E: jax.Array,
  most: int,
  weights: Mapping[str, jax.Array],
  expert_fn: Callable[..., jax.Array],
) -> jax.Array:
  """Rows sorted by expert, through experts that are split over devices."""
  ways, num_rows = devices.ways, len(rows_PD)
  sizes_ZJ = sizes_E.reshape(ways, -1)
  counts_Z = jnp.sum(sizes_ZJ, axis=1)
  starts_Z = jnp.cumsum(counts_Z) - counts_Z
  slots_N = jnp.arange(most, dtype=jnp.int32)
  sent_ZN = slots_N[None, :] < counts_Z[:, None]
  row_ZN = jnp.where(sent_ZN, starts_Z[:, None] + slots_N[None, :], num_rows)
  # The slot of each row: its place after the rows for earlier devices.
  index_P = jnp.arange(num_rows, dtype=jnp.int32)
  to_P = jnp.searchsorted(jnp.cumsum(counts_Z), index_P, side="right")
  to_P = jnp.minimum(to_P, ways - 1)
  slot_P = to_P * most + index_P - starts_Z[to_P]
  slot_P = jnp.where(index_P < jnp.sum(counts_Z), slot_P, ways * most)
  out = dispatch.Places(row_ZN.reshape(-1), slot_P[:, None], sizes_E)

  exchange = lambda x: lax.all_to_all(x, devices.experts, 0, 0, tiled=True)
  got_ZND = exchange(dispatch.to_rows(rows_PD, out))
  got_ZJ = exchange(sizes_ZJ)
  # From each device rows come sorted by expert; here they are sorted all together.
  ends_ZJ = jnp.cumsum(got_ZJ, axis=1)
  expert_ZN = jax.vmap(lambda ends_J: jnp.searchsorted(ends_J, slots_N, side="right"))(
    ends_ZJ
  ).astype(jnp.int32)
  num_here = sizes_ZJ.shape[1]
  here_M1 = expert_ZN.reshape(-1, 1)
  here = dispatch.sorted_places(here_M1, num_here, here_M1[:, 0] < num_here)
  ones_M1 = jnp.ones(here_M1.shape, jnp.float32)
  y_MD = expert_fn(weights, dispatch.to_rows(got_ZND, here), here.group_sizes_E)
  y_ZND = exchange(dispatch.from_rows(y_MD, ones_M1, here))
  ones_P1 = jnp.ones((num_rows, 1), jnp.float32)
  return dispatch.from_rows(y_ZND, ones_P1, out)


def _size(devices: Layout) -> int:
  """Devices that tokens are split over."""
  return math.prod(devices.mesh.shape[axis] for axis in devices.tokens)
