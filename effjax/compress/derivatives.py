"""Derivatives of a model's loss on text: gradients, Fisher information, Hessians.

All are of the mean cross entropy of the next token, by the weights of the selected
parameters, in float32; they stream over batches.
"""

import contextlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from effjax.core import config, errors, layers
from effjax.core import tree as tree_lib
from effjax.models import encoder
from effjax.weights import verbs

Batch = Mapping[str, Any]
# Arrays by the path of a parameter.
Flat = dict[str, jax.Array]


def fisher(
  model: Any,
  params: Mapping[str, Any],
  batches: Iterable[Batch],
  paths: Collection[str],
  *,
  probes: int = 0,
  seed: int = 0,
) -> Flat:
  """The diagonal of the Fisher information of one token.

  Each row gives one gradient, of its summed loss; the squares are summed over rows and
  divided by the number of targets. If the gradients of a row's tokens are independent
  with mean zero, this is their mean square. With the data's targets it is the empirical
  Fisher information; with targets drawn from the model it is the true one, which is the
  Gauss-Newton part of the Hessian (Martens 2020, arXiv:1412.1193, section 9), and the
  gradients of a row's tokens do have mean zero. Memory: two float32 copies of the
  selected parameters, whatever the number of rows.

  Args:
    model: a decoder.
    params: its parameters; a selected one of another leaf kind stands for its values.
    batches: dicts as calibration takes them, with "targets" and "weights" or without
      (see `with_targets`).
    paths: of the selected parameters.
    probes: how often targets are drawn from the model; 0 for those of the data.
    seed: of what is drawn.

  Returns:
    Float32 arrays of the shapes of the parameters, in nats squared.

  Raises:
    InputError: the model is no decoder, there are no batches or targets, or a result is
      not finite.
  """
  require_decoder(model)
  config.require(probes >= 0, f"probes={probes} must not be negative")
  selected = opened(params, paths)

  def add(
    selected: Flat, params: Any, sums: Flat, batch: Batch, key: jax.Array
  ) -> tuple[Flat, Any]:
    def row(sums: Flat, one_and_key: tuple[Batch, jax.Array]) -> tuple[Flat, jax.Array]:
      one, key = one_and_key
      one = jax.tree.map(lambda a: a[None], one)
      if probes:
        logits = logits_of(model, params, selected, one)
        one = one | {"targets": jax.random.categorical(key, logits)}
      loss = lambda selected: summed_nll(model, params, selected, one)
      gradient, weight = jax.grad(loss, has_aux=True)(selected)
      squares = {p: jnp.square(g.astype(jnp.float32)) for p, g in gradient.items()}
      return {p: sums[p] + squares[p] for p in sums}, weight

    keys = jax.random.split(key, len(batch["inputs"]))
    sums, weights = jax.lax.scan(row, sums, (batch, keys))
    return sums, jnp.sum(weights)

  step = jax.jit(add, donate_argnums=2)
  sums = {path: jnp.zeros(w.shape, jnp.float32) for path, w in selected.items()}
  total = 0.0
  for i, batch in enumerate(batches):
    full = with_targets(batch)
    for probe in range(max(probes, 1)):
      key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), i), probe)
      sums, weight = step(selected, params, sums, full, key)
      total += float(weight)
  return _means(sums, total)


def gradients(
  model: Any,
  params: Mapping[str, Any],
  batches: Iterable[Batch],
  paths: Collection[str],
) -> Flat:
  """The gradient of the mean loss of a token over all batches.

  Args:
    model, params, batches, paths: see `fisher`.

  Returns:
    Float32 arrays of the shapes of the parameters, in nats.

  Raises:
    InputError: see `fisher`.
  """
  require_decoder(model)
  selected = opened(params, paths)

  def add(selected: Flat, params: Any, sums: Flat, batch: Batch) -> tuple[Flat, Any]:
    loss = lambda selected: summed_nll(model, params, selected, batch)
    gradient, weight = jax.grad(loss, has_aux=True)(selected)
    return {p: sums[p] + g.astype(jnp.float32) for p, g in gradient.items()}, weight

  step = jax.jit(add, donate_argnums=2)
  sums = {path: jnp.zeros(w.shape, jnp.float32) for path, w in selected.items()}
  total = 0.0
  for batch in batches:
    sums, weight = step(selected, params, sums, with_targets(batch))
    total += float(weight)
  return _means(sums, total)


