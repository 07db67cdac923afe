"""`weight()`: how a module declares a weight and gets a handle on it."""

import contextlib
import contextvars
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from effjax.core import errors, specs

_token_weights: contextvars.ContextVar[Any] = contextvars.ContextVar(
  "token_weights", default=None
)

Init = Callable[[jax.Array, tuple[int, ...], Any], jax.Array]


@dataclasses.dataclass(frozen=True)
class Weight:
  """A weight in use: its leaf, what it is, and the hook that watches its inputs.

  Attributes:
    leaf: a plain array or a leaf dataclass.
    spec: what the weight is; stack and instances are known only to `specs()`.
    observe: called with the activations that are contracted, or None.
  """

  leaf: Any
  spec: specs.ParamSpec
  observe: Callable[[jax.Array], None] | None = None


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

  Raises:
    InputError: the leaf in the given tree has another shape; the path is named.
  """
  shape = tuple(shape)
  spec = specs.ParamSpec(axes=tuple(axes), kind=kind, reads=reads, head_dim=head_dim)
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
    observe = lambda x: _observe(module, name, x)
  return Weight(leaf, spec, observe)


@contextlib.contextmanager
def token_weights(weights_BL: jax.Array | None) -> Iterator[None]:
  """While open, calibration statistics weigh each token by `weights_BL`."""
  token = _token_weights.set(weights_BL)
  try:
    yield
  finally:
    _token_weights.reset(token)


def _observe(module: nn.Module, name: str, x: jax.Array) -> None:
  """Adds a batch to the calibration statistics of the weight's inputs.

  Kept per input channel, in float32: `square_sum`, `absmax`; and `count` of rows.
  """
  rows = x.reshape(-1, x.shape[-1]).astype(jnp.float32)
  weights_BL = _token_weights.get()
  weights = jnp.ones(len(rows)) if weights_BL is None else weights_BL.reshape(-1)
  new = {
    "square_sum": jnp.einsum("t,td->d", weights, rows**2),
    "absmax": jnp.max(jnp.abs(rows) * weights[:, None], axis=0),
    "count": jnp.sum(weights),
  }
  old = module.get_variable("stats", name)
  if old is not None:
    new = {
      "square_sum": old["square_sum"] + new["square_sum"],
      "absmax": jnp.maximum(old["absmax"], new["absmax"]),
      "count": old["count"] + new["count"],
    }
  module.put_variable("stats", name, new)
