"""Time of a compiled program on a slice of TPUs, from its text.

Every instruction takes the longer of its FLOPs at the chip's peak and its bytes at the
memory's; a computation (the program, or the body of a loop) takes the longer of the sum
of these and of all its memory traffic, and beside it what its collectives keep the
links busy. `step_secs` adds the two: no collective hides behind computing. In
`best_secs` all of a computation's do, but behind nothing outside of it. Vector units,
latency of instructions and hosts are left out, which `calibration` corrects for.
"""

import dataclasses
import functools
from collections.abc import Sequence

from effjax.measure import hlo_costs
from effjax.measure.pods import chips, kernels, links
from effjax.parallel import collectives, hlo


@dataclasses.dataclass(frozen=True)
class Cost:
  """Of a computation, loops and calls included.

  Attributes:
    flops: of matrix products and known kernels.
    hbm_bytes: moved between memory and chip.
    compute_secs: FLOPs at the peak rate.
    hbm_secs: bytes at the memory's rate.
    ici_secs: links are busy.
    step_secs: computing, and then collectives.
    best_secs: collectives hidden where they can be.
    sent: all collectives, with how often they run.
    unknown: names of kernels whose FLOPs are not known.
  """

  flops: float = 0
  hbm_bytes: float = 0
  compute_secs: float = 0
  hbm_secs: float = 0
  ici_secs: float = 0
  step_secs: float = 0
  best_secs: float = 0
  sent: tuple[collectives.Collective, ...] = ()
  unknown: tuple[str, ...] = ()

  def times(self, count: int) -> "Cost":
    """This, `count` times."""
    sums = {f: getattr(self, f) * count for f in _SUMS}
    found = tuple(dataclasses.replace(c, times=c.times * count) for c in self.sent)
    return Cost(**sums, sent=found, unknown=self.unknown)


# Types that the chip multiplies at its rate for bytes.
_BYTES = ("s8", "u8")
_SUMS = (
  "flops",
  "hbm_bytes",
  "compute_secs",
  "hbm_secs",
  "ici_secs",
  "step_secs",
  "best_secs",
)


def of(program: hlo.Program, wiring: links.Wiring) -> Cost:
  """The cost of one run of a program on one chip.

  Args:
    program: compiled for the slice.
    wiring: where its devices are.
  """

  @functools.cache
  def computation(name: str) -> Cost:
    own, inner = _Sum(wiring.slice.chip), []
    for one in program.computations.get(name, ()):
      sent = list(collectives.of(one, program))
      own.send(sent, wiring)
      if one.operation in ("while", "conditional", "call", "async-start"):
        inner.append(_called(one))
      elif not sent:
        own.add(one, program)
    return own.close(inner)

  def _called(one: hlo.Instruction) -> Cost:
    costs = [computation(name) for name in one.called()]
    if one.operation == "conditional":
      return max(costs, key=lambda cost: cost.step_secs, default=Cost())
    times = program.trip_count(one) if one.operation == "while" else 1
    return functools.reduce(_plus, costs, Cost()).times(times)

  return computation(program.entry)


class _Sum:
  """The instructions of one computation, those that loop or call left out."""

  def __init__(self, chip: chips.Chip):
    self.chip = chip
    self.flops = self.hbm_bytes = 0.0
    self.compute = self.ici = self.ops = 0.0
    self.sent: list[collectives.Collective] = []
    self.unknown: list[str] = []

  def add(self, one: hlo.Instruction, program: hlo.Program) -> None:
    """One instruction at peak rates."""
    secs = 0.0
    for dtype, flops in hlo_costs.products(one, program):
      self.flops += flops
      rate = self.chip.int8_ops if dtype in _BYTES else self.chip.flops
      secs += flops / rate
    if kernels.is_kernel(one):
      known = kernels.flops(one, program)
      if known is None:
        self.unknown.append(one.name)
      self.flops += known or 0
      secs += (known or 0) / self.chip.flops
    moved = hlo_costs.memory_bytes(one, program)
    self.hbm_bytes += moved
    self.compute += secs
    # Copies that were started early run beside what follows them.
    early = one.operation.endswith("-start")
    self.ops += secs if early else max(secs, moved / self.chip.hbm_rate)

  def send(self, sent: Sequence[collectives.Collective], wiring: links.Wiring) -> None:
    """What an instruction sends."""
    self.sent += sent
    self.ici += sum(map(wiring.secs, sent))

  def close(self, inner: Sequence[Cost]) -> Cost:
    """The whole computation."""
    hbm = self.hbm_bytes / self.chip.hbm_rate
    alone = max(self.ops, hbm)
    own = Cost(
      flops=self.flops,
      hbm_bytes=self.hbm_bytes,
      compute_secs=self.compute,
      hbm_secs=hbm,
      ici_secs=self.ici,
      step_secs=alone + self.ici,
      best_secs=max(alone, self.ici),
      sent=tuple(self.sent),
      unknown=tuple(self.unknown),
    )
    return functools.reduce(_plus, inner, own)


def _plus(one: Cost, other: Cost) -> Cost:
  sums = {f: getattr(one, f) + getattr(other, f) for f in _SUMS}
  return Cost(
    **sums,
    sent=one.sent + other.sent,
    unknown=tuple(dict.fromkeys(one.unknown + other.unknown)),
  )
