"""How much worse a model gets when one of its matrices is changed, estimated.

A unit is one matrix of one layer (the experts of a layer are one), and dW its change:

| method     | estimate                            | what it is                       |
|------------|-------------------------------------|----------------------------------|
| "gradient" | 1/2 sum_i F_i dW_i^2                | rise of the loss, nats a token   |
| "hessian"  | 1/2 tr(H) / n ||dW||^2, n weights   | rise of the loss, nats a token   |
| "output"   | tr(dW^T X^T X dW) / tokens          | squared error of a unit's output |

The first two are second-order Taylor terms of the mean cross entropy of the next
token, with no terms between units; the first-order term is left out, as at a minimum.
"gradient" has the diagonal of the empirical Fisher information in place of the Hessian,
as pruning by Theis et al. 2018, arXiv:1801.05787. "hessian" is HAWQ-V2 (Dong et al.
2020, arXiv:1911.03852): the mean trace of each unit's block, by Hutchinson's estimator.
Deviation: a probe is drawn for all units at once; what stands between units has mean
zero and only adds noise. "output" needs no labels and no gradients, but errors of
different layers count the same, however much the model makes of them.
"""

import contextlib
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from effjax.compress import calibrate
from effjax.core import config, errors, layers
from effjax.core import tree as tree_lib
from effjax.models import encoder
from effjax.weights import verbs

METHODS = ("gradient", "hessian", "output")
_TRACED_LENGTH = 256
Batch = Mapping[str, Any]
# Arrays by the path of a parameter.
Flat = dict[str, jax.Array]


def estimate(
  method: str,
  score: jax.Array,
  change: jax.Array,
  *,
  stacked: bool = False,
  transposed: bool = False,
) -> jax.Array:
  """The estimate of each unit of one parameter, a float32 scalar, or `[layers]`.

  Args:
    method: one of METHODS.
    score: of the parameter, from `fisher`, `hessian_traces` or `output_hessians`.
    change: dW, of the shape of the parameter.
    stacked: the first axis is one of layers, each a unit.
    transposed: the parameter is an embedding `[V, D]`, whose inputs are its last axis.
  """
  axes = tuple(range(int(stacked), change.ndim))
  change = change.astype(jnp.float32)
  if method == "gradient":
    return 0.5 * jnp.sum(score * jnp.square(change), axis=axes)
  if method == "hessian":
    return 0.5 * score * jnp.mean(jnp.square(change), axis=axes)
  if method == "output":
    change_IO = jnp.swapaxes(change, -1, -2) if transposed else change
    pulled_IO = jnp.matmul(score, change_IO, precision=jax.lax.Precision.HIGHEST)
    return jnp.sum(change_IO * pulled_IO, axis=axes)
  raise errors.unknown("sensitivity", method, METHODS)


def fisher(
  model: Any,
  params: Mapping[str, Any],
  batches: Iterable[Batch],
  paths: Collection[str],
) -> Flat:
  """The diagonal of the empirical Fisher information of one token.

  Each row gives one gradient, of its summed loss; the squares are summed over rows and
  divided by the number of targets. If the gradients of a row's tokens are independent
  with mean zero, this is their mean square. Memory: two float32 copies of the selected
  parameters, whatever the number of rows.

  Args:
    model: a decoder.
    params: its parameters; a selected one of another leaf kind stands for its values.
    batches: dicts as calibration takes them, with "targets" and "weights" or without
      (see `with_targets`).
    paths: of the selected parameters.

  Returns:
    Float32 arrays of the shapes of the parameters, in nats squared.

  Raises:
    InputError: the model is no decoder, there are no batches or targets, or a result is
      not finite.
  """
  require_decoder(model)
  selected = _opened(params, paths)

  def add(selected: Flat, params: Any, sums: Flat, batch: Batch) -> tuple[Flat, Any]:
    def row(sums: Flat, one: Batch) -> tuple[Flat, jax.Array]:
      one = jax.tree.map(lambda a: a[None], one)
      loss = lambda selected: _summed_nll(model, params, selected, one)
      gradient, weight = jax.grad(loss, has_aux=True)(selected)
      squares = {p: jnp.square(g.astype(jnp.float32)) for p, g in gradient.items()}
      return {p: sums[p] + squares[p] for p in sums}, weight

    sums, weights = jax.lax.scan(row, sums, batch)
    return sums, jnp.sum(weights)

  step = jax.jit(add, donate_argnums=2)
  sums = {path: jnp.zeros(w.shape, jnp.float32) for path, w in selected.items()}
  total = 0.0
  for batch in batches:
    sums, weight = step(selected, params, sums, with_targets(batch))
    total += float(weight)
  return _means(sums, total)


