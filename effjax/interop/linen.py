"""A user's own Linen model: what its parameters are, and compressed trees it can run.

    specs = effjax.specs_from_linen(model, x)
    int4 = effjax.transform("rtn", params, specs, options={"bits": 4})
    effjax.sizes(int4, specs)["bytes_held"]
    y = model.apply({"params": effjax.simulate(int4, like=params)}, x)

Linen's layers multiply plain arrays only, so the compressed weights are multiplied out
for them: quality is what it is, bytes and FLOPs are only simulated.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
from flax import linen as nn

from effjax.core import errors
from effjax.core import specs as specs_lib
from effjax.core import tree as tree_lib
from effjax.weights import verbs

_NORMS = (nn.LayerNorm, nn.RMSNorm, nn.BatchNorm, nn.GroupNorm, nn.InstanceNorm)
_CONVS = (nn.Conv, nn.ConvTranspose, nn.ConvLocal)


@jax.tree_util.register_pytree_with_keys_class
class Simulated(dict):
  """A parameter tree of plain arrays that only pretends to be small."""

  simulated = ("bytes", "flops")

  def tree_flatten_with_keys(self):
    """Its items, in the order of the keys."""
    names = sorted(self)
    return [(jax.tree_util.DictKey(name), self[name]) for name in names], tuple(names)

  @classmethod
  def tree_unflatten(cls, names: tuple[str, ...], values: Any) -> "Simulated":
    """The inverse."""
    return cls(zip(names, values, strict=True))


class _Seen(NamedTuple):
  """A layer that was called.

  Attributes:
    layer: the module.
    in_axes: how many axes of its input a DenseGeneral contracts.
  """

  layer: nn.Module
  in_axes: int


def specs_from_linen(model: nn.Module, *example: Any, **options: Any) -> dict[str, Any]:
  """What each parameter of a Linen model is, found by tracing it once.

  Kernels of `Dense` and `DenseGeneral` are matrices `[in, out]`: where several axes are
  contracted or made (the heads of `MultiHeadDotProductAttention`), those of each side
  count as one, and transforms see the kernel so. `Embed` is an embedding; kernels of
  convolutions, norms and biases are told apart. What belongs to no layer that is known
  is a "bias" if it has one axis, else "ssm": nothing touches it unless its path is
  selected.

  Args:
    model: the module.
    *example: arguments of one call, arrays or jax.ShapeDtypeStruct.
    **options: keyword arguments of that call, such as `train=False`.

  Returns:
    A tree of ParamSpecs with the structure of the parameters.

  Raises:
    InputError: parameters are wrapped (`nn.with_partitioning`): unbox them first.
  """
  seen: dict[str, _Seen] = {}

  def watch(call: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
    layer = context.module
    if context.method_name == "__call__":
      seen["/".join(layer.path)] = _Seen(layer, _contracted(layer))
    return call(*args, **kwargs)

  def init(*example: Any) -> Any:
    with nn.intercept_methods(watch):
      return model.init(jax.random.key(0), *example, **options)

  shapes = jax.eval_shape(init, *example)["params"]
  flat = tree_lib.flatten(shapes)
  for path, leaf in flat.items():
    if isinstance(leaf, nn.meta.AxisMetadata):
      raise errors.InputError(
        f"{path} is wrapped in {type(leaf).__name__}: give a model without, and "
        "nn.unbox(params)"
      )
  return tree_lib.unflatten(
    {path: _spec(path, leaf, seen) for path, leaf in flat.items()}
  )


def matrices(params: Mapping[str, Any], specs: Mapping[str, Any]) -> dict[str, Any]:
  """The tree with every parameter in the shape its spec gives it."""
  flat = tree_lib.flatten(specs)

  def shaped(path: str, leaf: Any) -> Any:
    shape = flat[path].shape if path in flat else leaf.shape
    if tuple(leaf.shape) == shape or math.prod(leaf.shape) != math.prod(shape):
      return leaf
    return leaf.reshape(shape)

  return tree_lib.map_leaves(shaped, params)


def simulate(
  params: Mapping[str, Any], like: Mapping[str, Any] | None = None
) -> Simulated:
  """Plain arrays of the values that a compressed tree stands for.

  Args:
    params: leaves of any kind.
    like: the tree before it was compressed: shapes and dtypes are as there, which a
      model with kernels of several axes needs.

  Returns:
    The tree, marked: what measures it reports its bytes and FLOPs as simulated.
  """
  dense = tree_lib.map_leaves(lambda _, leaf: verbs.dense(leaf), params)
  if like is not None:
    dense = tree_lib.map_leaves(
      lambda _, array, old: array.reshape(old.shape).astype(old.dtype), dense, like
    )
  return Simulated(dense)


def _contracted(layer: nn.Module) -> int:
  axis = layer.axis if isinstance(layer, nn.DenseGeneral) else -1
  return len(axis) if isinstance(axis, tuple | list) else 1


def _spec(
  path: str, leaf: jax.ShapeDtypeStruct, seen: Mapping[str, _Seen]
) -> specs_lib.ParamSpec:
  owner, _, name = path.rpartition("/")
  kind, shape, axes = _kind(name, leaf.shape, seen.get(owner))
  num_stacked = len(shape) - len(axes)
  return specs_lib.ParamSpec(
    axes=axes,
    kind=kind,
    stack=("layers",) * num_stacked,
    instances=tuple(f"{owner}:{axis}" for axis in axes),
    shape=shape,
    dtype=leaf.dtype.name,
  )


def _kind(
  name: str, shape: tuple[int, ...], seen: _Seen | None
) -> tuple[str, tuple[int, ...], tuple[str, ...]]:
  """Kind, logical shape and axes of a parameter, those of a scan in front."""
  layer = None if seen is None else seen.layer
  if isinstance(layer, nn.Dense | nn.DenseGeneral) and name == "kernel":
    features = layer.features if isinstance(layer.features, tuple | list) else (0,)
    made = len(features)
    lead = shape[: len(shape) - made - seen.in_axes]
    inner = shape[len(lead) : len(shape) - made]
    matrix = (math.prod(inner), math.prod(shape[len(shape) - made :]))
    return "matrix", (*lead, *matrix), ("in", "out")
  if isinstance(layer, nn.Embed):
    return "embedding", shape, ("vocab", "features")
  if isinstance(layer, _CONVS) and name == "kernel":
    spatial = len(layer.kernel_size)
    axes = (*(f"taps_{i}" for i in range(spatial)), "in", "out")
    return "conv", shape, axes
  if isinstance(layer, _NORMS):
    return "norm", shape, ("features",)
  if name == "bias" or len(shape) < 2:
    return "bias", shape, tuple(f"axis_{i}" for i in range(min(1, len(shape))))
  return "ssm", shape, tuple(f"axis_{i}" for i in range(len(shape)))
