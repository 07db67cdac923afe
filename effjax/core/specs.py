"""What each parameter is: logical axes, kind, and who reads whom.

Modules declare this where they declare a weight; every transform reads it here, so no
technique holds a table of one architecture's layer names.
"""

import contextlib
import contextvars
import dataclasses
import functools
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np

from effjax.core import tree as tree_lib

# Axes with one instance in the whole model; every other axis belongs to its layer.
GLOBAL_AXES = frozenset({"embed", "vocab", "embedding"})
KINDS = ("matrix", "embedding", "conv", "norm", "bias", "ssm", "router", "balance")

_recording: contextvars.ContextVar[dict | None] = contextvars.ContextVar(
  "recording", default=None
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ParamSpec:
  """What a parameter is.

  Attributes:
    axes: logical name of each trailing dimension, such as ("embed", "mlp").
    kind: one of KINDS; weight decay and default selections go by it.
    head_dim: size of one head where heads are merged into an axis, else None.
    parts: into how many parts of consecutive heads (or neurons, or experts) of that
      axis it falls, which must stay equally large: the heads of one key head each.
    within: name of the axis of the same module whose index p owns part p, or None.
    reads: path of the norm or weight whose output channels this weight contracts.
    stack: logical names of the leading stacked dimensions, such as ("layers",).
    instances: for each of `axes`, the instance it belongs to: "embed" is the one
      residual stream, "run_0/layer_1/mlp:mlp" the hidden units of one MLP. Index j of
      an instance, in every parameter that carries it, is one structured group.
    shape: full logical shape, stack included (counts).
    dtype: name of the logical dtype.
  """

  axes: tuple[str, ...]
  kind: str
  head_dim: int | None = None
  parts: int = 1
  within: str | None = None
  reads: str | None = None
  stack: tuple[str, ...] = ()
  instances: tuple[str, ...] = ()
  shape: tuple[int, ...] = ()
  dtype: str = "float32"

  @property
  def all_axes(self) -> tuple[str, ...]:
    """Logical axis of every dimension, the stacked ones first."""
    return self.stack + self.axes

  @property
  def size(self) -> int:
    """Number of logical weights."""
    return int(np.prod(self.shape, dtype=np.int64))


def record(path: tuple[str, ...], spec: ParamSpec) -> None:
  """Notes the spec of the parameter at `path`, if a recording is under way."""
  recording = _recording.get()
  if recording is not None:
    recording["/".join(path)] = spec


@contextlib.contextmanager
def recording() -> Iterator[dict[str, ParamSpec]]:
  """Collects the specs that modules declare while the context is open."""
  found: dict[str, ParamSpec] = {}
  token = _recording.set(found)
  try:
    yield found
  finally:
    _recording.reset(token)


def specs(model: Any) -> dict[str, Any]:
  """The tree of ParamSpecs of a model, with the structure of its parameters.

  Args:
    model: a Linen module with `example_inputs()`, the positional arguments of one
      call; it is only traced, nothing is computed.
  """
  try:
    hash(model)
  except TypeError:  # A model of somebody else may have fields that cannot be.
    return tree_lib.unflatten(_declared(model))
  return tree_lib.unflatten(_cached(model))


def _declared(model: Any) -> dict[str, ParamSpec]:
  """The specs of a model by path."""
  with recording() as found:
    variables = jax.eval_shape(model.init, jax.random.key(0), *model.example_inputs())
  shapes = tree_lib.flatten(variables["params"])
  if shapes.keys() != found.keys():
    odd = sorted(shapes.keys() ^ found.keys())
    raise ValueError(f"parameters not declared through weight(): {odd[:3]}")
  return {
    path: _complete(path, found[path], leaf, shapes) for path, leaf in shapes.items()
  }


# A recipe asks for the specs of the same few models again and again, and each time the
# whole model would be traced.
_cached = functools.lru_cache(maxsize=64)(_declared)


def _complete(
  path: str, spec: ParamSpec, leaf: jax.ShapeDtypeStruct, shapes: Mapping[str, Any]
) -> ParamSpec:
  """Fills in what only the whole tree knows: stack, shape, instances, reads."""
  num_stacked = len(leaf.shape) - len(spec.axes)
  owner = path.rpartition("/")[0]
  # A norm has no axis of its own: it scales one of the module it stands in.
  scope = owner.rpartition("/")[0] if spec.kind == "norm" else owner
  instances = tuple(a if a in GLOBAL_AXES else f"{scope}:{a}" for a in spec.axes)
  return dataclasses.replace(
    spec,
    stack=("layers",) * num_stacked,
    shape=tuple(leaf.shape),
    dtype=leaf.dtype.name,
    instances=instances,
    reads=_resolve(owner, spec.reads, shapes) if spec.reads else None,
  )


def _resolve(owner: str, name: str, shapes: Mapping[str, Any]) -> str:
  """The path `name` refers to: looked up beside the weight, then ever further out."""
  while True:
    candidate = f"{owner}/{name}" if owner else name
    if any(p == candidate or p.startswith(candidate + "/") for p in shapes):
      return candidate
    if not owner:
      raise ValueError(f"a weight reads {name!r}, which no module declares")
    owner = owner.rpartition("/")[0]
