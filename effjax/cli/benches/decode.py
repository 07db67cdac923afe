"""One model decoded by effjax, transformers, ONNX Runtime and llama.cpp, side by side.

SmolLM2-135M in float32, bfloat16, int8 and int4, as far as a system has them, from one
set of weights. Every row is a process of its own, so that its memory is its own. After
one turn to warm up they take turns, while all others sleep: a turn reads the prompt and
is then fed the text that follows, the same tokens in every row. The best turn of a row
counts, since noise only adds, and adds most to systems whose threads wait for each
other busily. Ratios are to effjax in float32 at the same batch. All run on the CPU,
with as many threads as this process has cores.

The peers are the extra `bench`; rows of those that are not installed are left out. It
takes about six minutes on two cores, 12 GB of memory and 3 GB of the disk.
"""

import dataclasses
import importlib.util
import pathlib
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from rich import console as rich_console

from effjax.cli import timing
from effjax.cli.peers import comparison, machine, model_files, prompts
from effjax.core import specs as specs_lib
from effjax.interop import sources
from effjax.measure import bytes as bytes_lib
from effjax.models import config as model_config
from effjax.models import decoder

MODEL = "smollm2"
REMEDY = "pip install -e '.[bench]'"
# System: the file that runs it, the packages it needs, and its formats.
_SYSTEMS = {
  "effjax": ("effjax_lane", (), ("float32", "bfloat16", *model_files.QUANTIZED)),
  "transformers": (
    "transformers_lane",
    ("torch", "transformers"),
    ("float32", "bfloat16"),
  ),
  "onnxruntime": ("onnx_lane", ("onnx", "onnxruntime"), ("float32", "int8", "int4")),
  "llama.cpp": ("llama_lane", ("xllamacpp",), ("F32", "BF16", "Q8_0", "Q4_0")),
}
LANES = tuple(
  comparison.Lane(system, format, module, needs)
  for system, (module, needs, formats) in _SYSTEMS.items()
  for format in formats
)
BASE = LANES[0]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes:
  """How much is timed.

  Attributes:
    batches: rows decoded together, one comparison each.
    prompt: tokens of a prompt.
    steps: tokens a row is fed in a turn.
    rounds: turns of each lane that count.
  """

  batches: tuple[int, ...] = (1, 8)
  prompt: int = 128
  steps: int = 16
  rounds: int = 3


_QUICK = Sizes(batches=(2,), prompt=12, steps=3, rounds=2)


@dataclasses.dataclass(frozen=True)
class _Source:
  """The model that all lanes run."""

  model: decoder.Decoder
  params: Mapping[str, Any]
  specs: Mapping[str, Any]
  tokenizer: Any
  about: str


def bench(quick: bool = False) -> timing.Table:
  """Times prefill and decoding of every lane whose packages are installed.

  Args:
    quick: a tiny random model and few tokens, to see that it works; the numbers mean
      nothing.

  Raises:
    EffjaxError: a lane failed; with what it said.
  """
  sizes = _QUICK if quick else Sizes()
  say = rich_console.Console(stderr=True, highlight=False).print
  lanes, missing = available(LANES)
  found: dict[int, dict[comparison.Lane, comparison.Measured]] = {}
  with tempfile.TemporaryDirectory() as made:
    place = pathlib.Path(made)
    source = _random() if quick else _packaged()
    say(f"writing {len(lanes)} models")
    written = _write(lanes, place, source)
    for batch in sizes.batches:
      vocab, length = source.model.config.vocab_size, sizes.prompt + sizes.steps
      tokens_BL = prompts.tokens(source.tokenizer, vocab, batch, length)
      found[batch] = comparison.compare(
        lanes, place, tokens_BL, sizes.prompt, sizes.rounds, say
      )
  return timing.Table(
    title="one model in several systems: prefill and decoding",
    rows=[_row(lane, batch, found[batch], sizes) for batch in found for lane in lanes],
    notes=[
      source.about,
      *_conditions(sizes),
      _disturbance(found),
      *_systems(found),
      *written,
      *missing,
    ],
  )


def available(
  lanes: Sequence[comparison.Lane],
) -> tuple[list[comparison.Lane], list[str]]:
  """The lanes whose packages are installed, and a note on those left out."""
  names = dict.fromkeys(name for lane in lanes for name in lane.needs)
  missing = [name for name in names if importlib.util.find_spec(name) is None]
  kept = [lane for lane in lanes if not set(lane.needs) & set(missing)]
  if not missing:
    return kept, []
  systems = dict.fromkeys(lane.system for lane in lanes if lane not in kept)
  left_out, packages = " and ".join(systems), " and ".join(missing)
  return kept, [f"left out: {left_out}, as {packages} is not installed; {REMEDY}"]