def gates(
  model: Any,
  params: Mapping[str, Any],
  batches: Iterable[Batch],
  paths: Collection[str],
  sums: Callable[[Flat], Flat],
) -> tuple[Flat, Flat]:
  """Derivatives of the loss by gates that multiply whole groups of weights.

  The derivative by a gate at 1 is the sum of gradient times weight over its group. Each
  row gives one, of its summed loss.

  Args:
    model, params, batches, paths: see `fisher`.
    sums: from products of the parameters' shapes, by path, to those of the gates; must
      be linear.

  Returns:
    Of each gate the mean derivative of a token, and the sum of squares over rows
    divided by the number of targets (see `fisher`); float32.

  Raises:
    InputError: see `fisher`.
  """
  require_decoder(model)
  selected = opened(params, paths)

  def of_row(selected: Flat, params: Any, one: Batch) -> tuple[Flat, jax.Array]:
    one = jax.tree.map(lambda a: a[None], one)
    loss = lambda selected: summed_nll(model, params, selected, one)
    gradient, weight = jax.grad(loss, has_aux=True)(selected)
    wide = {p: g.astype(jnp.float32) * selected[p] for p, g in gradient.items()}
    return sums(wide), weight

  def add(
    selected: Flat, params: Any, totals: tuple[Flat, Flat], batch: Batch
  ) -> tuple[tuple[Flat, Flat], jax.Array]:
    def row(
      totals: tuple[Flat, Flat], one: Batch
    ) -> tuple[tuple[Flat, Flat], jax.Array]:
      found, weight = of_row(selected, params, one)
      firsts, squares = totals
      firsts = {p: firsts[p] + g for p, g in found.items()}
      squares = {p: squares[p] + jnp.square(g) for p, g in found.items()}
      return (firsts, squares), weight

    totals, weights = jax.lax.scan(row, totals, batch)
    return totals, jnp.sum(weights)

  step = jax.jit(add, donate_argnums=2)
  shapes = jax.eval_shape(sums, selected)
  zeros = lambda: {p: jnp.zeros(a.shape, jnp.float32) for p, a in shapes.items()}
  totals, total = (zeros(), zeros()), 0.0
  for batch in batches:
    totals, weight = step(selected, params, totals, with_targets(batch))
    total += float(weight)
  firsts, squares = totals
  return _means(firsts, total), _means(squares, total)


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
  selected = opened(params, paths)

  def add(
    selected: Flat, params: Any, sums: Flat, batch: Batch, key: jax.Array
  ) -> tuple[Flat, Any]:
    loss = lambda selected: summed_nll(model, params, selected, batch, True)[0]

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
    with saying_if_there_is_no_hessian():
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


def require_decoder(model: Any) -> None:
  """Raises InputError unless the model predicts the next token."""
  config.require(
    not isinstance(model, encoder.Encoder),
    "an encoder has no loss of the next token, and no derivatives of it; use what goes "
    "by inputs (sensitivity='output'; wanda)",
  )


def with_targets(batch: Batch) -> dict[str, jax.Array]:
  """A batch with "targets" and "weights": its own, or the inputs shifted by one.

  Shifted, the last token of each segment has no target and the weight 0.
  """
  names = ("inputs", "positions", "segments", "targets", "weights")
  full = {name: jnp.asarray(batch[name]) for name in names if name in batch}
  segments_BL = segments(batch)
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
def saying_if_there_is_no_hessian() -> Iterator[None]:
  """Turns JAX's error about what cannot be differentiated twice into an InputError."""
  try:
    yield
  except ValueError as error:
    if "Reverse-mode differentiation" not in str(error):
      raise
    raise errors.InputError(
      "an operation of this model (products of experts are one) can be differentiated "
      "only once, so there is no Hessian; use what goes by gradients "
      "(sensitivity='gradient'; fisher)"
    ) from None


def segments(batch: Batch) -> jax.Array:
  """Segment ids [B, L] of a batch, 1 where it has none."""
  if "segments" in batch:
    return jnp.asarray(batch["segments"])
  return jnp.ones(jnp.shape(batch["inputs"]), jnp.int32)


def opened(params: Mapping[str, Any], paths: Collection[str]) -> Flat:
  """The selected parameters as plain arrays."""
  flat = tree_lib.flatten(params)
  return {path: verbs.dense(flat[path]) for path in sorted(paths)}


def logits_of(
  model: Any,
  params: Mapping[str, Any],
  selected: Flat,
  batch: Batch,
  unrolled: bool = False,
) -> jax.Array:
  """Logits [B, L, V] in float32, with `selected` in place of those parameters.

  With `unrolled` layers are not scanned: JAX 0.10 loses residuals of a gradient that is
  written out when it differentiates a scan twice.
  """
  merged = tree_lib.unflatten(tree_lib.flatten(params) | selected)
  if unrolled and isinstance(model, layers.Layered):
    model, merged = layers.unstack(model, merged)
  return model.apply(
    {"params": merged},
    batch["inputs"],
    positions=batch.get("positions"),
    segments=batch.get("segments"),
  )[0].astype(jnp.float32)


def summed_nll(
  model: Any,
  params: Mapping[str, Any],
  selected: Flat,
  batch: Batch,
  unrolled: bool = False,
) -> tuple[jax.Array, jax.Array]:
  """The summed cross entropy of a batch with targets, and the sum of their weights.

  Args:
    model, params, selected, batch, unrolled: see `logits_of`.
  """
  logits_BLV = logits_of(model, params, selected, batch, unrolled)
  weights_BL = batch["weights"].astype(jnp.float32)
  return nll_of_logits(logits_BLV, batch), jnp.sum(weights_BL)


def nll_of_logits(logits_BLV: jax.Array, batch: Batch) -> jax.Array:
  """The summed cross entropy of a batch with targets, by float32 logits."""
  hit_BL = jnp.take_along_axis(logits_BLV, batch["targets"][..., None], axis=-1)[..., 0]
  nll_BL = jax.nn.logsumexp(logits_BLV, axis=-1) - hit_BL
  weights_BL = batch["weights"].astype(jnp.float32)
  return jnp.sum(nll_BL * weights_BL)


def _means(sums: Flat, total: float) -> Flat:
  """Sums divided by the number of targets, if there are any and all is finite."""
  config.require(total > 0, "there is no target in the batches, or no batch")
  for path, value in sums.items():
    config.require(
      bool(jnp.all(jnp.isfinite(value))),
      f"the derivatives by {path} are not finite on these batches",
    )
  return {path: value / total for path, value in sums.items()}
