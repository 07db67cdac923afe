"""Rotation: the same model in a basis that has no outlier channels.

Source: QuaRot (Ashkboos et al. 2024, arXiv:2404.00456, section 4), with the randomized
Hadamard matrices of QuIP# (Tseng et al. 2024, arXiv:2402.04396); where none is known, a
random orthogonal matrix. Four steps, each of which leaves the function as it is:

1. The scale of every RMS norm of the residual stream goes into the matrices that read
   it, `W <- diag(s) W`; without a scale such a norm does not mind rotations.
2. The stream is rotated, `x <- x Q`: what writes it becomes `W Q` (embeddings and
   biases too), what reads it `Q^T W`. It costs nothing while running.
3. The values of attention are rotated a head at a time, in the matrix of the values and
   the one that reads them. Nothing while running, either.
4. The hidden units of MLPs come out of a nonlinearity; they are rotated while running,
   by a leaf `Rotated` over a matrix that is rotated once. So is what `online` names.

The specs say who reads and writes, so any mixer and MLP is rotated as its weights
declare; what cannot be is refused by name. A tied model needs an output head of its own
for step 1, since the embedding would have to be scaled on one side only: it is tied no
longer then, and holds V D more numbers, which the table of results counts.

Deviations: queries, keys and a cache of them are not rotated (the paper does for
quantized caches), nor values a second time across heads, unless `online` names what
reads them; a size without a Hadamard matrix is rotated while running in the largest
blocks that have one, and the log says so.
"""

import dataclasses
import logging
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from effjax.compress import merged
from effjax.compress.equivalent import _stream, _turns
from effjax.core import config, errors, technique
from effjax.core import tree as tree_lib
from effjax.ops.matmul import hadamard
from effjax.weights import leaf as leaf_lib
from effjax.weights.leaves import rotated

log = logging.getLogger(__name__)

_HEAD = "head"


@dataclasses.dataclass(frozen=True, kw_only=True)
class RotationOptions:
  """Options of rotation.

  `where` chooses among values and inputs; the stream is one and is rotated whole.

  Attributes:
    stream: whether the residual stream is rotated, and norm scales folded for it.
    heads: whether values are rotated, a head at a time.
    down: whether the inputs of matrices that read the hidden units of an MLP are
      rotated while running.
    online: regular expression of the paths of further matrices whose inputs are, such
      as the output projections of gated mixers.
    untie: whether a tied head becomes one of its own; without it the scale of the last
      norm must be 1 already.
    seed: of the random signs.
  """

  stream: bool = True
  heads: bool = True
  down: bool = True
  online: str = ""
  untie: bool = True
  seed: int = 0

  def __post_init__(self):
    config.require(
      bool(self.stream or self.heads or self.down or self.online),
      "rotation with stream, heads, down and online all off does nothing",
    )
    try:
      re.compile(self.online)
    except re.error as error:
      raise errors.InputError(
        f"online={self.online!r} is not a regular expression: {error}"
      ) from None


def rotate(
  model: Any,
  params: Mapping[str, Any],
  specs: Mapping[str, Any],
  batches: Sequence[Any],
  paths: Collection[str],
  options: RotationOptions,
) -> tuple[Any, dict[str, Any]]:
  """The model in another basis; see the file.

  Args:
    model: a decoder, scanned or not.
    params: its parameters, plain wherever they are rotated.
    specs: their specs.
    batches: not needed.
    paths: of the selected matrices.
    options: of the stage.

  Raises:
    InputError: the model is an encoder, a parameter is not plain or cannot be rotated,
      or the selection leaves out a part of the stream.
  """
  del batches
  found = _find(model, specs, paths, options)
  before = tree_lib.flatten(params)
  if found.stream is not None and found.stream.unread and not options.untie:
    scale = np.asarray(jax.device_get(before[found.stream.unread]))
    config.require(
      bool((scale == 1).all()),
      f"{found.stream.unread} is not 1 and cannot go into a tied embedding; use "
      "untie=True",
    )
  model, after = _outcome(model, before, found, options)
  _tell(before, after, found)
  return model, tree_lib.unflatten(after)


