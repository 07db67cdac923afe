"""Quantizing one matrix of a real model, beside qwix; and how fast int8 products are.

The first table is about error and the time that an algorithm itself takes: one matrix
of SmolLM2 with what flows into it, 2,048 tokens to calibrate on and others to judge by.
The second is about what int8 buys: a product with activations quantized while running,
beside the same one in float32.
"""

import dataclasses
import importlib.util
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from effjax.cli import timing
from effjax.compress import blocks, calibrate
from effjax.compress import registry as transforms
from effjax.core import layers, specs
from effjax.data import config as data_config
from effjax.data import pipeline
from effjax.interop import sources
from effjax.weights import verbs
from effjax.weights.formats import base

MODEL = "smollm2"
_LAYER, _MATRIX = 10, "mlp/up"
_TOKENS = 2048
PEER = "qwix"


@dataclasses.dataclass(frozen=True)
class Cell:
  """One row: a method and a format, here and there.

  Attributes:
    method: transform here, and method there.
    format: name there, of a type that both have.
    options: of the transform here.
    std: what weights are scaled to, or None to leave them.
  """

  method: str
  format: str
  options: Mapping[str, Any]
  std: float | None = None


def _int(bits: int, group: int = 0, **more: Any) -> dict[str, Any]:
  return {"bits": bits, "group": group, "grid": "half", **more}


CELLS = (
  Cell("rtn", "int8", _int(8)),
  Cell("rtn", "int4", _int(4)),
  Cell("rtn", "int4", _int(4, 64)),
  Cell("rtn", "int4", {"bits": 4, "group": 64, "symmetric": False}),
  Cell("rtn", "int3", _int(3, 64)),
  Cell("rtn", "int2", _int(2, 64)),
  Cell("rtn", "nf4", {"format": "nf4", "group": 64}),
  Cell("rtn", "fp8", {"format": "fp8"}),
  Cell("rtn", "mxfp8", {"format": "mxfp8", "scale_rule": "rceil"}),
  Cell("rtn", "mxfp4", {"format": "mxfp4", "scale_rule": "even"}),
  Cell("rtn", "nvfp4", {"format": "nvfp4"}),
  Cell("rtn", "nvfp4", {"format": "nvfp4"}, std=1e-3),
  Cell("gptq", "int8", _int(8)),
  Cell("gptq", "int4", _int(4)),
  Cell("gptq", "int4", _int(4, 64)),
)


@dataclasses.dataclass(frozen=True)
class Problem:
  """A matrix, what flows into it, and what a method is told of that.

  Attributes:
    w_DF: the matrix.
    stats: InputStats over the tokens to calibrate on.
    x_TD: other tokens, to judge by.
    about: where it is from.
  """

  w_DF: jax.Array
  stats: calibrate.InputStats
  x_TD: jax.Array
  about: str


def bench(quick: bool = False) -> list[timing.Table]:
  """Both tables.

  Args:
    quick: a small random matrix, to see that it works; the numbers mean nothing.
  """
  return [_errors(quick), _products(quick)]


def _errors(quick: bool) -> timing.Table:
  problem = _random() if quick else _packaged()
  peer = None
  notes = [
    problem.about,
    "error: of outputs, root of the mean square over that of the outputs, on tokens "
    "that nothing was calibrated on",
    "secs: the first call, with compiling, and the second",
  ]
  if importlib.util.find_spec(PEER) is None:
    notes.append(f"left out: {PEER}, which is not installed; pip install '.[oracle]'")
  else:
    peer = importlib.import_module("effjax.cli.peers.qwix_methods")
    notes.append(
      f"{PEER} {peer.VERSION}, its methods called on the matrix as its transforms of a "
      "tree call them: not compiled as a whole; its scales are float32, too"
    )
  return timing.Table(
    title="one matrix quantized: error and time of the algorithm",
    rows=[_row(cell, problem, peer) for cell in (CELLS[::5] if quick else CELLS)],
    notes=notes,
  )