def _packaged() -> _Source:
  opened = sources.open_source(MODEL)
  params = opened.load("float32")
  about = (
    f"{MODEL}: {bytes_lib.num_params(params):,} parameters; its package holds them in "
    "4 bits (Q4_1), and their values in float32 are what every row starts from: what "
    "4-bit rows lose by a second rounding is not what they would lose by a first"
  )
  return _Source(opened.model, params, opened.specs, opened.tokenizer, about)


def _random() -> _Source:
  heads = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 16}
  model = decoder.Decoder(
    model_config.DecoderConfig(
      vocab_size=256,
      embed_dim=64,
      num_layers=2,
      mixer_options={"attention": heads},
      mlp_options={"swiglu": {"hidden_dim": 96}},
      max_len=64,
    )
  )
  init = lambda key: model.init(key, *model.example_inputs())["params"]
  params = jax.jit(init)(jax.random.key(0))
  return _Source(model, params, specs_lib.specs(model), None, "a tiny random model")


def _write(
  lanes: Sequence[comparison.Lane], place: pathlib.Path, source: _Source
) -> list[str]:
  """Writes the model of each lane; returns what a reader has to know."""
  notes = []
  for lane in lanes:
    written = model_files.write(
      lane.system,
      lane.format,
      place / lane.name,
      source.model,
      source.params,
      source.specs,
    )
    notes += [f"{lane.name}: {note}" for note in written]
  return notes


def _row(
  lane: comparison.Lane,
  batch: int,
  measured: Mapping[comparison.Lane, comparison.Measured],
  sizes: Sizes,
) -> dict[str, Any]:
  mine, base = measured[lane], measured[BASE]
  row: dict[str, Any] = {"batch": batch, "system": lane.system, "format": lane.format}
  for phase, tokens, secs, base_secs in (
    ("prefill", batch * sizes.prompt, mine.prefill_secs, base.prefill_secs),
    ("decode", batch, mine.step_secs, base.step_secs),
  ):
    row[f"{phase}_tok_s"] = tokens / secs
    row[f"{phase}_x"] = base_secs / secs
    row[f"{phase}_mb"] = _mb(mine.phase_bytes(phase))
  peak, base_peak = mine.peak_bytes, base.peak_bytes
  return row | {
    "peak_mb": _mb(peak),
    "peak_x": peak / base_peak if peak and base_peak else None,
    "logits_diff": float(np.abs(mine.logits - base.logits).max() / base.logits.std()),
  }


def _mb(size: int | None) -> float | None:
  return None if size is None else size / 1e6


def _conditions(sizes: Sizes) -> list[str]:
  """What the columns mean."""
  return [
    f"a turn: a prompt of {sizes.prompt} tokens, then the {sizes.steps} that follow "
    f"it, fed one at a time; best of {sizes.rounds} turns (of decoding: of their "
    "medians), all rows taking turns",
    f"_x: over {BASE.name} at the same batch; of speeds above 1 is faster, of peak_mb "
    "below 1 is less memory",
    "prefill_mb, decode_mb: resident at most in that phase, once warm, over what the "
    "imported libraries hold; peak_mb: of the whole process, loading, compiling and "
    "libraries included",
    f"logits_diff: largest difference of the logits after prompt and last token from "
    f"{BASE.name}, in standard deviations of those",
    f"device: {machine.describe()}; {len(machine.cores())} threads in every row",
  ]


def _disturbance(
  found: Mapping[int, Mapping[comparison.Lane, comparison.Measured]],
) -> str:
  shares = {
    f"{lane.name} at batch {batch}": one.disturbance()
    for batch, measured in found.items()
    for lane, one in measured.items()
  }
  known = {name: share for name, share in shares.items() if share is not None}
  if not known:
    return "other processes: not known here"
  worst = max(known, key=known.__getitem__)
  return (
    "in the turns that count other processes took up to "
    f"{100 * known[worst]:.0f} % of the cores ({worst}), in the middle "
    f"{100 * float(np.median(list(known.values()))):.0f} %"
  )


def _systems(
  found: Mapping[int, Mapping[comparison.Lane, comparison.Measured]],
) -> list[str]:
  """What the systems say of themselves, and what they quantize."""
  said = (
    f"{lane.system}: {one.about}"
    for measured in found.values()
    for lane, one in measured.items()
  )
  present = {lane.system for measured in found.values() for lane in measured}
  formats = (
    f"{system}: {text}"
    for system, text in model_files.FORMATS.items()
    if system in present
  )
  return [*dict.fromkeys(said), *formats]


TECHNIQUE = bench
