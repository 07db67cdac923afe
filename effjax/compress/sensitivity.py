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

from collections.abc import Collection, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from effjax.compress import calibrate, derivatives
from effjax.core import config, errors
from effjax.core import tree as tree_lib

METHODS = ("gradient", "hessian", "output")
_TRACED_LENGTH = 256
Batch = derivatives.Batch
Flat = derivatives.Flat


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
    score: of the parameter, from derivatives.fisher, derivatives.hessian_traces or
      `output_hessians`.
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
  total = sum(float(jnp.sum(derivatives.segments(batch) > 0)) for batch in batches)
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
    model, params, paths: see derivatives.fisher; shapes will do.
  """
  if method == "output":
    return
  derivatives.require_decoder(model)
  # Long enough for chunks of a recurrence: shorter rows have another program.
  length = min(_TRACED_LENGTH, model.config.max_len)
  batch = {"inputs": jnp.zeros((1, length), jnp.int32)}

  def traced(params: Any) -> Flat:
    twice = method == "hessian"
    targets = derivatives.with_targets(batch)
    loss = lambda chosen: derivatives.summed_nll(model, params, chosen, targets, twice)[
      0
    ]
    selected = derivatives.opened(params, paths)
    if twice:
      return derivatives.quadratic_forms(loss, selected, selected)
    return jax.grad(loss)(selected)

  with derivatives.saying_if_there_is_no_hessian():
    jax.eval_shape(traced, params)