def outcome(
  model: Any,
  params: Mapping[str, Any],
  specs: Mapping[str, Any],
  paths: Collection[str],
  options: RotationOptions,
) -> tuple[Any, dict[str, Any]]:
  """What `rotate` makes, of ShapeDtypeStructs."""
  found = _find(model, specs, paths, options)
  models = []

  def made(flat: dict[str, Any]) -> dict[str, Any]:
    changed, after = _outcome(model, flat, found, options)
    models.append(changed)
    return after

  shapes = jax.eval_shape(made, tree_lib.flatten(params))
  return models[-1], tree_lib.unflatten(shapes)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Found:
  """What is to be rotated, by path.

  Attributes:
    specs: path to spec.
    stream: the residual stream, or None.
    values: matrices of values, and those that read them.
    online: matrices whose inputs are rotated while running.
  """

  specs: dict[str, Any]
  stream: _stream.Stream | None
  values: dict[str, tuple[str, ...]]
  online: tuple[str, ...]


def _find(
  model: Any,
  specs: Mapping[str, Any],
  paths: Collection[str],
  options: RotationOptions,
) -> _Found:
  """Finds out what is to be done; raises InputError for what cannot be."""
  flat = {p: s for p, s in tree_lib.flatten(specs).items() if s is not None}
  architecture = getattr(model.config, "architecture", None)
  config.require(
    architecture == "decoder",
    f"rotation takes decoders, whose norms stand before each branch; this is "
    f"{architecture or 'no decoder'}",
  )
  stream = None
  if options.stream:
    stream = _stream.find(flat, model.config.tie_embeddings)
    touched = (*stream.readers, *stream.writers)
    left_out = [p for p in touched if flat[p].kind == "matrix" and p not in paths]
    config.require(
      not left_out,
      f"where leaves out {next(iter(left_out), None)}, but the residual stream is "
      "rotated whole; leave where away, or use stream=False",
    )
  values: dict[str, tuple[str, ...]] = {}
  if options.heads:
    pairs = _stream.value_pairs(flat).items()
    values = {v: o for v, o in pairs if v in paths and paths >= set(o)}
  down = _stream.from_hidden(flat) if options.down else ()
  online = [p for p in down if p in paths]
  if options.online:
    more = [p for p in sorted(paths) if re.search(options.online, p)]
    config.require(
      bool(more), f"online={options.online!r} is found in no path of the selection"
    )
    odd = [p for p in more if flat[p].kind != "matrix"]
    config.require(
      not odd, f"online={options.online!r}: {odd[:1]} is no matrix; name matrices only"
    )
    online += more
  return _Found(
    specs=flat, stream=stream, values=values, online=tuple(dict.fromkeys(online))
  )


def _outcome(
  model: Any, before: Mapping[str, Any], found: _Found, options: RotationOptions
) -> tuple[Any, dict[str, Any]]:
  """All four steps, one parameter after the other."""
  flat = dict(before)
  _require_plain(flat, found)
  if found.stream is not None:
    if found.stream.unread and options.untie:
      changed = dataclasses.replace(model.config, tie_embeddings=False)
      model = model.clone(config=changed)
      flat[_HEAD] = jnp.swapaxes(flat[found.stream.table], -1, -2)
    readers = _fold(flat, found.stream)
    width = model.config.embed_dim
    turn = _turns.make(options.seed, width, "the residual stream")
    for path in readers:
      flat[path] = _turns.inputs(turn, flat[path])
    for path in found.stream.writers:
      flat[path] = _turns.outputs(turn, flat[path])
  sizes = sorted({found.specs[path].head_dim for path in found.values})
  turns = {size: _turns.make(options.seed, size, "the values") for size in sizes}
  for values, readers in found.values.items():
    turn = turns[found.specs[values].head_dim]
    for path in (values, _stream.bias_of(values, found.specs)):
      if path is not None:
        flat[path] = _turns.outputs(turn, flat[path])
    for path in readers:
      flat[path] = _turns.inputs(turn, flat[path])
  for path in found.online:
    block = hadamard.largest_block(flat[path].shape[-2])
    flat[path] = _rotated(flat[path], block)
  return model, flat


