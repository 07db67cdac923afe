"""Smoothing pairs: a norm or matrix, and all the weights that contract its channels.

Dividing a channel of the producer by s and multiplying the inputs that read it by s
leaves the function what it was (Xiao et al. 2023, arXiv:2211.10438, eq. 3; Wei et al.
2022, arXiv:2209.13325, section 4.1). Who reads whom is what modules declare (`reads` of
core.specs), so this knows no layer by name. All readers of a producer are in a pair,
whether they are selected or not: each would see the divided channel.

Several inputs may read one channel: the value channels of a grouped-query layer are
read by every query head of the group, and the scale of a norm of single heads by all
heads. With G heads of K channels and H = G n heads read, input `h K + k` reads channel
`(h // n) K + k`. A norm before experts is read by the matrices of all of them.
"""

import dataclasses
import functools
import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from effjax.core import specs as specs_lib
from effjax.core import tree as tree_lib
from effjax.weights import leaf as leaf_lib
from effjax.weights.leaves import masked

log = logging.getLogger(__name__)

_READERS = ("matrix", "router")


@dataclasses.dataclass(frozen=True)
class Reader:
  """A weight `[*stack, in, out]`, or of experts, that contracts the channels.

  Attributes:
    path: of the weight.
    repeats: n, inputs that read one channel.
    head_dim: K, channels in a row that are read in order.
    experts: whether it has an axis of experts that the producer has not.
  """

  path: str
  repeats: int
  head_dim: int
  experts: bool

  def anonymous(self) -> "Reader":
    """The same without the path: what reads alike shares its compiled programs."""
    return dataclasses.replace(self, path="")

  def expand(self, channels: jax.Array) -> jax.Array:
    """Numbers of the channels `[*stack, C]` as those of the inputs."""
    lead = channels.shape[:-1]
    x = channels.reshape(*lead, -1, 1, self.head_dim)
    x = jnp.broadcast_to(x, (*lead, x.shape[-3], self.repeats, self.head_dim))
    x = x.reshape(*lead, -1)
    return x[..., None, :] if self.experts else x

  def gather(
    self, inputs: jax.Array, join: Callable[..., jax.Array] = jnp.max
  ) -> jax.Array:
    """Numbers of the inputs `[*stack, in]` joined into those of the channels."""
    if self.experts:
      inputs = join(inputs, axis=-2)
    lead = inputs.shape[:-1]
    x = inputs.reshape(*lead, -1, self.repeats, self.head_dim)
    return join(x, axis=-2).reshape(*lead, -1)


@dataclasses.dataclass(frozen=True)
class Pair:
  """A producer and its readers; hashable.

  Attributes:
    producer: path of the norm or of the matrix.
    scaled: paths of the parameters whose last axis is the channels: the scale and bias
      of a norm, a matrix and its bias.
    readers: all of them.
    is_norm: whether the producer is a norm.
  """

  producer: str
  scaled: tuple[str, ...]
  readers: tuple[Reader, ...]
  is_norm: bool

  def within(self, prefix: str) -> "Pair":
    """The same pair as the module at `prefix`, such as "layer_3/", names it."""
    cut = lambda path: path.removeprefix(prefix)
    readers = (dataclasses.replace(r, path=cut(r.path)) for r in self.readers)
    return dataclasses.replace(
      self,
      producer=cut(self.producer),
      scaled=tuple(map(cut, self.scaled)),
      readers=tuple(readers),
    )


def find(
  params: Mapping[str, Any], specs: Mapping[str, Any], paths: Collection[str]
) -> tuple[Pair, ...]:
  """The pairs that have a selected weight among their readers, by producer.

  A pair that cannot be scaled exactly is left out, and the log says why: a reader or
  the producer is not a plain array (or a masked one), or their shapes do not say which
  input reads which channel.

  Args:
    params, specs: trees of equal paths, stacked or of single layers.
    paths: of the selected weights.
  """
  leaves, flat = tree_lib.flatten(params), tree_lib.flatten(specs)
  readers: dict[str, list[str]] = {}
  for path, spec in flat.items():
    if spec.reads:
      readers.setdefault(spec.reads, []).append(path)
  found = []
  for producer, names in sorted(readers.items()):
    if not any(name in paths for name in names):
      continue
    pair = _pair(flat, producer, names)
    if isinstance(pair, Pair):
      odd = [p for p in (*pair.scaled, *names) if not is_scalable(leaves[p])]
      pair = f"{odd[0]} is a {leaves[odd[0]].kind} leaf" if odd else pair
    if isinstance(pair, Pair):
      found.append(pair)
    else:
      log.warning("not scaled: %s and what reads it, since %s", producer, pair)
  return tuple(found)