def _row(cell: Cell, problem: Problem, peer: Any) -> dict[str, Any]:
  w_DF = problem.w_DF
  if cell.std is not None:
    w_DF = w_DF * (cell.std / jnp.std(w_DF))
  options = transforms.find(cell.method).options(dict(cell.options))
  group = options.build().group_of(len(w_DF))
  told = "all" if group == len(w_DF) else str(group)
  name = cell.format if cell.options.get("symmetric", True) else f"{cell.format} + zero"
  leaf, *secs = _timed(lambda: _ours(cell, w_DF, problem.stats, options))
  row = {
    "method": cell.method,
    "format": name + ("" if cell.std is None else f", weights of std {cell.std:g}"),
    "group": told,
    "bits/weight": 8 * leaf.held_bytes() / w_DF.size,
    "error": _error(problem.x_TD, w_DF, verbs.dense(leaf)),
    "secs": secs[0],
    "secs again": secs[1],
  }
  there = {f"{PEER} error": None, f"{PEER} secs": None, f"{PEER} again": None}
  if peer is not None:
    method = peer.METHODS[cell.method]
    how = peer.how(
      cell.format,
      0 if group == len(w_DF) else group,
      bool(cell.options.get("symmetric", True)),
    )
    dense, *secs = _timed(lambda: method(w_DF, how, _told(problem.stats)))
    there = dict(zip(there, (_error(problem.x_TD, w_DF, dense), *secs), strict=True))
  return row | there


def _ours(cell: Cell, w_DF: jax.Array, stats: Any, options: Any) -> Any:
  spec = specs.ParamSpec(axes=("embed", "mlp"), kind="matrix", shape=w_DF.shape)
  made = transforms.find(cell.method)(
    {"w": w_DF}, {"w": spec}, {"w": stats}, options=options
  )
  return made["w"]


def _told(stats: calibrate.InputStats) -> dict[str, jax.Array]:
  """The Hessian as qwix computes it: any multiple gives the same codes."""
  return {"hessian": stats.hessian}


def _error(x_TD: jax.Array, w_DF: jax.Array, made_DF: jax.Array) -> float:
  product = lambda w: jnp.matmul(x_TD, w, precision="highest")
  wrong, right = product(made_DF - w_DF), product(w_DF)
  return float(jnp.linalg.norm(wrong) / jnp.linalg.norm(right))


def _timed(run: Callable[[], Any]) -> tuple[Any, float, float]:
  """What `run` returns, and the seconds of a first and a second call."""
  found = []
  for _ in range(2):
    start = time.perf_counter()
    made = jax.block_until_ready(run())
    found.append(time.perf_counter() - start)
  return made, *found


