"""Compressing real models: cells, the text they are judged on, and a table of pairs.

SmolLM2 on State of the Union addresses, by the loss of 16 windows of 512 tokens; MiniLM
on sentences of film reviews, by how far its embeddings turn. Every cell is judged on
the same text, so differences come with an interval of paired differences. Calibration
reads training text only: addresses before 2010, and other sentences.
"""

import argparse
import dataclasses
import json
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.stats

from effjax.compress import api as compress
from effjax.compress import registry as transforms
from effjax.core import specs as specs_lib
from effjax.core import tree as tree_lib
from effjax.data import config as data_config
from effjax.data import pipeline
from effjax.data.tasks import base as tasks
from effjax.infer import embed
from effjax.interop import sources
from effjax.measure import bytes as bytes_lib

WINDOWS, LENGTH = 16, 512
CALIBRATION_TOKENS, SEARCH_TOKENS = 16_384, 2_048
SENTENCES, CALIBRATION_SENTENCES = 512, 512
# Of calibration text, one after the other; of sentences there is one.
DRAWS = 3


@dataclasses.dataclass(frozen=True)
class Cell:
  """One way to compress all matrices of a model.

  Attributes:
    name: of the row.
    steps: transforms in their order, each with its options and where.
    beside: the cells it is compared with, beside the original.
    draw: which of the subject's draws of calibration it sees.
  """

  name: str
  steps: tuple[tuple[Any, ...], ...]
  beside: tuple[str, ...] = ()
  draw: int = 0


def main(
  about: str,
  models: Sequence[tuple[str, Sequence[Cell], Sequence[Cell], Callable[[], Any]]],
) -> None:
  """Prints a line of JSON a cell, and the tables.

  Args:
    about: the program's description.
    models: name, cells, cells that run only by name, and what makes the subject.
  """
  parser = argparse.ArgumentParser(description=about)
  names = [model[0] for model in models]
  parser.add_argument("--only", choices=names, help="one model")
  parser.add_argument("--cells", nargs="*", default=(), help="only these cells")
  args = parser.parse_args()
  models = [model for model in models if args.only in (None, model[0])]
  known = {c.name for _, cells, more, _ in models for c in (*cells, *more)}
  if unknown := sorted(set(args.cells) - known):
    parser.error(f"no such cells: {', '.join(unknown)}; there are {sorted(known)}")
  for name, cells, more, subject in models:
    chosen = list(cells)
    if args.cells:
      chosen = [c for c in (*cells, *more) if c.name in args.cells]
    if chosen:
      print(table(name, chosen, subject()), flush=True)


def table(name: str, cells: list[Cell], subject: Any) -> str:
  """Runs the cells of one model; the table in Markdown."""
  model, params = subject.model, subject.params
  original = subject.losses(model, params)
  total = num_weights(model)
  found, bits, secs = {"original": original}, {"original": 32.0}, {}
  for cell in cells:
    start = time.perf_counter()
    made, new = compressed(cell, model, params, subject)
    secs[cell.name] = time.perf_counter() - start
    found[cell.name] = subject.losses(made, new)
    bits[cell.name] = matrix_bits(made, new, total)
    print(
      json.dumps(
        {
          "model": name,
          "cell": cell.name,
          "mean": float(found[cell.name].mean()),
          "bits": bits[cell.name],
          "secs": secs[cell.name],
        }
      ),
      flush=True,
    )
  lines = [
    f"| {name} | bits/weight | {subject.measure} | beside | difference | s |",
    "| --- | ---: | ---: | --- | ---: | ---: |",
    f"| original | 32 | {original.mean():.4f} | | | |",
  ]
  for cell in cells:
    for k, other in enumerate(("original", *cell.beside)):
      if other not in found:
        continue
      what, width, mean, took = cell.name, f"{bits[cell.name]:.2f}", "", ""
      if k == 0:
        mean, took = f"{found[cell.name].mean():.4f}", f"{secs[cell.name]:.0f}"
      else:
        what, width = "", ""
      gap = interval(found[cell.name] - found[other])
      lines.append(f"| {what} | {width} | {mean} | {other} | {gap} | {took} |")
  return "\n".join(lines)


def compressed(cell: Cell, model: Any, params: Any, subject: Any) -> tuple[Any, Any]:
  """A model after the steps of a cell."""
  for name, options, *where in cell.steps:
    change = transforms.find(name)
    batches = ()
    if compress.needs_batches(change, change.options(dict(options))):
      batches = subject.draws[cell.draw]
      batches = batches[: subject.search if name == "awq" else None]
    specs = specs_lib.specs(model)
    model, params = compress.transform(
      change, model, params, specs, batches, options=options, where=(*where, None)[0]
    )
  return model, jax.block_until_ready(params)