def apply(
  params: Mapping[str, Any], pairs: Sequence[Pair], factors: Mapping[str, jax.Array]
) -> dict[str, Any]:
  """The tree with every producer divided and its readers multiplied.

  Args:
    params: stacked or of single layers, as the pairs name them.
    pairs: from `find`.
    factors: by producer, positive, `[*stack, C]`; of experts `[*stack, E, C]`.
  """
  flat = tree_lib.flatten(params)
  for pair in pairs:
    s = factors[pair.producer]
    for path in pair.scaled:
      flat[path] = _divided(flat[path], s)
    for reader in pair.readers:
      flat[reader.path] = _multiplied(flat[reader.path], s, reader.anonymous())
  return tree_lib.unflatten(flat)


# One leaf at a time under jit: it keeps its sharding, and no second tree exists.


@jax.jit
def _divided(leaf: Any, s: jax.Array) -> Any:
  # A matrix has an axis of inputs between the stack and the channels.
  return scaled(leaf, 1 / (s if len(leaf.shape) == s.ndim else s[..., None, :]))


@functools.partial(jax.jit, static_argnames=("reader",))
def _multiplied(leaf: Any, s: jax.Array, reader: Reader) -> Any:
  return scaled(leaf, reader.expand(s)[..., None])


def is_scalable(leaf: Any) -> bool:
  """Whether a parameter is a plain array, or one under a mask."""
  values = leaf.values if isinstance(leaf, masked.Masked) else leaf
  return not leaf_lib.is_leaf_kind(values)


def dense(leaf: Any) -> jax.Array:
  """The values of a scalable parameter."""
  return leaf.dense() if leaf_lib.is_leaf_kind(leaf) else leaf


def with_values(leaf: Any, values: jax.Array) -> Any:
  """The parameter with other values, of its dtype and under its mask."""
  values = values.astype(leaf.dtype)
  if isinstance(leaf, masked.Masked):
    return dataclasses.replace(leaf, values=values)
  return values


def scaled(leaf: Any, factor: jax.Array) -> Any:
  """A scalable parameter times a factor that broadcasts, in float32 at least."""
  values = leaf.values if isinstance(leaf, masked.Masked) else leaf
  wide = jnp.promote_types(values.dtype, jnp.float32)
  return with_values(leaf, values.astype(wide) * factor.astype(wide))


def _pair(flat: Mapping[str, Any], producer: str, names: Sequence[str]) -> Pair | str:
  """A pair by its specs, or why there is none."""
  norm = [path for path in flat if path.startswith(f"{producer}/")]
  if norm:
    own = [flat[path] for path in norm]
    if any(spec.kind != "norm" or len(spec.axes) != 1 for spec in own):
      return "it is a module that is not a norm"
    scaled, spec = tuple(norm), own[0]
  else:
    spec = flat[producer]
    if spec.kind != "matrix":
      return f"it is of kind {spec.kind!r}"
    bias = flat.get(f"{producer}_bias")
    has_bias = bias is not None and bias.axes == spec.axes[-1:]
    scaled = (producer, f"{producer}_bias") if has_bias else (producer,)
  readers = []
  for name in names:
    reader = _reader(flat[name], name, spec)
    if isinstance(reader, str):
      return reader
    readers.append(reader)
  return Pair(producer, scaled, tuple(readers), bool(norm))


def _reader(
  spec: specs_lib.ParamSpec, path: str, producer: specs_lib.ParamSpec
) -> Reader | str:
  """How a weight reads the channels of a producer, or why it is not known."""
  if spec.kind not in _READERS:
    return f"its reader {path} is of kind {spec.kind!r}"
  if (
    spec.stack != producer.stack
    or spec.shape[: len(spec.stack)] != (producer.shape[: len(producer.stack)])
  ):
    return f"its reader {path} is not stacked as it is"
  experts = _has_experts(spec)
  if _has_experts(producer) and not experts:
    return f"its reader {path} has no experts"
  experts &= not _has_experts(producer)
  channels, inputs = producer.shape[-1], spec.shape[-2]
  if inputs == channels:
    return Reader(path, 1, channels, experts)
  # A norm of single heads is one head that all read.
  head_dim = spec.head_dim or 0
  whole = producer.head_dim or channels
  if head_dim != whole or channels % head_dim or inputs % channels:
    return f"its reader {path} has {inputs} inputs for {channels} channels"
  return Reader(path, inputs // channels, head_dim, experts)


def _has_experts(spec: specs_lib.ParamSpec) -> bool:
  return len(spec.axes) == 3 and spec.axes[0] == "experts"
