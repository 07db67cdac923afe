"""Presets: which mesh axis each logical axis is split over.

A preset is one kind of parallelism: tables for parameters, gradients, optimizer state
and activations. Presets are combined with "+", as in "fsdp+tp": the tables of a
combination are those of its parts, one after the other. A table is pairs of a logical
axis and a mesh axis, the preferred ones first; in each array a mesh axis is used once,
by the first pair that names one of its dimensions and divides it (the convention of
t5x). What no pair names is replicated.

The rows of a batch are "batch"; after the last layer they are "rows_out", and split
over stages, too, none of which would have anything else to do there.
"""

import dataclasses
import functools
from collections.abc import Mapping

from effjax.core import config, errors

# From the slowest network to the fastest: stages and replicas may be far apart.
AXES = ("stage", "data", "fsdp", "expert", "context", "tensor")

Table = tuple[tuple[str, str], ...]

_HEADS = ("heads", "kv", "inner", "ssm_heads")
_WITHIN_LAYER = (*_HEADS, "mlp", "vocab", "experts")
# Axes that parameters are split over where any will do, the best ones first.
_ANY = ("embed", "mlp", *_HEADS, "vocab", "experts", "position", "embedding", "state")


def _over(mesh_axis: str, axes: tuple[str, ...]) -> Table:
  return tuple((axis, mesh_axis) for axis in axes)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Preset:
  """One way to spread a model over devices, or several together.

  Attributes:
    summary: one line for the catalogue.
    main_axis: mesh axis that takes all devices unless a shape is given.
    axes: mesh axes it splits anything over.
    params: table for parameters.
    gradients: table for gradients, also while they are accumulated.
    state: table for what mirrors parameters in the optimizer state.
    activations: table for activations.
    splits_all: mesh axes that no large parameter, or none of its optimizer state, may
      be replicated over.
  """

  summary: str
  main_axis: str
  axes: tuple[str, ...]
  params: Table = ()
  gradients: Table = ()
  state: Table = ()
  activations: Table = ()
  splits_all: tuple[str, ...] = ()


_FSDP = _over("fsdp", _ANY)
_ZERO = _over("data", _ANY)
_TENSOR = _over("tensor", _WITHIN_LAYER)
_CONTEXT = (("length", "context"),)

PRESETS: Mapping[str, Preset] = {
  "dp": Preset(
    summary="data parallel: the batch is split, parameters are replicated",
    main_axis="data",
    axes=("data",),
    activations=(("batch", "data"),),
  ),
  "zero1": Preset(
    summary="ZeRO-1: data parallel, and each device keeps a part of the optimizer "
    "state",
    main_axis="data",
    axes=("data",),
    state=_ZERO,
    activations=(("batch", "data"),),
    splits_all=("data",),
  ),
  "zero2": Preset(
    summary="ZeRO-2: ZeRO-1, and gradients are reduced to the part that a device keeps",
    main_axis="data",
    axes=("data",),
    gradients=_ZERO,
    state=_ZERO,
    activations=(("batch", "data"),),
    splits_all=("data",),
  ),
  "fsdp": Preset(
    summary="fully sharded (ZeRO-3): batch, parameters and optimizer state are split",
    main_axis="fsdp",
    axes=("fsdp",),
    params=_FSDP,
    gradients=_FSDP,
    state=_FSDP,
    activations=(("batch", "fsdp"),),
    splits_all=("fsdp",),
  ),
  "hsdp": Preset(
    summary="hybrid sharded: replicas, in each of which everything is fully sharded",
    main_axis="fsdp",
    axes=("data", "fsdp"),
    params=_FSDP,
    gradients=_FSDP,
    state=_FSDP,
    activations=(("batch", "data"), ("batch", "fsdp")),
    splits_all=("fsdp",),
  ),
  "tp": Preset(
    summary="tensor parallel: heads, hidden units and vocabulary are split",
    main_axis="tensor",
    axes=("tensor",),
    params=_TENSOR,
    gradients=_TENSOR,
    state=_TENSOR,
    activations=_TENSOR,
  ),
  "tps": Preset(
    summary="tensor parallel, and what goes from layer to layer is split in width: "
    "more is gathered, and a device keeps only its part of it",
    main_axis="tensor",
    axes=("tensor",),
    params=_TENSOR,
    gradients=_TENSOR,
    state=_TENSOR,
    activations=(*_TENSOR, ("embed_act", "tensor")),
  ),
  "ring": Preset(
    summary="context parallel: sequences are split, keys travel around a ring of "
    "devices, recurrent states from each to the next",
    main_axis="context",
    axes=("context",),
    activations=_CONTEXT,
  ),
  "ulysses": Preset(
    summary="context parallel: sequences are split, and heads in their place where "
    "attention needs all tokens (all-to-all); recurrent states as in ring",
    main_axis="context",
    axes=("context",),
    activations=(*_CONTEXT, ("whole_heads", "tensor"), ("whole_heads", "context")),
  ),
  "ep": Preset(
    summary="expert parallel: experts are split, tokens go to them and back "
    "(all-to-all)",
    main_axis="expert",
    axes=("expert",),
    params=(("experts", "expert"),),
    gradients=(("experts", "expert"),),
    state=(("experts", "expert"),),
    activations=(("batch", "expert"), ("experts", "expert")),
  ),
  "pp": Preset(
    summary="pipeline parallel: consecutive layers are split, micro-batches go through "
    "them (GPipe, or circular)",
    main_axis="stage",
    axes=("stage",),
    params=(("layers", "stage"),),
    gradients=(("layers", "stage"),),
    state=(("layers", "stage"),),
    activations=(("stages", "stage"),),
  ),
}