def num_weights(model: Any) -> int:
  """Weights of the matrices."""
  specs = tree_lib.flatten(specs_lib.specs(model)).values()
  return sum(spec.size for spec in specs if spec.kind == "matrix")


def matrix_bits(model: Any, params: Any, total: int) -> float:
  """Bits held for each of the `total` weights that the matrices had at first."""
  specs, leaves = map(tree_lib.flatten, (specs_lib.specs(model), params))
  chosen = {p: leaf for p, leaf in leaves.items() if specs[p].kind == "matrix"}
  return 8 * bytes_lib.held_bytes(chosen) / total


def interval(differences: np.ndarray) -> str:
  """The mean difference and its 95 % interval, by Student's t."""
  half = scipy.stats.t.ppf(0.975, len(differences) - 1) * scipy.stats.sem(differences)
  return f"{differences.mean():+.4f} ± {half:.4f}"


class Language:
  """SmolLM2, scored by its loss."""

  measure = "loss, nats a token"

  def __init__(self):
    opened = sources.open_source("smollm2")
    self.model, self.params = opened.model, opened.load("float32", None, "dp")
    config = data_config.DataConfig(
      corpus="sotu",
      tokenizer="model",
      vocab_size=opened.tokenizer.vocab_size,
      sequence_length=LENGTH,
      batch_size=4,
      eval_context=LENGTH,
      eval_stride=LENGTH,
      eval_bytes=80_000,
    )
    data = pipeline.open_data(config, tokenizer=opened.tokenizer)
    iterator = data.train_iterator()
    number = CALIBRATION_TOKENS // (4 * LENGTH)
    self.draws = tuple(
      tuple(dict(next(iterator)) for _ in range(number)) for _ in range(DRAWS)
    )
    iterator.close()
    self.search = SEARCH_TOKENS // (4 * LENGTH)
    # Whole windows of text that no other window holds.
    rows = [row for row in data.eval_set.windows() if row["weights"].all()]
    self.rows = rows[:WINDOWS]
    assert len(self.rows) == WINDOWS, len(self.rows)
    self._score = jax.jit(self._losses, static_argnums=0)

  @staticmethod
  def _losses(model: Any, params: Any, batch: Mapping[str, jax.Array]) -> jax.Array:
    logits, _ = model.apply({"params": params}, batch["inputs"])
    nll = (
      jax.nn.logsumexp(logits, -1)
      - jnp.take_along_axis(logits, batch["targets"][..., None], -1)[..., 0]
    )
    return nll.mean(-1)

  def losses(self, model: Any, params: Any) -> np.ndarray:
    """Mean loss of each window."""
    found = []
    for start in range(0, WINDOWS, 4):
      rows = self.rows[start : start + 4]
      batch = {n: jnp.asarray(np.stack([r[n] for r in rows])) for n in rows[0]}
      found.append(np.asarray(self._score(model, params, batch)))
    return np.concatenate(found)


class Sentences:
  """MiniLM, by the angle between an embedding and the original's."""

  measure = "1 - cosine with the original"

  def __init__(self):
    opened = sources.open_source("minilm")
    self.model, self.params = opened.model, opened.load("float32", None, "dp")
    self._tokenizer = opened.tokenizer
    examples = tasks.find("movie_sentences").examples(seed=0, manual_dir=None)
    texts = list(dict.fromkeys(example.text for example in examples))
    self._texts = texts[:SENTENCES]
    other = texts[SENTENCES : SENTENCES + CALIBRATION_SENTENCES]
    self.draws = (tuple(self._padded(other[k : k + 64]) for k in range(0, 512, 64)),)
    self.search = 2
    self._original = self._embedded(self.model, self.params)

  def _padded(self, texts: list[str]) -> dict[str, np.ndarray]:
    ids = [self._tokenizer.encode(text)[:64] for text in texts]
    inputs, segments = np.zeros((2, len(ids), 64), np.int32)
    for row, found in enumerate(ids):
      inputs[row, : len(found)], segments[row, : len(found)] = found, 1
    return {"inputs": inputs, "segments": segments}

  def _embedded(self, model: Any, params: Any) -> np.ndarray:
    return embed.embed(model, params, self._tokenizer, self._texts, 32)

  def losses(self, model: Any, params: Any) -> np.ndarray:
    """Of each sentence."""
    return 1 - np.sum(self._embedded(model, params) * self._original, axis=-1)
