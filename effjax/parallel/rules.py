"""Presets: which mesh axis each logical axis is split over.

A preset is two tables, one for parameters (and what mirrors them in the optimizer
state) and one for activations, and the mesh axis that takes all devices by default.
What a table does not name is replicated. In each tensor a mesh axis is used once, by
the first dimension that asks for it and divides.
"""

import dataclasses
from collections.abc import Mapping

AXES = ("data", "fsdp", "tensor")

Table = Mapping[str, str | tuple[str, ...]]

_BATCH = {"batch": ("data", "fsdp")}
_WITHIN_LAYER = ("heads", "kv", "mlp", "inner", "ssm_heads", "vocab", "experts")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Preset:
  """One way to spread a model over devices.

  Attributes:
    summary: one line for the catalogue.
    params: table for parameters and optimizer state.
    activations: table for activations.
    main_axis: mesh axis that takes all devices unless a shape is given.
  """

  summary: str
  params: Table
  activations: Table
  main_axis: str


PRESETS: Mapping[str, Preset] = {
  "dp": Preset(
    summary="data parallel: the batch is split, parameters are replicated",
    params={},
    activations=_BATCH,
    main_axis="data",
  ),
  "fsdp": Preset(
    summary="fully sharded (ZeRO-3): batch, parameters and optimizer state are split",
    params=dict.fromkeys(("embed", *_WITHIN_LAYER), "fsdp"),
    activations=_BATCH,
    main_axis="fsdp",
  ),
  "tp": Preset(
    summary="tensor parallel: heads, hidden units and vocabulary are split",
    params=dict.fromkeys(_WITHIN_LAYER, "tensor"),
    activations=_BATCH | dict.fromkeys(_WITHIN_LAYER, "tensor"),
    main_axis="tensor",
  ),
}