# What does the same thing, or works on the same axis in another way.
_ALTERNATIVES = (
  ("dp", "zero1", "zero2", "hsdp"),
  ("fsdp", "hsdp"),
  ("tp", "tps"),
  ("ring", "ulysses"),
)
# Tables in which one pair stands before another: tokens are split over replicas first,
# and what holds whole layers or experts, or heads, before what any axis will do for.
_ORDER = (
  "pp",
  "ep",
  "tp",
  "tps",
  "ring",
  "ulysses",
  "dp",
  "zero1",
  "zero2",
  "hsdp",
  "fsdp",
)


@functools.cache
def find(name: str) -> Preset:
  """The preset of a name, such as "fsdp" or "fsdp+tp".

  Raises:
    InputError: an unknown part, one that stands twice, or two that exclude each other.
  """
  parts = name.split("+")
  for part in parts:
    if part not in PRESETS:
      raise errors.unknown("preset", part, PRESETS)
  config.require(len(set(parts)) == len(parts), f"preset {name!r} says a part twice")
  for group in _ALTERNATIVES:
    both = [part for part in parts if part in group]
    config.require(
      len(both) < 2, f"preset {name!r}: {' and '.join(both)} exclude each other"
    )
  if len(parts) == 1:
    return _with_rows_out(PRESETS[name])
  combined = _combined(
    name, [PRESETS[part] for part in sorted(parts, key=_ORDER.index)]
  )
  return _with_rows_out(combined)


def _with_rows_out(preset: Preset) -> Preset:
  # Stages last: what is one block of rows without them is cut into smaller ones.
  axes = [axis for logical, axis in preset.activations if logical == "batch"]
  axes += [axis for axis in preset.axes if axis == "stage"]
  added = tuple(("rows_out", axis) for axis in axes)
  return dataclasses.replace(preset, activations=preset.activations + added)


def _combined(name: str, parts: list[Preset]) -> Preset:
  joined = lambda tables: tuple(dict.fromkeys(pair for t in tables for pair in t))
  params = joined(p.params for p in parts)
  batch = [pair for p in parts for pair in p.activations if pair[0] == "batch"]
  batch.sort(key=lambda pair: AXES.index(pair[1]))
  others = [pair for p in parts for pair in p.activations if pair[0] != "batch"]
  first = PRESETS[name.split("+")[0]]
  return Preset(
    summary=name,
    main_axis=first.main_axis,
    axes=tuple(axis for axis in AXES if any(axis in p.axes for p in parts)),
    params=params,
    gradients=joined([params, *(p.gradients for p in parts)]),
    state=joined([params, *(p.state for p in parts)]),
    activations=joined([batch, others]),
    splits_all=tuple(axis for p in parts for axis in p.splits_all),
  )
