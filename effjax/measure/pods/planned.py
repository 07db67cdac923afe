"""What a compiled step would take on a slice: memory, time, and what it sends."""

import dataclasses
from collections.abc import Mapping

from effjax.measure.pods import calibration, chips, compiled, held, links, roofline
from effjax.parallel import collectives, hlo
from effjax.parallel import spread as spread_lib

Row = dict[str, int | float]
MFU = "model FLOPs / (step_secs x chips x peak bfloat16 FLOPs of a chip)"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Planned:
  """One step of a program on every chip of a slice. Bytes and FLOPs are of one chip.

  Attributes:
    topology: the slice.
    num_chips: its chips.
    fits: whether a chip's memory holds it.
    hbm_bytes: memory that it needs at its fullest; where it does not fit and the
      compiler gave up, what is known: state and temporaries.
    hbm_limit_bytes: memory that a program may use.
    memory: what `hbm_bytes` is for, by name.
    flops: multiplied and added, recomputed layers and padding included.
    model_flops: of the whole slice that the model needs, see MFU; None where no
      utilization is meant.
    hbm_traffic_bytes: between memory and chip.
    compute_secs, hbm_secs, ici_secs: of each alone, at peak rates.
    step_secs: computing, then collectives (see roofline), times what published runs
      took longer (see calibration).
    step_range_secs: the same, from the fastest to the slowest published run.
    best_secs: every collective hidden, nothing corrected.
    mfu, mfu_range: model FLOPs utilization, from `step_secs` and `step_range_secs`.
    collectives: by kind: `count`, `num_bytes`, `wire_bytes` and `secs`.
    collective_bytes: that a chip sends.
    unknown_kernels: kernels whose FLOPs are counted as none.
    compile_secs: the compiler's.
    program_bytes: length of the program's text.
  """

  topology: str
  num_chips: int
  fits: bool
  hbm_bytes: int
  hbm_limit_bytes: int
  memory: dict[str, int]
  flops: float | None = None
  model_flops: float | None = None
  hbm_traffic_bytes: float | None = None
  compute_secs: float | None = None
  hbm_secs: float | None = None
  ici_secs: float | None = None
  step_secs: float | None = None
  step_range_secs: tuple[float, float] | None = None
  best_secs: float | None = None
  mfu: float | None = None
  mfu_range: tuple[float, float] | None = None
  collectives: dict[str, Row] = dataclasses.field(default_factory=dict)
  collective_bytes: float | None = None
  unknown_kernels: tuple[str, ...] = ()
  compile_secs: float = 0.0
  program_bytes: int = 0


def of(
  program: compiled.Compiled,
  spread: spread_lib.Spread,
  slice_: chips.Slice,
  arguments: Mapping[str, int],
  model_flops: float | None,
) -> Planned:
  """Reads a compiled program.

  Args:
    program: compiled for the slice.
    spread: over the slice's chips.
    slice_: the slice.
    arguments: bytes of a chip of what the program is given, by what it is.
    model_flops: see Planned.
  """
  limit = slice_.chip.hbm_bytes
  common = {
    "topology": slice_.name,
    "num_chips": spread.mesh.size,
    "hbm_limit_bytes": limit,
    "model_flops": model_flops,
    "compile_secs": program.compile_secs,
    "program_bytes": len(program.text),
  }
  given = sum(arguments.values())
  if program.needed_bytes is not None:
    memory = {**arguments, "temporary": program.needed_bytes}
    needs = given + program.needed_bytes
    return Planned(fits=False, hbm_bytes=needs, memory=memory, **common)
  parsed = hlo.read(program.text)
  wiring = links.of_mesh(slice_, spread.mesh)
  cost = roofline.of(parsed, wiring)
  stacked = held.stacked(parsed)
  named = given + sum(stacked.values())
  ratios = calibration.ratios()
  secs = cost.step_secs * ratios.mean
  span = (cost.step_secs * ratios.low, cost.step_secs * ratios.high)
  peak = slice_.chip.flops * spread.mesh.size
  used = lambda secs: model_flops / (secs * peak)
  return Planned(
    fits=program.peak_bytes <= limit,
    hbm_bytes=program.peak_bytes,
    memory={**arguments, **stacked, "other": program.peak_bytes - named},
    flops=cost.flops,
    hbm_traffic_bytes=cost.hbm_bytes,
    compute_secs=cost.compute_secs,
    hbm_secs=cost.hbm_secs,
    ici_secs=cost.ici_secs,
    step_secs=secs,
    step_range_secs=span,
    best_secs=cost.best_secs,
    mfu=used(secs) if model_flops else None,
    mfu_range=(used(span[1]), used(span[0])) if model_flops else None,
    collectives=_by_kind(cost.sent, wiring),
    collective_bytes=sum(one.wire_bytes for one in cost.sent),
    unknown_kernels=cost.unknown,
    **common,
  )


def _by_kind(
  sent: tuple[collectives.Collective, ...], wiring: links.Wiring
) -> dict[str, Row]:
  table = collectives.totals(sent)
  for kind, row in table.items():
    row["secs"] = sum(wiring.secs(c) * c.times for c in sent if c.kind == kind)
  return table


def notes() -> list[str]:
  """How the numbers were made."""
  ratios = calibration.ratios()
  return [
    "compiled by XLA for TPUs, not run; bytes, FLOPs and collectives are read from the "
    "program, loops counted as often as they run",
    "step: every instruction the longer of its FLOPs and its bytes at peak rates, then "
    f"collectives, none hidden, times {ratios.mean:.3f}, by which {ratios.count} "
    f"published runs of training took longer ({ratios.low:.3f} to {ratios.high:.3f}: "
    "the range); nothing calibrates decoding",
    f"MFU: {MFU}; model FLOPs are three forward passes, attention in the "
    "blocks that are not masked",
    "activations: kept by the forward pass of scanned layers for the backward pass",
  ]
