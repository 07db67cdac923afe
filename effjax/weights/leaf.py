"""The protocol of a leaf kind: a compressed weight is just another kind of leaf.

A leaf kind is a frozen dataclass registered as a pytree with `register`. Its data
fields hold arrays, other leaves (leaves nest) or None; its static fields hold only
str, int and tuples of them, so that equal layers stay equal under scan and jit. A
number that may differ by layer or expert is data, with the stacked axes in front.
Fields are annotated `Any`, because pytrees are also built around tracers and shapes;
values are checked in a `create` classmethod.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar, TypeVar

import jax
import jax.numpy as jnp

from effjax.ops.conv import api as conv_ops
from effjax.ops.matmul import contract as contract_ops
from effjax.ops.moe import grouped


class Leaf:
  """Base of every leaf kind; the verbs go through `dense()` unless overridden.

  A leaf kind says seven things: `shape`, `dtype`, `dense()`, the verbs it can do
  better, `held_bytes()`, `inner_axes()` and `trainable_fields`.
  """

  kind: ClassVar[str]
  version: ClassVar[int] = 1
  data_fields: ClassVar[tuple[str, ...]]
  static_fields: ClassVar[tuple[str, ...]]
  trainable_fields: ClassVar[tuple[str, ...]] = ()
  # Of these, what weight decay and updates made for matrices leave alone.
  grid_fields: ClassVar[tuple[str, ...]] = ()
  # What a table must mark as not really saved: any of "bytes", "flops".
  simulated: ClassVar[tuple[str, ...]] = ()
  # Whether it is a pruned weight, and says which entries stay.
  pruned: ClassVar[bool] = False

  @property
  def shape(self) -> tuple[int, ...]:
    """Logical shape `[*stack, in, out]`."""
    raise TypeError(f"{type(self).__name__} does not define its shape")

  @property
  def dtype(self) -> jnp.dtype:
    """Logical dtype, that of `dense()`."""
    raise TypeError(f"{type(self).__name__} does not define its dtype")

  @property
  def is_array(self) -> bool:
    """Whether `dense()` says all there is: a format of plain arrays loses nothing."""
    return False

  def dense(self) -> jax.Array:
    """The weight this leaf stands for, as a plain array of `shape` and `dtype`."""
    raise TypeError(f"{type(self).__name__} does not define dense()")

  def inner_axes(self, axes: Sequence[Any]) -> dict[str, Any]:
    """Logical axes of each data field, from those of every logical dimension.

    A field that holds a leaf or an array gets a tuple of axes; None replicates, and a
    tuple of axes stands for dimensions that are one in the array.
    """
    raise TypeError(f"{type(self).__name__} does not define inner_axes()")

  def contract(self, x: jax.Array, *, transpose: bool = False) -> jax.Array:
    """See weights.verbs.contract."""
    return contract_dense(x, self.dense(), transpose=transpose)

  def lookup(self, ids: jax.Array) -> jax.Array:
    """See weights.verbs.lookup."""
    return jnp.take(self.dense(), ids, axis=0)

  def grouped_contract(
    self, x: jax.Array, group_sizes: jax.Array | None = None
  ) -> jax.Array:
    """See weights.verbs.grouped_contract."""
    return grouped_contract_dense(x, self.dense(), group_sizes)

  def conv(self, x: jax.Array, **kwargs: Any) -> tuple[jax.Array, jax.Array]:
    """See weights.verbs.conv."""
    return conv_ops.causal_conv(x, self.dense().astype(x.dtype), **kwargs)

  def held_bytes(self) -> int:
    """Bytes of every array this leaf really holds, nested leaves included."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(self))


AnyLeaf = TypeVar("AnyLeaf", bound=type[Leaf])


def register(cls: AnyLeaf) -> AnyLeaf:
  """Class decorator: registers a frozen leaf dataclass as a pytree.

  Fields named in the class attribute `static_fields` are static metadata; all others
  are data. The kind is the name of the file that defines the class.
  """
  names = tuple(field.name for field in dataclasses.fields(cls))
  cls.data_fields = tuple(n for n in names if n not in cls.static_fields)
  cls.kind = cls.__module__.rsplit(".", 1)[-1]
  jax.tree_util.register_dataclass(
    cls, data_fields=cls.data_fields, meta_fields=cls.static_fields
  )
  return cls


def is_leaf_kind(value: Any) -> bool:
  """Whether a parameter is a leaf dataclass rather than a plain array."""
  return isinstance(value, Leaf)


def contract_dense(x: jax.Array, w: jax.Array, *, transpose: bool) -> jax.Array:
  """`contract` for a plain array: in the dtype of x, whatever the weight's."""
  return contract_ops.contract(x, w.astype(x.dtype), transpose)


def grouped_contract_dense(
  x: jax.Array, w_EDF: jax.Array, group_sizes: jax.Array | None
) -> jax.Array:
  """`grouped_contract` for a plain array: in the dtype of x, whatever the weight's."""
  w_EDF = w_EDF.astype(x.dtype)
  if group_sizes is None:
    return jax.vmap(contract_ops.contract)(x, w_EDF)
  return grouped.grouped_matmul(x, w_EDF, group_sizes)
