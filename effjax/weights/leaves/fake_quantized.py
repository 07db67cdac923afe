"""A float weight in training that is used exactly as the quantized one will be.

Every use builds the leaf that is served (a `Quantized`, a `Coded`, ...) from the float
values and calls that leaf's own verb, so the numbers of the forward pass are those of
the hardened leaf, products of codes included. (In a whole program a compiler may fuse
what follows in another way, and round an addition once or twice.) Gradients go straight
through the rounding (Bengio et al. 2013, arXiv:1308.3432): they are those of the verb
with the served leaf's `dense()`, and with rounded activations where it rounds them. Of
two kinds:

- without `scale` the grid is fitted to the values anew in every use, as rounding to
  nearest does. It follows the largest values, so all gradients pass, also where a grid
  cuts the ends off (integers of the convention "wide", ternary);
- with it the grid is trained too (ops.matmul.learned_step), and values beyond its ends
  get no gradient.
"""

import dataclasses
import json
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from effjax.core import config
from effjax.ops.matmul import activations as activations_lib
from effjax.ops.matmul import fp8, learned_step, rounding
from effjax.weights import leaf as leaf_lib
from effjax.weights import verbs
from effjax.weights.formats import base
from effjax.weights.leaves import masked, quantized


@leaf_lib.register
@dataclasses.dataclass(frozen=True)
class FakeQuantized(leaf_lib.Leaf):
  """A matrix `[*stack, in, out]` or embedding `[V, D]` on its way to a number format.

  Attributes:
    values: the weight, floating; a `Masked` one is served as a masked leaf.
    scale: trained steps `[*stack, groups, out]`, of an embedding `[V, groups]`, with
      sizes of 1 where they are shared; or None.
    offset: what is added to each group, like `scale`, or None.
    options: the FormatOptions as JSON with sorted keys.
    axis: the axis that is cut into groups, -2, or -1 for an embedding.
    x_scale: the activations' static scale, float32 `[*stack, 1, 1]`, which trains if
      `scale` does; None if each token has its own, or activations are not rounded.
  """

  static_fields = ("options", "axis")
  # Products run as they will; what is held is not what will be.
  simulated = ("bytes",)
  grid_fields = ("scale", "offset", "x_scale")

  values: Any
  scale: Any
  offset: Any
  options: str
  axis: int = -2
  x_scale: Any = None

  @classmethod
  def create(
    cls,
    values: Any,
    options: base.FormatOptions,
    scale: jax.Array | None = None,
    offset: jax.Array | None = None,
    *,
    axis: int = -2,
  ) -> "FakeQuantized":
    """Checks that everything fits.

    Args:
      values: floating, of the logical shape; or `Masked`.
      options: the format; what a subclass adds to them is left out.
      scale, offset: see the class; for integers without zero points only.
      axis: -2 or -1.

    Raises:
      InputError: the group does not divide, or the parts do not fit together.
    """
    config.require(axis in (-1, -2), f"axis={axis} must be -2 or -1")
    groups = values.shape[axis] // options.build().group_of(values.shape[axis])
    for name, part in (("scale", scale), ("offset", offset)):
      wanted = [*values.shape]
      wanted[axis] = groups
      config.require(
        part is None
        or len(part.shape) == len(wanted)
        and all(n in (1, m) for n, m in zip(part.shape, wanted, strict=True)),
        f"{name} of shape {part is not None and tuple(part.shape)} for {groups} groups "
        f"of a weight of shape {tuple(values.shape)}",
      )
    config.require(
      scale is None or (options.format == "int" and bool(options.symmetric)),
      "trained steps need format='int' with symmetric=True: an offset, not a zero "
      "point, is what trains beside them",
    )
    config.require(
      offset is None or (scale is not None and options.activations == "none"),
      "an offset needs a scale, and activations='none'",
    )
    return cls(values, scale, offset, _to_json(options), axis)

  @property
  def trainable_fields(self) -> tuple[str, ...]:
    """The values; with a trained grid all parts of it that there are."""
    if self.scale is None:
      return ("values",)
    held = (name for name in self.grid_fields if getattr(self, name) is not None)
    return ("values", *held)

  @property
  def shape(self) -> tuple[int, ...]:
    """Logical shape."""
    return tuple(self.values.shape)

  @property
  def dtype(self) -> jnp.dtype:
    """Logical dtype."""
    return self.values.dtype

  @property
  def format(self) -> base.Format:
    """The format the values are rounded to."""
    return base.FormatOptions(**json.loads(self.options)).build()

  @property
  def code_range(self) -> tuple[int, int]:
    """The least and the largest code of an integer format."""
    low, high, _ = self.format.code_range
    return (low, high) if self.offset is None else (0, high - low)

  def served(self) -> leaf_lib.Leaf:
    """The leaf of codes that these values stand for at the moment."""
    if isinstance(self.values, masked.Masked):
      plain = dataclasses.replace(self, values=self.values.dense())
      return dataclasses.replace(self.values, values=plain.served())
    # Where barriers outlive fusion, as on accelerators, the grid is computed as it is
    # by `harden`, and what follows sees arrays as it will then.
    parts = (self.values, self.scale, self.offset)
    values, scale, offset = jax.lax.optimization_barrier(parts)
    leaf = jax.lax.optimization_barrier(self._encode(values, scale, offset))
    if self.x_scale is None:
      return leaf
    return dataclasses.replace(leaf, x_scale=self.x_scale)

  def _encode(self, values: Any, scale: Any, offset: Any) -> leaf_lib.Leaf:
    fmt = self.format
    x = self._split(values)
    if scale is None:
      grid = fmt.fit(x, fmt.outer(x))
    else:
      grid = {"scale": self._as_grid(scale, x)}
    if offset is None:
      codes = base.merge(fmt.encode(x, grid))
      return fmt.leaf(codes, grid, axis=self.axis, dtype=self.dtype)
    low, high = self.code_range
    offset = self._as_grid(offset, x)
    at = learned_step.places(x, grid["scale"], offset)
    codes = base.merge(jnp.clip(jnp.round(at), low, high).astype(jnp.uint8))
    parts = (codes, *(part[..., 0, :] for part in (grid["scale"], offset)))
    if self.axis == -1:
      parts = tuple(jnp.swapaxes(part, -1, -2) for part in parts)
    codes, scale, offset = parts
    return quantized.Quantized.create(
      codes,
      scale,
      offset=offset,
      bits=fmt.code_bits,
      axis=self.axis,
      dtype=self.dtype,
    )

  def dense(self) -> jax.Array:
    """The served leaf's weight, with the gradients of this one."""
    exact = lambda leaf: leaf.served().dense()
    return _straight_through(exact, FakeQuantized._surrogate, self)

  def contract(self, x: jax.Array, *, transpose: bool = False) -> jax.Array:
    """The served leaf's product."""
    return _straight_through(
      lambda leaf, x: leaf.served().contract(x, transpose=transpose),
      lambda leaf, x: leaf_lib.contract_dense(
        leaf._inputs(x), leaf.dense(), transpose=transpose
      ),
      self,
      x,
    )

  def lookup(self, ids: jax.Array) -> jax.Array:
    """The served leaf's rows."""
    return _straight_through(
      lambda leaf, ids: leaf.served().lookup(ids),
      lambda leaf, ids: jnp.take(leaf.dense(), ids, axis=0),
      self,
      ids,
    )

  def grouped_contract(
    self, x: jax.Array, group_sizes: jax.Array | None = None
  ) -> jax.Array:
    """The served leaf's products."""
    return _straight_through(
      lambda leaf, *args: leaf.served().grouped_contract(*args),
      lambda leaf, x, sizes: leaf_lib.grouped_contract_dense(
        leaf._inputs(x, sizes), leaf.dense(), sizes
      ),
      self,
      x,
      group_sizes,
    )

  def inner_axes(self, axes: Sequence[Any]) -> dict[str, Any]:
    """Everything inherits the axes it tiles; what has size one is replicated."""
    inner = {"values": tuple(axes)}
    for name in self.grid_fields:
      part = getattr(self, name)
      inner[name] = part if part is None else _tiled(axes, part.shape)
    return inner

  def _surrogate(self) -> jax.Array:
    """What is differentiated in place of the served leaf's weight."""
    values = verbs.dense(self.values)
    if self.scale is None:
      return values
    x = self._split(values)
    dtype = self.format.scale_dtype
    parts = [
      part if part is None else rounding.narrowed(self._turn(part), dtype)[..., None, :]
      for part in (self.scale, self.offset)
    ]
    rounded = base.merge(learned_step.fake_quantize(x, *parts, *self.code_range))
    return self._turn(rounded)

  def _inputs(self, x: jax.Array, group_sizes: jax.Array | None = None) -> jax.Array:
    """Activations as the served leaf rounds them, with gradients."""
    kind = getattr(self.format, "activations", "none")
    if kind == "none":
      return x
    if self.x_scale is None:
      return _straight_through(lambda x: _rounded(x, kind), lambda x: x, x)
    scale = self.x_scale
    if group_sizes is not None:
      scale = jnp.repeat(scale[:, 0], group_sizes, axis=0, total_repeat_length=len(x))
    elif scale.ndim > 2:
      ones = (1,) * (x.ndim - scale.ndim)
      scale = scale.reshape(*scale.shape[:-2], *ones, 1, 1)
    else:
      scale = scale.reshape((1,) * x.ndim)
    top = activations_lib.LARGEST[kind]
    to_fp8 = lambda at: fp8.encode(at).astype(at.dtype)
    return learned_step.fake_quantize(
      x,
      scale,
      None,
      -top,
      top,
      count=x.shape[-1],
      nearest=to_fp8 if kind == "fp8" else jnp.round,
    )

  def _turn(self, part: jax.Array) -> jax.Array:
    """Between the order `[..., in, out]` and that of the weight."""
    return part if self.axis == -2 else jnp.swapaxes(part, -1, -2)

  def _split(self, values: jax.Array) -> jax.Array:
    """The weight as `[*stack, groups, inputs of a group, out]`."""
    w = self._turn(values)
    return base.split(w, self.format.group_of(w.shape[-2]))

  def _as_grid(self, part: jax.Array, x: jax.Array) -> jax.Array:
    """Steps or offsets as they are served: one for each group and output."""
    part = rounding.narrowed(self._turn(part), self.format.scale_dtype)[..., None, :]
    return jnp.broadcast_to(part, (*x.shape[:-2], 1, x.shape[-1]))


def _straight_through(
  exact: Callable[..., Any], surrogate: Callable[..., Any], *args: Any
) -> Any:
  """`exact(*args)` with the gradients of `surrogate(*args)`.

  Not `surrogate + stop_gradient(exact - surrogate)`, which rounds once more; and the
  surrogate's product is only there where gradients are taken.
  """
  through = jax.custom_vjp(exact)
  through.defvjp(
    lambda *args: (exact(*args), args),
    lambda args, cotangent: jax.vjp(surrogate, *args)[1](cotangent),
  )
  return through(*args)


def _rounded(x: jax.Array, kind: str) -> jax.Array:
  codes, scale = activations_lib.quantize(x, kind)
  return (codes.astype(jnp.float32) * scale).astype(x.dtype)


def _to_json(options: base.FormatOptions) -> str:
  names = (field.name for field in dataclasses.fields(base.FormatOptions))
  given = {name: getattr(options, name) for name in names}
  given = {name: value for name, value in given.items() if value is not None}
  return json.dumps(given, sort_keys=True)


def _tiled(axes: Sequence[Any], shape: Sequence[int]) -> tuple[Any, ...]:
  pairs = zip(axes, shape, strict=True)
  return tuple(None if size == 1 else axis for axis, size in pairs)
