"""`weight()`: how a module declares a weight and gets a handle on it."""

import contextlib
import contextvars
import dataclasses
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from effjax.core import errors, specs
from effjax.ops.matmul import histogram

COLLECTED = ("moments", "magnitudes", "histogram", "hessian")
_token_weights: contextvars.ContextVar[Any] = contextvars.ContextVar(
  "token_weights", default=None
)
_collecting: contextvars.ContextVar[Any] = contextvars.ContextVar(
  "collecting", default=(("moments",), None, None)
)

Init = Callable[[jax.Array, tuple[int, ...], Any], jax.Array]


@dataclasses.dataclass(frozen=True)
class Weight:
  """A weight in use: its leaf, what it is, and the hook that watches its inputs.

  Attributes:
    leaf: a plain array or a leaf dataclass.
    spec: what the weight is; stack and instances are known only to `specs()`.
    observe: called with the activations that are contracted, and of experts with the
      sizes of their groups (or None); None where nothing watches.
  """

  leaf: Any
  spec: specs.ParamSpec
  observe: Callable[..., None] | None = None


def weight(
  module: nn.Module,
  name: str,
  init: Init,
  shape: Sequence[int],
  *,
  axes: Sequence[str],
  kind: str = "matrix",
  reads: str | None = None,
  head_dim: int | None = None,
  parts: int = 1,
  within: str | None = None,
) -> Weight:
  """Declares a float32 weight of a Linen module and returns a handle on it.

  The variable is read directly, not through `module.param`, which would compare a leaf
  dataclass with the initializer's shapes.

  Args:
    module: the module whose parameter it is, inside `setup` or a compact method.
    name: parameter name.
    init: initializer `(key, shape, dtype) -> array`.
    shape: logical shape, without stacked axes.
    axes: logical axis of each dimension.
    kind: see specs.KINDS.
    reads: name of the norm or weight whose output this one contracts; looked up beside
      the weight, then further out.
    head_dim: size of one head where heads are merged into an axis.
    parts, within: how heads hang together; see specs.ParamSpec.

  Raises:
    InputError: the leaf in the given tree has another shape; the path is named.
  """
  shape = tuple(shape)
  spec = specs.ParamSpec(
    axes=tuple(axes),
    kind=kind,
    reads=reads,
    head_dim=head_dim,
    parts=parts,
    within=within,
  )
  specs.record((*module.path, name), spec)
  if not module.has_variable("params", name):
    return Weight(module.param(name, init, shape, jnp.float32), spec)
  leaf = module.get_variable("params", name)
  if tuple(leaf.shape) != shape:
    path = "/".join((*module.path, name))
    raise errors.InputError(
      f"{path} has shape {tuple(leaf.shape)}, the model needs {shape}"
    )
  observe = None
  if module.is_mutable_collection("stats") and not module.is_initializing():
    num_experts = shape[0] if len(shape) == 3 and axes[0] == "experts" else None
    observe = lambda x, group_sizes=None: _observe(
      module, name, x, num_experts, group_sizes
    )
  return Weight(leaf, spec, observe)


@contextlib.contextmanager
def token_weights(weights_BL: jax.Array | None) -> Iterator[None]:
  """While open, calibration statistics weigh each token by `weights_BL`."""
  token = _token_weights.set(weights_BL)
  try:
    yield
  finally:
    _token_weights.reset(token)


@contextlib.contextmanager
def collecting(
  collect: Sequence[str],
  paths: Collection[str] | None = None,
  uses: list[tuple[str, Any]] | None = None,
) -> Iterator[None]:
  """While open, says what a calibration gathers, and of which weights.

  Args:
    collect: of COLLECTED; the moments are always there.
    paths: of the weights; None for all.
    uses: gets the path and the input of every use of these weights, in their order.
  """
  token = _collecting.set((tuple(collect), paths, uses))
  try:
    yield
  finally:
    _collecting.reset(token)


def _observe(
  module: nn.Module,
  name: str,
  x: jax.Array,
  num_experts: int | None,
  group_sizes: jax.Array | None,
) -> None:
  """Adds a batch to the calibration statistics of the weight's inputs.

  Kept in float32, of experts for each: `square_sum` and `absmax` per input channel,
  `count` of rows, and where they are collected `abs_sum` per input channel,
  `histogram` of all |x| (ops.matmul.histogram) and `hessian`, the sum of `x x^T`.
  """
  collect, paths, uses = _collecting.get()
  path = "/".join((*module.path, name))
  if paths is not None and path not in paths:
    return
  if uses is not None:
    uses.append((path, x))
  weights_BL = _token_weights.get()
  weights = jnp.ones(x.shape[:-1]) if weights_BL is None else weights_BL
  if num_experts is None:
    new = _sums(x.reshape(-1, x.shape[-1]), weights.reshape(-1), collect)
  elif group_sizes is None:
    weights_EC = weights.reshape(x.shape[:2])
    new = jax.lax.map(lambda one: _sums(*one, collect), (x, weights_EC))
  else:
    # One expert after the other, over all rows with only its own counting: slower than
    # slices, whose sizes are not known when compiling, but holds one at a time.
    ends_E = jnp.cumsum(group_sizes)
    expert_T = jnp.searchsorted(ends_E, jnp.arange(len(x)), side="right")
    own_ET = expert_T[None] == jnp.arange(num_experts)[:, None]
    weights_ET = jnp.where(own_ET, weights.reshape(1, -1), 0.0)
    new = jax.lax.map(lambda weights_T: _sums(x, weights_T, collect), weights_ET)
  old = module.get_variable("stats", name)
  if old is not None:
    join = {"absmax": jnp.maximum}
    new = {key: join.get(key, jnp.add)(old[key], new[key]) for key in new}
  module.put_variable("stats", name, new)


def _sums(
  x_TD: jax.Array, weights_T: jax.Array, collect: Sequence[str]
) -> dict[str, jax.Array]:
  """Statistics of rows; what has no weight does not count, whatever it holds."""
  rows_TD = jnp.where(weights_T[:, None] > 0, x_TD, 0).astype(jnp.float32)
  weighted_TD = rows_TD * weights_T[:, None]
  sums = {
    "square_sum": jnp.sum(weighted_TD * rows_TD, axis=0),
    "absmax": jnp.max(jnp.abs(rows_TD), axis=0, initial=0.0),
    "count": jnp.sum(weights_T),
  }
  if "magnitudes" in collect:
    sums["abs_sum"] = jnp.sum(jnp.abs(weighted_TD), axis=0)
  if "histogram" in collect:
    sums["histogram"] = histogram.counts(rows_TD, weights_T)
  if "hessian" in collect:
    sums["hessian"] = jnp.matmul(
      weighted_TD.T, rows_TD, precision=jax.lax.Precision.HIGHEST
    )
  return sums
