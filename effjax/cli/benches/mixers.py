"""Sequence mixers at growing length: time of a gradient and compiled memory.

One mixer alone, without norms and MLP, at its source's default sizes: forward, and the
gradients of its parameters and inputs. Softmax attention with the scores held in memory
is the row all others are compared with. All mixers at all lengths take turns, round
after round, and the best of their runs counts: a machine that is slow for minutes would
otherwise bend the curves. What a form that holds its scores cannot fit is not run, and
says so by an empty time.
"""

import dataclasses
import itertools
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from rich import console as rich_console
from rich import progress

from effjax.cli import timing
from effjax.core import config as core_config
from effjax.core import registry
from effjax.models import config as model_config

SOFTMAX = "softmax, scores held"
LENGTHS = (256, 512, 1024, 2048, 4096, 8192, 16384)
# Beyond the registered mixers at their defaults: other forms worth a row.
FORMS: Mapping[str, tuple[str, dict[str, Any]]] = {
  SOFTMAX: ("attention", {"implementation": "xla"}),
  "attention, window 256": ("attention", {"window": 256}),
}
_MIXERS = model_config.MIXERS
_HEAD_DIM = 64
_LIMIT_BYTES = 6 * 2**30


@dataclasses.dataclass
class _Lane:
  """One mixer at one length while it is being timed."""

  name: str
  length: int
  gradient: Any
  args: tuple[Any, ...]
  temp_bytes: int
  secs: list[float]


def bench(quick: bool = False) -> timing.Table:
  """Times every mixer at every length.

  Args:
    quick: two mixers at tiny lengths, to see that it works; the numbers mean nothing.
  """
  width, lengths, rounds = (64, (32, 64), 1) if quick else (256, LENGTHS, 6)
  forms = dict(FORMS) | {name: (name, {}) for name in registry.names(_MIXERS)}
  if quick:
    forms = {name: forms[name] for name in (SOFTMAX, "mamba2")}
  places = list(itertools.product(lengths, forms.items()))
  lanes = [
    _lane(name, *form, width, length)
    for length, (name, form) in _shown(places, "compiling")
  ]
  _time(lanes, rounds)
  found = {
    (lane.name, lane.length): (min(lane.secs, default=None), lane.temp_bytes)
    for lane in lanes
  }
  rows = [
    _row(found, name, length) for name, length in itertools.product(forms, lengths)
  ]
  return timing.Table(
    title="forward and backward of one mixer, by length",
    rows=rows,
    notes=[
      f"width {width}, batch 1, float32; best of up to {rounds} runs, taking turns",
      "growth: time over that of half the length; temp_mb: what the compiler reserves",
      f"speedup: over {SOFTMAX!r} at the same length",
      *_crossovers(rows, lengths),
      f"device: {jax.devices()[0].device_kind}",
    ],
  )


def _row(
  found: Mapping[tuple[str, int], tuple[float | None, int]], name: str, length: int
) -> dict[str, Any]:
  secs, temp_bytes = found[name, length]
  half = found.get((name, length // 2), (None, 0))[0]
  softmax = found[SOFTMAX, length][0]
  return {
    "mixer": name,
    "tokens": length,
    "ms": None if secs is None else 1e3 * secs,
    "temp_mb": temp_bytes / 1e6,
    "growth": secs / half if secs and half else None,
    "speedup": softmax / secs if secs and softmax else None,
  }


def _crossovers(rows: list[dict[str, Any]], lengths: tuple[int, ...]) -> Iterator[str]:
  """From which measured length on each mixer is faster than softmax, in words."""
  by_place = {(row["mixer"], row["tokens"]): row for row in rows}
  for name in dict.fromkeys(row["mixer"] for row in rows):
    if name == SOFTMAX:
      continue
    start = None
    for length in reversed(lengths):
      row = by_place[name, length]
      beaten = by_place[SOFTMAX, length]["ms"] is None and row["ms"] is not None
      if not beaten and (row["speedup"] is None or row["speedup"] <= 1):
        break
      start = length
    where = f"from {start} tokens on" if start else "at no measured length"
    yield f"{name}: faster than softmax {where}"


def _time(lanes: list[_Lane], rounds: int) -> None:
  """Lets all lanes run in turn, so many times over, if they fit."""
  timed = [lane for lane in lanes if lane.temp_bytes <= _LIMIT_BYTES]
  for turn in range(rounds):
    for lane in _shown(timed, f"round {turn + 1} of {rounds}"):
      # A form that takes seconds needs no more than two looks.
      if len(lane.secs) >= 2 and sum(lane.secs) > 4:
        continue
      start = time.perf_counter()
      jax.block_until_ready(lane.gradient(*lane.args))
      lane.secs.append(time.perf_counter() - start)


def _shown(items: Sequence[Any], text: str) -> Iterable[Any]:
  """The items, with a bar on stderr that goes away again; in a log, with one line."""
  console = rich_console.Console(stderr=True)
  if not console.is_terminal:
    console.print(f"{text}: {len(items)} programs", highlight=False)
    return items
  return progress.track(
    items, text, console=console, transient=True, refresh_per_second=1
  )


def _lane(
  name: str, mixer: str, changes: Mapping[str, Any], width: int, length: int
) -> _Lane:
  cls = registry.find(_MIXERS, mixer)
  module = cls(options(cls.options_cls, width, changes), width)
  x_BLD = jax.random.normal(jax.random.key(0), (1, length, width))
  positions = jnp.arange(length)[None]
  segments = jnp.ones((1, length), jnp.int32)

  def loss(params: Any, x_BLD: jax.Array, probe_BLD: jax.Array) -> jax.Array:
    y_BLD, _ = module.apply(params, x_BLD, positions=positions, segments=segments)
    return jnp.vdot(y_BLD, probe_BLD)

  init = jax.jit(
    lambda x: module.init(
      jax.random.key(1),
      x,
      positions=positions[:, : x.shape[1]],
      segments=segments[:, : x.shape[1]],
    )
  )
  args = (init(x_BLD[:, :2]), x_BLD, jnp.ones_like(x_BLD))
  gradient = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(*args).compile()
  temp_bytes = gradient.memory_analysis().temp_size_in_bytes
  return _Lane(name, length, gradient, args, temp_bytes, [])


def options(cls: type, width: int, changes: Mapping[str, Any]) -> Any:
  """A mixer's options at a width: heads of 64 where it has heads, else its defaults."""
  names = {field.name for field in dataclasses.fields(cls)}
  heads = {"num_heads": width // _HEAD_DIM, "num_kv_heads": width // _HEAD_DIM}
  sizes = {k: v for k, v in heads.items() if k in names}
  return core_config.build(cls, sizes | dict(changes), "options")


bench.curves = timing.Curves(x="tokens", ys=("ms", "temp_mb"), by="mixer")
TECHNIQUE = bench
