"""One matrix of a model with what flows into it, and what a quantizer makes of it.

A quantizer returns a `Made`: the product it puts in place of `x @ w`, and its bytes.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from effjax.compress import blocks, calibrate
from effjax.compress import registry as transforms
from effjax.compress.equivalent import awq
from effjax.core import layers, specs
from effjax.core import tree as tree_lib
from effjax.data import config as data_config
from effjax.data import pipeline
from effjax.interop import sources
from effjax.models import config as model_config
from effjax.models import decoder
from effjax.weights import verbs

MODEL, LAYER, MATRIX = "smollm2", 10, "mlp/up"
TOKENS, LENGTH = 2048, 512


@dataclasses.dataclass(frozen=True)
class Problem:
  """A matrix of a layer, and text before it.

  Attributes:
    name: of the layer.
    layer, params, specs: the layer, with the specs that the whole model gives it.
    flows: what flows into it and out of it of the tokens to calibrate on.
    stats: InputStats of its matrices over the same tokens, and of this one a Hessian.
    x_TD: inputs of this one for other tokens, to judge by.
    about: where it is from.
  """

  name: str
  layer: blocks.Layer
  params: Mapping[str, Any]
  specs: Mapping[str, Any]
  flows: tuple[blocks.Stream, blocks.Stream]
  stats: Mapping[str, calibrate.InputStats]
  x_TD: jax.Array
  about: str

  @property
  def w_DF(self) -> jax.Array:
    """The matrix."""
    return tree_lib.flatten(self.params)[MATRIX]

  @property
  def own(self) -> calibrate.InputStats:
    """The statistics of its inputs."""
    return self.stats[MATRIX]

  def scaled(self, factor: float) -> "Problem":
    """The same with the matrix times `factor`."""
    flat = tree_lib.flatten(self.params)
    params = tree_lib.unflatten(flat | {MATRIX: factor * flat[MATRIX]})
    return dataclasses.replace(self, params=params)


@dataclasses.dataclass(frozen=True)
class Made:
  """What a quantizer made of a matrix.

  Attributes:
    product: `[T, D]` to `[T, F]`, in place of a product with the matrix.
    held_bytes: of what is kept of the matrix, or None where that is not known.
    arrays: that it consists of, to wait for.
  """

  product: Callable[[jax.Array], jax.Array]
  held_bytes: int | None = None
  arrays: Any = ()


def rounding_options(method: str, given: Mapping[str, Any]) -> Any:
  """The options of the transform that rounds: the method, or what follows it."""
  return transforms.find("rtn" if method in _METHODS else method).options(dict(given))


def ours(method: str, problem: Problem, options: Mapping[str, Any]) -> Made:
  """A method of this library, with the options of a format."""
  return _METHODS.get(method, _transformed)(method, problem, options)


def _transformed(method: str, problem: Problem, options: Mapping[str, Any]) -> Made:
  """By a transform that makes leaves, of the matrix alone."""
  leaf = _leaf(method, problem.w_DF, problem.own, options)
  return Made(lambda x: verbs.contract(x, leaf), leaf.held_bytes(), leaf)


def _scaled(method: str, problem: Problem, options: Mapping[str, Any]) -> Made:
  """After a transform of the layer that scales what the matrix reads: a norm."""
  whole = lambda tree: {problem.name: tree}
  if method == "awq":
    config = transforms.find("awq").options(dict(options))
    new = awq.search_layer(
      *(problem.layer, problem.name, problem.params, whole(problem.specs)),
      *(problem.flows, frozenset((MATRIX,)), config),
    )
  else:
    smooth = transforms.find(method)
    new = smooth(
      whole(problem.params),
      whole(problem.specs),
      whole(tree_lib.unflatten(problem.stats)),
      where={"path": f"{MATRIX}$"},
    )[problem.name]
  before, after = tree_lib.flatten(problem.params), tree_lib.flatten(new)
  norm = tree_lib.flatten(problem.specs)[MATRIX].reads
  norm = f"{norm.removeprefix(problem.name + '/')}/scale"
  factors = before[norm] / after[norm]
  leaf = _leaf("rtn", after[MATRIX], None, options)
  return Made(
    lambda x: verbs.contract(x / factors[None], leaf),
    leaf.held_bytes(),
    (leaf, factors),
  )


_METHODS = {"awq": _scaled, "smoothquant": _scaled}


def _leaf(method: str, w: jax.Array, stats: Any, options: Mapping[str, Any]) -> Any:
  transform = transforms.find(method)
  spec = specs.ParamSpec(axes=("embed", "mlp"), kind="matrix", shape=w.shape)
  return transform(
    {"w": w},
    {"w": spec},
    None if stats is None else {"w": stats},
    options=transform.options(dict(options)),
  )["w"]


def packaged() -> Problem:
  """A matrix in the middle of the packaged model, and real text before it."""
  opened = sources.open_source(MODEL)
  params = opened.load("float32")
  config = data_config.DataConfig(
    corpus="stdlib",
    tokenizer="model",
    vocab_size=opened.tokenizer.vocab_size,
    sequence_length=LENGTH,
    batch_size=2 * TOKENS // LENGTH,
  )
  batches = pipeline.open_data(config, tokenizer=opened.tokenizer).train_iterator()
  batch = next(batches)
  batches.close()
  about = (
    f"layer {LAYER}, {MATRIX}, of {MODEL}, {TOKENS:,} tokens of Python's standard "
    "library; the package holds it in 4 bits (Q4_1, groups of 32), and groups of 64 do "
    "not follow that grid"
  )
  return of_model(opened.model, params, batch, LAYER, about)


def random() -> Problem:
  """A small model that was never trained."""
  config = model_config.DecoderConfig(
    vocab_size=64,
    embed_dim=64,
    num_layers=1,
    mixer_options={"attention": {"num_heads": 2, "num_kv_heads": 1, "head_dim": 32}},
  )
  model = decoder.Decoder(config)
  inputs = jax.random.randint(jax.random.key(1), (8, 64), 0, 64)
  params = model.init(jax.random.key(0), inputs)["params"]
  batch = {"inputs": inputs, "segments": jnp.ones_like(inputs)}
  return of_model(model, params, batch, 0, "a small random model")


def of_model(
  model: Any, params: Any, batch: Mapping[str, Any], index: int, about: str
) -> Problem:
  """The matrix of one layer; half of a batch to calibrate on, half to judge by."""
  model, flat = layers.unstack(model, params)
  name = f"layer_{index}"
  parts = blocks.Blocks(model)
  half = len(batch["inputs"]) // 2
  halves = [
    parts.embed(flat, {k: v[rows] for k, v in batch.items()})
    for rows in (slice(None, half), slice(half, None))
  ]
  for k in range(index):
    halves = [blocks.run(parts.layer(k), flat[f"layer_{k}"], each) for each in halves]
  layer, own = parts.layer(index), flat[name]
  about_layer = specs.specs(model)[name]
  matrices = {p for p, s in tree_lib.flatten(about_layer).items() if s.kind == "matrix"}
  stats = blocks.observe(layer, own, {}, halves[0], ("moments", "magnitudes"), matrices)
  told = tree_lib.flatten(calibrate.finished(stats))
  told |= tree_lib.flatten(
    calibrate.finished(
      blocks.observe(
        layer, own, {}, halves[0], ("moments", "magnitudes", "hessian"), {MATRIX}
      )
    )
  )
  used = []
  with blocks.watching((MATRIX,), used):
    layer.observed(own, {}, halves[1])
  x_TD = used[0][1].reshape(-1, used[0][1].shape[-1])
  flows = (halves[0], blocks.run(layer, own, halves[0]))
  shape = list(tree_lib.flatten(own)[MATRIX].shape)
  return Problem(name, layer, own, about_layer, flows, told, x_TD, f"{shape}, {about}")
