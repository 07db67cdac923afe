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

from effjax.cli import one_matrix, timing
from effjax.weights import verbs
from effjax.weights.formats import base

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
  Cell("gptq", "int4", _int(4, 64, static_groups=True)),
  Cell("awq", "int4", _int(4, 64)),
  Cell("awq", "int3", _int(3, 64)),
  Cell("rtn", "int8", _int(8, activations="int8")),
  Cell("smoothquant", "int8", _int(8, activations="int8")),
)

# Of these, those that show that all of it works.
QUICK = (*CELLS[:11:5], CELLS[-4], CELLS[-1])


def bench(quick: bool = False) -> list[timing.Table]:
  """Both tables.

  Args:
    quick: a small random matrix, to see that it works; the numbers mean nothing.
  """
  return [_errors(quick), _products(quick)]


def _errors(quick: bool) -> timing.Table:
  problem = one_matrix.random() if quick else one_matrix.packaged()
  peer = None
  notes = [
    problem.about,
    "error: of outputs, root of the mean square over that of the outputs, on tokens "
    "that nothing was calibrated on; of awq and smoothquant with the norm before the "
    "matrix, which gives the scales",
    "secs: the first call, with compiling, and the second; of awq with the search over "
    "the output of the whole layer, which there is one over the weights",
  ]
  if importlib.util.find_spec(PEER) is None:
    notes.append(f"left out: {PEER}, which is not installed; pip install '.[oracle]'")
  else:
    peer = importlib.import_module("effjax.cli.peers.qwix_methods")
    notes.append(
      f"{PEER} {peer.VERSION}, its methods called on the matrix as its transforms of a "
      "tree call them: not compiled as a whole; its scales are float32, too, and its "
      "rotation takes powers of two only, which no matrix of this model has"
    )
  return timing.Table(
    title="one matrix quantized: error and time of the algorithm",
    rows=[_row(cell, problem, peer) for cell in (QUICK if quick else CELLS)],
    notes=notes,
  )


def _row(cell: Cell, problem: one_matrix.Problem, peer: Any) -> dict[str, Any]:
  if cell.std is not None:
    problem = problem.scaled(float(cell.std / jnp.std(problem.w_DF)))
  in_dim = len(problem.w_DF)
  group = (
    one_matrix.rounding_options(cell.method, cell.options).build().group_of(in_dim)
  )
  symmetric = bool(cell.options.get("symmetric", True))
  activations = cell.options.get("activations")
  made, *secs = _timed(lambda: one_matrix.ours(cell.method, problem, cell.options))
  row = {
    "method": cell.method,
    "format": cell.format
    + ("" if symmetric else " + zero")
    + ("" if activations is None else f", activations {activations}")
    + (", grids fitted before" if cell.options.get("static_groups") else "")
    + ("" if cell.std is None else f", weights of std {cell.std:g}"),
    "group": "all" if group == in_dim else str(group),
    "bits/weight": 8 * made.held_bytes / problem.w_DF.size,
    "error": _error(problem, made),
    "secs": secs[0],
    "secs again": secs[1],
  }
  there = {f"{PEER} error": None, f"{PEER} secs": None, f"{PEER} again": None}
  if peer is not None:
    how = peer.how(cell.format, 0 if group == in_dim else group, symmetric)
    rows = None if activations is None else peer.rows(activations)
    made, *secs = _timed(lambda: peer.METHODS[cell.method](problem, how, rows))
    there = dict(zip(there, (_error(problem, made), *secs), strict=True))
  return row | there


def _error(problem: one_matrix.Problem, made: one_matrix.Made) -> float:
  with jax.default_matmul_precision("highest"):
    right = problem.x_TD @ problem.w_DF
    wrong = made.product(problem.x_TD) - right
  return float(jnp.linalg.norm(wrong) / jnp.linalg.norm(right))


def _timed(
  run: Callable[[], one_matrix.Made],
) -> tuple[one_matrix.Made, float, float]:
  """What `run` returns, and the seconds of a first and a second call."""
  found = []
  for _ in range(2):
    start = time.perf_counter()
    made = run()
    jax.block_until_ready(made.arrays)
    found.append(time.perf_counter() - start)
  return made, *found


def _products(quick: bool) -> timing.Table:
  """A product of rows with a matrix, in float32 and in int8."""
  in_dim, out_dim = (64, 96) if quick else (1024, 2816)
  rounds, calls = (2, 2) if quick else (40, 20)
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
    took = timing.interleaved(runs, x_TD, rounds, calls)
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


TECHNIQUE = bench