def _fold(flat: dict[str, Any], stream: _stream.Stream) -> tuple[str, ...]:
  """Scales of norms into their readers; returns all readers."""
  readers = stream.readers
  for scale, paths in stream.norms.items():
    if scale == stream.unread:
      if _HEAD not in flat:
        continue  # Tied as before: the scale is 1.
      paths = (_HEAD,)
      readers = (*readers, _HEAD)
    for path in paths:
      flat[path] = _scaled(flat[path], flat[scale])
    flat[scale] = jnp.ones_like(flat[scale])
  return readers


@jax.jit
def _scaled(w: jax.Array, scale: jax.Array) -> jax.Array:
  """`diag(s) W`, for `[*stack, D]` and `[*stack, ..., D, F]`."""
  extra = w.ndim - scale.ndim - 1
  shape = (*scale.shape[:-1], *(1,) * extra, scale.shape[-1], 1)
  wide = jnp.promote_types(w.dtype, jnp.float32)
  return (w.astype(wide) * scale.astype(wide).reshape(shape)).astype(w.dtype)


def _rotated(w: jax.Array, block: int) -> rotated.Rotated:
  with jax.default_matmul_precision("highest"):
    return rotated.Rotated.create(w, block)


def _require_plain(flat: Mapping[str, Any], found: _Found) -> None:
  """Raises InputError if something that is to be rotated is not an array."""
  touched = {*found.online, *found.values, *sum(found.values.values(), ())}
  if found.stream is not None:
    touched |= {*found.stream.readers, *found.stream.writers, *found.stream.norms}
  for path in sorted(touched):
    merged.require("rotation", path, flat[path])
    if leaf_lib.is_leaf_kind(flat[path]):
      raise errors.InputError(
        f"{path} is already a {flat[path].kind} leaf; rotation needs plain weights: "
        "put it before the stage that made it"
      )


def _tell(before: Mapping[str, Any], after: Mapping[str, Any], found: _Found) -> None:
  """Logs what was done, and how far the largest weights stand out."""
  for path in found.online:
    size, block = after[path].shape[-2], after[path].block
    if block != size:
      log.warning(
        "rotation: no Hadamard matrix of order %d is known for the inputs of %s; they "
        "are rotated in blocks of %d",
        size,
        path,
        block,
      )
  values = lambda leaf: leaf.values if isinstance(leaf, rotated.Rotated) else leaf
  changed = [
    path
    for path, spec in found.specs.items()
    if spec.kind == "matrix" and after[path] is not before[path]
  ]
  peaks = [
    max(float(_peak(values(flat[path]))) for path in changed) if changed else 0.0
    for flat in (before, after)
  ]
  log.info(
    "rotation: %s, %d matrices of values by heads, %d of inputs while running; largest "
    "|w| over root mean square of a matrix %.1f before, %.1f after",
    "the residual stream" if found.stream else "no residual stream",
    len(found.values),
    len(found.online),
    *peaks,
  )


@jax.jit
def _peak(w: jax.Array) -> jax.Array:
  """The largest `max |w| / rms(w)` of stacked matrices."""
  mean_square = jnp.mean(jnp.square(w.astype(jnp.float32)), axis=(-2, -1))
  largest = jnp.max(jnp.abs(w.astype(jnp.float32)), axis=(-2, -1))
  return jnp.max(largest * jax.lax.rsqrt(jnp.maximum(mean_square, 1e-30)))


TECHNIQUE = technique.ModelTransform(
  fn=rotate, options_cls=RotationOptions, equivalent=True, outcome=outcome
)
