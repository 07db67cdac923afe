"""Layers that differ: maximal runs of equal layers are scanned, and can be taken apart.

A scanned model keeps the parameters of layer `run.start + s * period + j` at index `s`
of the leading axis of `run_<i>/layer_<j>/...`. Taken apart, the same layer stands at
`layer_<k>/...` with no stacked axis, and the model that fits is the unrolled one. That
per-layer view is what layer-wise transforms work on and what decoding runs.
"""

import dataclasses
import itertools
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, Protocol, TypeVar, runtime_checkable

import jax
import jax.numpy as jnp

from effjax.core import tree as tree_lib


@dataclasses.dataclass(frozen=True)
class Run:
  """`repeats` scanned repetitions of a body of `period` layers (counts)."""

  period: int
  repeats: int

  @property
  def num_layers(self) -> int:
    """Layers in the run."""
    return self.period * self.repeats


@runtime_checkable
class Layered(Protocol):
  """A model made of layers; what unstack and restack need to know of it."""

  @property
  def runs(self) -> tuple[Run, ...] | None:
    """The scanned runs, or None when every layer stands alone (unrolled)."""

  @property
  def layer_keys(self) -> tuple[Hashable, ...]:
    """One key a layer; layers of equal keys are built equal."""

  @property
  def layer_groups(self) -> tuple[int, ...]:
    """How many layers in a row a run must keep together, in order."""

  def with_runs(self, runs: tuple[Run, ...] | None) -> "Layered":
    """The same model, scanned differently."""


Model = TypeVar("Model", bound=Layered)


def find_runs(
  keys: Sequence[Hashable], groups: Sequence[int] | None = None
) -> tuple[Run, ...]:
  """Splits layers into maximal runs: repeats of one layer or of a pattern of layers.

  From each position the body that covers most groups wins, the shortest first.

  Args:
    keys: one a layer; layers of equal keys are equal.
    groups: how many layers in a row stay in one body; each layer alone if None.
  """
  sizes = [1] * len(keys) if groups is None else list(groups)
  ends = list(itertools.accumulate(sizes))
  # A group is one layer from here on, a long one.
  units = [tuple(keys[end - size : end]) for end, size in zip(ends, sizes, strict=True)]
  runs = []
  start = 0
  while start < len(units):
    best = (1, 1)
    for period in range(1, (len(units) - start) // 2 + 1):
      body = units[start : start + period]
      repeats = 1
      while units[start + repeats * period :][:period] == body:
        repeats += 1
      if repeats > 1 and period * repeats > best[0] * best[1]:
        best = (period, repeats)
    period, repeats = best
    runs.append(Run(sum(sizes[start : start + period]), repeats))
    start += period * repeats
  return tuple(runs)


def unstack(model: Model, params: Mapping[str, Any]) -> tuple[Model, dict[str, Any]]:
  """The per-layer view of a model: `layer_<k>/...` without stacked axes.

  Args:
    model: a Layered model.
    params: its parameters, or any tree of the same paths whose leaves are arrays or
      pytrees of arrays with the stacked axis first.

  Returns:
    The unrolled model and its parameters; applied, they compute the same function.
  """
  if model.runs is None:
    return model, dict(params)
  flat = {}
  stacked = places(model.runs)
  for path, leaf in tree_lib.flatten(params).items():
    run, _, rest = path.partition("/")
    body, _, name = rest.partition("/")
    if (run, body) not in stacked:
      flat[path] = leaf
      continue
    for index, layer in enumerate(stacked[run, body]):
      flat[f"layer_{layer}/{name}"] = jax.tree.map(lambda a, i=index: a[i], leaf)
  return model.with_runs(None), tree_lib.unflatten(flat)


def restack(model: Model, params: Mapping[str, Any]) -> tuple[Model, dict[str, Any]]:
  """The inverse of `unstack`: scans maximal runs of layers that are really equal.

  Two layers are equal when their configs are and their leaves have the same kinds,
  static metadata, shapes and dtypes.
  """
  if model.runs is not None:
    return model, dict(params)
  layers = [params[f"layer_{k}"] for k in range(len(model.layer_keys))]
  runs = find_runs(
    [
      (key, _structure(layer))
      for key, layer in zip(model.layer_keys, layers, strict=True)
    ],
    model.layer_groups,
  )
  flat = {
    path: leaf
    for path, leaf in tree_lib.flatten(params).items()
    if not path.startswith("layer_")
  }
  for (run, body), members in places(runs).items():
    stacked = jax.tree.map(lambda *a: jnp.stack(a), *(layers[k] for k in members))
    for name, leaf in tree_lib.flatten(stacked).items():
      flat[f"{run}/{body}/{name}"] = leaf
  return model.with_runs(runs), tree_lib.unflatten(flat)


def restack_like(
  model: Model, unrolled: Model, params: Mapping[str, Any]
) -> tuple[Model, dict[str, Any]]:
  """Layers stacked as a model had them, or anew if other layers are equal now.

  Args:
    model: as it was before `unstack`; where it was unrolled, nothing is stacked.
    unrolled: the unrolled model the parameters belong to.
    params: its parameters.

  Returns:
    `model` itself unless layers are scanned differently, and the parameters.
  """
  if model.runs is None:
    return model, dict(params)
  again, stacked = restack(unrolled, params)
  return (model if again.runs == model.runs else again), stacked


def places(runs: Sequence[Run]) -> dict[tuple[str, str], list[int]]:
  """For each `(run_<i>, layer_<j>)`, the numbers of the layers stacked there."""
  found = {}
  start = 0
  for i, run in enumerate(runs):
    for j in range(run.period):
      members = [start + s * run.period + j for s in range(run.repeats)]
      found[f"run_{i}", f"layer_{j}"] = members
    start += run.num_layers
  return found


def _structure(layer: Any) -> Hashable:
  leaves, treedef = jax.tree.flatten(layer)
  return treedef, tuple((leaf.shape, jnp.dtype(leaf.dtype).name) for leaf in leaves)