def hessian_traces(
  model: Any,
  params: Mapping[str, Any],
  batches: Iterable[Batch],
  paths: Collection[str],
  stacked: Collection[str] = (),
  *,
  probes: int = 8,
  seed: int = 0,
) -> Flat:
  """The trace of each unit's block of the Hessian of the mean loss, by Hutchinson.

  `tr(H) = E[v^T H v]` for v of independent signs; H v is the derivative of the gradient
  along v. Memory: a few gradients at once.

  Args:
    model, params, batches, paths: see `fisher`.
    stacked: paths whose first axis is one of layers, each with a trace of its own.
    probes: random v for each batch.
    seed: of the probes.

  Returns:
    Float32 scalars, or `[layers]`; estimates, which may be negative.

  Raises:
    InputError: see `fisher`; or an operation of the model has no second derivative.
  """
  require_decoder(model)
  config.require(probes > 0, f"probes={probes} must be positive")
  selected = _opened(params, paths)

  def add(
    selected: Flat, params: Any, sums: Flat, batch: Batch, key: jax.Array
  ) -> tuple[Flat, Any]:
    loss = lambda selected: _summed_nll(model, params, selected, batch, True)[0]

    def probe(sums: Flat, key: jax.Array) -> tuple[Flat, None]:
      keys = jax.random.split(key, len(selected))
      signs = {
        path: jax.random.rademacher(one, w.shape, w.dtype)
        for one, (path, w) in zip(keys, sorted(selected.items()), strict=True)
      }
      forms = quadratic_forms(loss, selected, signs, stacked)
      return {path: sums[path] + forms[path] for path in sums}, None

    sums, _ = jax.lax.scan(probe, sums, jax.random.split(key, probes))
    return sums, jnp.sum(batch["weights"])

  step = jax.jit(add, donate_argnums=2)
  sums = {
    path: jnp.zeros(w.shape[:1] if path in stacked else (), jnp.float32)
    for path, w in selected.items()
  }
  total = 0.0
  for i, batch in enumerate(batches):
    key = jax.random.fold_in(jax.random.key(seed), i)
    with _saying_if_there_is_no_hessian():
      sums, weight = step(selected, params, sums, with_targets(batch), key)
    total += float(weight)
  return {path: trace / probes for path, trace in _means(sums, total).items()}


def quadratic_forms(
  loss: Any, selected: Flat, vectors: Flat, stacked: Collection[str] = ()
) -> Flat:
  """`v^T H v` of each unit, where v has the given vectors in all units at once.

  Args:
    loss: scalar function of `selected`.
    selected, vectors: arrays of equal shapes.
    stacked: paths whose first axis is one of layers.
  """
  along = lambda selected: sum(
    jnp.vdot(gradient, vectors[path])
    for path, gradient in jax.grad(loss)(selected).items()
  )
  # Backward twice: what has a gradient of its own rarely has a forward derivative.
  products = jax.grad(along)(selected)
  forms = {}
  for path, product in products.items():
    axes = tuple(range(int(path in stacked), product.ndim))
    terms = product.astype(jnp.float32) * vectors[path].astype(jnp.float32)
    forms[path] = jnp.sum(terms, axis=axes)
  return forms


def output_hessians(
  stats: Mapping[str, Any], batches: Iterable[Batch], paths: Collection[str]
) -> Flat:
  """`X^T X / tokens` of the inputs of each selected parameter, `[*stack, in, in]`.

  Args:
    stats: from calibrate.calibrate with collect=("hessian",), over these batches.
    batches: to count their tokens; what an expert saw is part of all.
    paths: of the selected parameters.

  Raises:
    InputError: a parameter contracts no input, so it has no statistics.
  """
  found = tree_lib.flatten(stats)
  total = sum(float(jnp.sum(_segments(batch) > 0)) for batch in batches)
  config.require(total > 0, "there is no token in the batches")
  for path in sorted(paths):
    config.require(
      isinstance(found.get(path), calibrate.InputStats),
      f"{path}: no input is contracted with it, so its output has no error; leave it "
      "out with where, or use another sensitivity",
    )
  return {path: found[path].hessian / total for path in paths}


