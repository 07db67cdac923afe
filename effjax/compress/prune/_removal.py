"""Taking structured groups out of a model: it gets smaller, in config and parameters.

What the removed groups would have computed is gone and nothing else: the model computes
what it did with the parameters of those groups at zero.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from effjax.core import config, errors, groups, layers
from effjax.core import tree as tree_lib
from effjax.weights import leaf as leaf_lib
from effjax.weights.leaves import masked

Flat = dict[str, Any]


def require_removable(flat: Mapping[str, Any], family: groups.Family) -> None:
  """Raises InputError if a parameter of the family is held in a way that has no parts.

  Args:
    flat: parameters of the per-layer view, by path.
    family: of the groups.
  """
  for carrier in family.carriers:
    leaf = flat[carrier.path]
    plain = leaf.values if isinstance(leaf, masked.Masked) else leaf
    if leaf_lib.is_leaf_kind(plain):
      raise errors.InputError(
        f"{carrier.path} is a {plain.kind} leaf, of which no {family.axis} can be "
        "taken out; remove groups first and compress what is left"
      )


def narrowed(model: Any, family: groups.Family, count: int) -> Any:
  """The config of the layer of a family, with `count` units of it left.

  Raises:
    InputError: the module cannot be without one of its units.
  """
  index, part, axis = _place(family)
  layer = model.config.layers[index]
  config.require(
    part != "mixer" or layer.keys == "own",
    f"layer {index} has keys='{layer.keys}': its heads are tied to those of other "
    "layers; prune neurons or layers, or leave it out with where",
  )
  options = getattr(layer, f"build_{part}_options")()
  if not hasattr(options, "narrowed"):
    name = getattr(layer, part)
    raise errors.InputError(f"layer {index}: {name} has no {family.axis} to remove")
  try:
    fewer = options.narrowed(axis, count, model.config.embed_dim)
  except errors.InputError as error:
    raise errors.InputError(f"layer {index}: {error}") from None
  return dataclasses.replace(layer, **{f"{part}_options": config.to_dict(fewer)})


def remove(
  model: Any, flat: Flat, kept: Sequence[tuple[groups.Family, np.ndarray]]
) -> tuple[Any, Flat]:
  """A model and its parameters with only the kept units of some families.

  Args:
    model: unrolled.
    flat: its parameters by path.
    kept: of each family the numbers of the units that stay, `[n]` in rising order, or
      `[E, n]` of experts with units of their own.
  """
  flat = dict(flat)
  for family, units in kept:
    if units.shape[-1] == family.num_units:
      continue
    index, _, _ = _place(family)
    model = _with_layer(model, index, narrowed(model, family, units.shape[-1]))
    for carrier in family.carriers:
      flat[carrier.path] = jax.tree.map(
        lambda a, c=carrier, u=units, f=family: _taken(a, c, u, f), _open(flat, carrier)
      )
      if isinstance(flat[carrier.path], dict):
        flat[carrier.path] = masked.Masked.create(**flat[carrier.path])
  return model, flat


def without_layers(model: Any, flat: Flat, kept: Sequence[int]) -> tuple[Any, Flat]:
  """A model and its parameters with only the kept layers, in their order.

  Args:
    model: unrolled.
    flat: its parameters by path.
    kept: numbers of the layers that stay; of shared ones each number stands for all
      uses.

  Raises:
    InputError: no layer stays, or one that lends its keys to another would go.
  """
  config.require(len(kept) > 0, "nothing would be left of the model's layers")
  old = model.config.layers
  for index, layer in enumerate(old):
    config.require(
      layer.keys != "lent" or index in kept,
      f"layer {index} lends its keys to those that follow and cannot go without them; "
      "leave it out with where",
    )
  chosen = dataclasses.replace(
    model.config, layers=tuple(old[k] for k in kept), runs=None
  )
  rest = {p: leaf for p, leaf in flat.items() if not p.startswith("layer_")}
  for new, k in enumerate(kept):
    prefix = f"layer_{k}/"
    for path, leaf in flat.items():
      if path.startswith(prefix):
        rest[f"layer_{new}/{path.removeprefix(prefix)}"] = leaf
  return model.clone(config=chosen), rest


def restacked(model: Any, unrolled: Any, flat: Flat) -> tuple[Any, dict[str, Any]]:
  """The smaller model, scanned if `model` is."""
  params = tree_lib.unflatten(flat)
  return (unrolled, params) if model.runs is None else layers.restack(unrolled, params)


def layer_of(family: groups.Family) -> int:
  """The number of the layer whose groups these are."""
  return _place(family)[0]


def _place(family: groups.Family) -> tuple[int, str, str]:
  """Number of the layer, "mixer" or "mlp", and the axis as that part calls it."""
  layer, part, *deeper = family.module.split("/")
  return int(layer.removeprefix("layer_")), part, "/".join([*deeper, family.axis])


def _with_layer(model: Any, index: int, layer: Any) -> Any:
  changed = list(model.config.layers)
  changed[index] = layer
  return model.clone(config=dataclasses.replace(model.config, layers=tuple(changed)))


def _open(flat: Mapping[str, Any], carrier: groups.Carrier) -> Any:
  """An array, or the values and the mask of a masked leaf."""
  leaf = flat[carrier.path]
  if isinstance(leaf, masked.Masked):
    return {"values": leaf.values, "mask": leaf.mask()}
  return leaf


def _taken(
  array: jax.Array, carrier: groups.Carrier, units: np.ndarray, family: groups.Family
) -> jax.Array:
  """The entries of some units of one array."""
  at = groups.entries(units, carrier.unit)
  if at.ndim == 1:
    taken = jnp.take(array, at, axis=carrier.dim)
  else:
    shape = [1] * array.ndim
    shape[0], shape[carrier.dim] = at.shape
    taken = jnp.take_along_axis(array, at.reshape(shape), axis=carrier.dim)
  if carrier.kind == "norm" and carrier.axis == family.axis:
    # Its mean square was over all units of a part, and is over those that stay.
    taken = taken * (family.num_units / units.shape[-1]) ** 0.5
  return taken