def _packaged() -> Problem:
  """A matrix in the middle of the packaged model, and real text before it."""
  opened = sources.open_source(MODEL)
  params = opened.load("float32", None, "dp")
  model, flat = layers.unstack(opened.model, params)
  length = 512
  config = data_config.DataConfig(
    corpus="stdlib",
    tokenizer="model",
    vocab_size=opened.tokenizer.vocab_size,
    sequence_length=length,
    batch_size=2 * _TOKENS // length,
  )
  batches = pipeline.open_data(config, tokenizer=opened.tokenizer).train_iterator()
  batch = next(batches)
  batches.close()
  parts = blocks.Blocks(model)
  halves = [
    parts.embed(flat, {k: v[rows] for k, v in batch.items()})
    for rows in (slice(None, _TOKENS // length), slice(_TOKENS // length, None))
  ]
  for k in range(_LAYER):
    own = flat[f"layer_{k}"]
    halves = [blocks.run(parts.layer(k), own, half) for half in halves]
  layer, own = parts.layer(_LAYER), flat[f"layer_{_LAYER}"]
  found = blocks.observe(layer, own, {}, halves[0], ("hessian",), (_MATRIX,))
  first, second = _MATRIX.split("/")
  stats = calibrate.finished(found)[first][second]
  x_TD = _inputs(layer, own, halves[1])
  w_DF = own[first][second]
  about = (
    f"layer {_LAYER}, {_MATRIX}, of {MODEL} {list(w_DF.shape)}, {_TOKENS:,} tokens of "
    "Python's standard library; the package holds it in 4 bits (Q4_1, groups of 32), "
    "and groups of 64 do not follow that grid"
  )
  return Problem(w_DF, stats, x_TD, about)


def _inputs(layer: blocks.Layer, params: Any, stream: blocks.Stream) -> jax.Array:
  """What flows into the matrix, one row a token."""
  used = []
  with blocks.watching((_MATRIX,), used):
    layer.observed(params, {}, stream)
  return used[0][1].reshape(-1, used[0][1].shape[-1])


def _random() -> Problem:
  keys = jax.random.split(jax.random.key(0), 3)
  w_DF = 0.02 * jax.random.normal(keys[0], (64, 16))
  mixing = jax.random.normal(keys[1], (64, 64)) / 8
  x_TD = jax.random.normal(keys[2], (512, 64)) @ mixing
  rows = x_TD[:256]
  stats = calibrate.InputStats(
    square_sum=jnp.sum(rows**2, 0),
    absmax=jnp.max(jnp.abs(rows), 0),
    count=jnp.float32(len(rows)),
    hessian=rows.T @ rows,
  )
  return Problem(w_DF, stats, x_TD[256:], "a small random matrix")


def _products(quick: bool) -> timing.Table:
  """A product of rows with a matrix, in float32 and in int8."""
  in_dim, out_dim = (64, 96) if quick else (1024, 2816)
  rounds, calls = (2, 2) if quick else (7, 20)
  rng = np.random.default_rng(0)
  w_DF = jnp.asarray(rng.normal(size=(in_dim, out_dim)) * 0.02, jnp.float32)
  fmt = base.FormatOptions(bits=8, activations="int8").build()
  x = base.split(w_DF, in_dim)
  grid = fmt.fit(x, fmt.outer(x))
  leaf = fmt.leaf(base.merge(fmt.encode(x, grid)), grid)
  rows = []
  for tokens in (1, 16, 128):
    x_TD = jnp.asarray(rng.normal(size=(tokens, in_dim)), jnp.float32)
    runs = {
      "float32": jax.jit(lambda x, w=w_DF: verbs.contract(x, w)),
      "int8": jax.jit(lambda x, w=leaf: verbs.contract(x, w)),
    }
    took = _interleaved(runs, x_TD, rounds, calls)
    rows.append(
      {
        "rows": tokens,
        "float32 us": 1e6 * took["float32"],
        "int8 us": 1e6 * took["int8"],
        "times as fast": took["float32"] / took["int8"],
      }
    )
  return timing.Table(
    title=f"a product with [{in_dim}, {out_dim}]: int8 beside float32",
    rows=rows,
    notes=[
      "activations are float32 and quantized in the time measured, one scale a row",
      "the least of several turns, float32 and int8 one after the other in each",
      f"device: {jax.devices()[0].device_kind}",
    ],
  )


def _interleaved(
  runs: Mapping[str, Callable[[jax.Array], jax.Array]],
  x: jax.Array,
  rounds: int,
  calls: int,
) -> dict[str, float]:
  """Seconds a call: the least of `rounds` turns of each."""
  least = dict.fromkeys(runs, float("inf"))
  for run in runs.values():
    jax.block_until_ready(run(x))
  for _ in range(rounds):
    for name, run in runs.items():
      start = time.perf_counter()
      for _ in range(calls):
        made = run(x)
      jax.block_until_ready(made)
      least[name] = min(least[name], (time.perf_counter() - start) / calls)
  return least


TECHNIQUE = bench