def check(
  method: str, model: Any, params: Mapping[str, Any], paths: Collection[str]
) -> None:
  """Raises InputError if a model has no "gradient" or "hessian"; nothing is computed.

  Args:
    method: one of METHODS; of "output" calibrate.abstract says as much.
    model, params, paths: see `fisher`; shapes will do.
  """
  if method == "output":
    return
  require_decoder(model)
  # Long enough for chunks of a recurrence: shorter rows have another program.
  length = min(_TRACED_LENGTH, model.config.max_len)
  batch = {"inputs": jnp.zeros((1, length), jnp.int32)}

  def derivatives(params: Any) -> Flat:
    twice = method == "hessian"
    targets = with_targets(batch)
    loss = lambda chosen: _summed_nll(model, params, chosen, targets, twice)[0]
    selected = _opened(params, paths)
    if twice:
      return quadratic_forms(loss, selected, selected)
    return jax.grad(loss)(selected)

  with _saying_if_there_is_no_hessian():
    jax.eval_shape(derivatives, params)


def require_decoder(model: Any) -> None:
  """Raises InputError unless the model predicts the next token."""
  config.require(
    not isinstance(model, encoder.Encoder),
    "an encoder has no loss of the next token; use sensitivity='output'",
  )


def with_targets(batch: Batch) -> dict[str, jax.Array]:
  """A batch with "targets" and "weights": its own, or the inputs shifted by one.

  Shifted, the last token of each segment has no target and the weight 0.
  """
  names = ("inputs", "positions", "segments", "targets", "weights")
  full = {name: jnp.asarray(batch[name]) for name in names if name in batch}
  segments_BL = _segments(batch)
  if "targets" in full:
    full.setdefault("weights", (segments_BL > 0).astype(jnp.float32))
    return full
  following = lambda a_BL: jnp.pad(a_BL[:, 1:], ((0, 0), (0, 1)))
  goes_on_BL = (segments_BL > 0) & (segments_BL == following(segments_BL))
  return full | {
    "targets": following(full["inputs"]),
    "weights": goes_on_BL.astype(jnp.float32),
  }


@contextlib.contextmanager
def _saying_if_there_is_no_hessian() -> Iterator[None]:
  """Turns JAX's error about what cannot be differentiated twice into an InputError."""
  try:
    yield
  except ValueError as error:
    if "Reverse-mode differentiation" not in str(error):
      raise
    raise errors.InputError(
      "an operation of this model (products of experts are one) can be differentiated "
      "only once, so there is no Hessian; use sensitivity='gradient'"
    ) from None


def _segments(batch: Batch) -> jax.Array:
  if "segments" in batch:
    return jnp.asarray(batch["segments"])
  return jnp.ones(jnp.shape(batch["inputs"]), jnp.int32)


def _opened(params: Mapping[str, Any], paths: Collection[str]) -> Flat:
  """The selected parameters as plain arrays."""
  flat = tree_lib.flatten(params)
  return {path: verbs.dense(flat[path]) for path in sorted(paths)}


def _summed_nll(
  model: Any,
  params: Mapping[str, Any],
  selected: Flat,
  batch: Batch,
  unrolled: bool = False,
) -> tuple[jax.Array, jax.Array]:
  """The summed cross entropy of a batch with targets, and the sum of their weights.

  With `unrolled` layers are not scanned: JAX 0.10 loses residuals of a gradient that is
  written out when it differentiates a scan twice.
  """
  merged = tree_lib.unflatten(tree_lib.flatten(params) | selected)
  if unrolled and isinstance(model, layers.Layered):
    model, merged = layers.unstack(model, merged)
  logits_BLV = model.apply(
    {"params": merged},
    batch["inputs"],
    positions=batch.get("positions"),
    segments=batch.get("segments"),
  )[0].astype(jnp.float32)
  hit_BL = jnp.take_along_axis(logits_BLV, batch["targets"][..., None], axis=-1)[..., 0]
  nll_BL = jax.nn.logsumexp(logits_BLV, axis=-1) - hit_BL
  weights_BL = batch["weights"].astype(jnp.float32)
  return jnp.sum(nll_BL * weights_BL), jnp.sum(weights_BL)


def _means(sums: Flat, total: float) -> Flat:
  """Sums divided by the number of targets, if there are any and all is finite."""
  config.require(total > 0, "there is no target in the batches, or no batch")
  for path, value in sums.items():
    config.require(
      bool(jnp.all(jnp.isfinite(value))),
      f"the derivatives by {path} are not finite on these batches",
    )
  return {path: value / total for path, value in sums.items()}
