"""Where parameters, gradients and optimizer state of a training lie, from specs."""

import dataclasses
import functools
import math
from collections.abc import Iterable
from typing import Any

import jax
import numpy as np

from effjax.core import tree as tree_lib
from effjax.measure.pods import traced
from effjax.parallel import sharding
from effjax.parallel import spread as spread_lib

# By the path of a parameter: mesh axes of each of its dimensions, stacked ones first.
_Entries = dict[str, tuple[tuple[str, ...], ...]]


@dataclasses.dataclass(frozen=True, eq=False)
class Laid:
  """A training's state on a spread.

  Attributes:
    facts: of the training; what it recomputes makes no difference here.
    spread: over the chips of a slice.
  """

  facts: traced.Facts
  spread: spread_lib.Spread

  def check(self) -> None:
    """Raises InputError where the step could not be laid out, as the step would."""
    facts, spread, tables = self.facts, self.spread, self.spread.preset
    specs = facts.steps.training.specs
    spread.check_used(specs)
    for table, tree, shardings in (
      (tables.params, facts.params, self._params),
      (tables.params, facts.frozen, self._frozen),
      (tables.state, facts.opt_state, self._opt_state),
    ):
      spread.check(table, specs, tree, shardings)

  @functools.cached_property
  def param_bytes(self) -> int:
    """Of a chip, trained or not."""
    trained = _bytes(self.facts.params, self._params)
    return trained + _bytes(self.facts.frozen, self._frozen)

  @functools.cached_property
  def state_bytes(self) -> int:
    """Of a chip's part of the optimizer state."""
    return _bytes(self.facts.opt_state, self._opt_state)

  @functools.cached_property
  def gradient_bytes(self) -> int:
    """Of a chip's part of all gradients."""
    return _bytes(self.facts.params, self._gradients)

  @functools.cached_property
  def params(self) -> _Entries:
    """What every parameter is split over, trained or not."""
    return self._entries(self.spread.params)

  @functools.cached_property
  def gradients(self) -> _Entries:
    """What its gradient would be."""
    return self._entries(self.spread.gradients)

  @functools.cached_property
  def state(self) -> _Entries:
    """What mirrors it in the optimizer state."""
    return self._entries(self.spread.state)

  @functools.cached_property
  def trained(self) -> frozenset[str]:
    """Paths of what trains."""
    flat = tree_lib.flatten(self.facts.params)
    return frozenset(path for path, leaf in flat.items() if leaf is not None)

  def ways(self, axes: Iterable[str]) -> int:
    """Devices along mesh axes together."""
    return math.prod(self.spread.mesh.shape[axis] for axis in axes)

  def group(self, axes: frozenset[str]) -> tuple[int, ...]:
    """Numbers of the first devices that differ only along some mesh axes."""
    mesh = self.spread.mesh
    numbers = np.arange(mesh.size).reshape(mesh.devices.shape)
    place = tuple(slice(None) if name in axes else 0 for name in mesh.axis_names)
    return tuple(numbers[place].ravel().tolist())

  @property
  def _specs(self) -> Any:
    return self.facts.steps.training.specs

  @functools.cached_property
  def _params(self) -> Any:
    return self.spread.params(self._specs, self.facts.params)

  @functools.cached_property
  def _frozen(self) -> Any:
    return self.spread.params(self._specs, self.facts.frozen)

  @functools.cached_property
  def _gradients(self) -> Any:
    return self.spread.gradients(self._specs, self.facts.params)

  @functools.cached_property
  def _opt_state(self) -> Any:
    return self.spread.state(self._specs, self.facts.opt_state)

  def _entries(self, table: Any) -> _Entries:
    shapes = jax.tree.map(
      lambda spec: jax.ShapeDtypeStruct(spec.shape, spec.dtype), self._specs
    )
    return {
      path: _by_dim(found.spec, len(self.facts.specs[path].all_axes))
      for path, found in tree_lib.flatten(table(self._specs, shapes)).items()
    }


def _by_dim(entries: Iterable[Any], rank: int) -> tuple[tuple[str, ...], ...]:
  found = [
    () if e is None else (e,) if isinstance(e, str) else tuple(e) for e in entries
  ]
  return tuple(found + [()] * (rank - len(found)))


def _bytes(shapes: Any, shardings: Any) -> int:
  """Of the part of each array that one chip holds."""
  placed = jax.tree.map(
    lambda array, by: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=by),
    shapes,
    shardings,
  )
  return sharding.held_bytes(placed)
