"""A registered transform applied to a model, whichever shape it has.

What a technique needs of the model is gathered here, in one order or another, and what
claims to leave the function as it was is checked.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from effjax.compress import calibrate, sequential
from effjax.core import config, errors, precision, select, technique
from effjax.core import specs as specs_lib

AnyTransform = technique.Transform | technique.ModelTransform
ORDERS = ("one_shot", "sequential", "true_sequential")
# How far apart float32 logits may be, as a share of the largest (at least of 1).
TOLERANCE = 1e-4


@dataclasses.dataclass(frozen=True, kw_only=True)
class CalibrationConfig:
  """The text that a transform is calibrated on, and how.

  Attributes:
    num_tokens: of the training text, rounded up to whole batches.
    seed: of the order in which documents are read.
    order: "one_shot" gathers all statistics from the model as it is; "sequential" goes
      layer by layer, each seeing what the changed layers before it produce;
      "true_sequential" also within a layer. Transforms that run the model themselves
      have an order of their own.
  """

  num_tokens: int = 16_384
  seed: int = 0
  order: str = "one_shot"

  def __post_init__(self):
    config.require(
      self.num_tokens > 0, f"num_tokens={self.num_tokens} must be positive"
    )
    config.require(self.seed >= 0, f"seed={self.seed} must not be negative")
    if self.order not in ORDERS:
      raise errors.unknown("order of calibration", self.order, ORDERS)


def needs_batches(change: AnyTransform, options: Any) -> bool:
  """Whether a transform with these options cannot do without text."""
  if isinstance(change, technique.ModelTransform):
    return change.runs_on_text(options)
  return bool(change.collected(options))


def transform(
  change: AnyTransform,
  model: Any,
  params: Mapping[str, Any],
  specs: Mapping[str, Any],
  batches: Sequence[Mapping[str, Any]] = (),
  *,
  where: Any = None,
  options: Any = None,
  order: str = "one_shot",
) -> tuple[Any, dict[str, Any]]:
  """The model and its parameters after a transform.

  Args:
    change: the transform.
    model: a decoder or an encoder.
    params: its parameters (not changed).
    specs: tree of ParamSpecs of the same structure.
    batches: dicts of arrays, all of one shape (see calibrate.calibrate).
    where: which parameters (see core.select); None for the technique's default.
    options: the technique's options, or a mapping of their fields.
    order: one of ORDERS.

  Raises:
    InputError: bad options or an empty selection; no batches where they are needed;
      a transform that should have left the function as it was did not.
  """
  if order not in ORDERS:
    raise errors.unknown("order of calibration", order, ORDERS)
  if not isinstance(options, change.options_cls):
    options = change.options(options)
  where = select.parse(where, change.default_where)
  if needs_batches(change, options) and not batches:
    raise errors.InputError("calibration needs at least one batch")
  if isinstance(change, technique.ModelTransform):
    made = change(model, params, specs, batches, where=where, options=options)
  elif not change.collected(options):
    made = model, change(params, specs, None, where=where, options=options)
  elif order == "one_shot" or change.equivalent:
    # What leaves the function as it is finds the same inputs in every order.
    stats = calibrate.calibrate(
      model, params, batches, collect=change.collected(options), where=where
    )
    made = model, change(params, specs, stats, where=where, options=options)
  else:
    made = sequential.transform(
      change,
      model,
      params,
      batches,
      select.select(specs, where),
      options,
      true_sequential=order == "true_sequential",
    )
  if change.equivalent:
    require_equal((model, params), made, batches)
  return made


def shapes(
  change: AnyTransform,
  model: Any,
  params: Mapping[str, Any],
  specs: Mapping[str, Any],
  *,
  where: Any = None,
  options: Any = None,
  order: str = "one_shot",
) -> tuple[Any, dict[str, Any]]:
  """What `transform` would return, of ShapeDtypeStructs; nothing is computed.

  Args:
    change, model, specs, where, options, order: see `transform`.
    params: arrays or ShapeDtypeStructs.

  Raises:
    InputError: as `transform`, where shapes alone show it.
  """
  if isinstance(change, technique.ModelTransform):
    return change.shapes(model, params, specs, where=where, options=options)
  if not isinstance(options, change.options_cls):
    options = change.options(options)
  where = select.parse(where, change.default_where)
  stats, collect = None, change.collected(options)
  if collect:
    # In order of the layers only the statistics of one of them exist at a time.
    limit = {} if order == "one_shot" else {"limit_bytes": 2**63}
    stats = calibrate.abstract(model, params, collect=collect, where=where, **limit)
  changed = jax.eval_shape(
    lambda params, stats: change(params, specs, stats, where=where, options=options),
    params,
    stats,
  )
  return model, changed


def require_equal(
  before: tuple[Any, Mapping[str, Any]],
  after: tuple[Any, Mapping[str, Any]],
  batches: Sequence[Mapping[str, Any]] = (),
) -> None:
  """Checks that two models with parameters compute the same function, in float32.

  Args:
    before, after: model and parameters.
    batches: the first row of the first is what they are asked; random tokens if empty.

  Raises:
    InputError: outputs differ by more than TOLERANCE, or are not finite.
  """
  if batches:
    row = {name: jnp.asarray(rows[:1]) for name, rows in batches[0].items()}
  else:
    vocab, length = before[0].config.vocab_size, min(before[0].config.max_len, 64)
    tokens = np.random.default_rng(0).integers(vocab, size=(1, length))
    row = {"inputs": jnp.asarray(tokens, jnp.int32)}
  expected, got = (_outputs(*one, row) for one in (before, after))
  largest = max(1.0, float(np.max(np.abs(expected))))
  apart = float(np.max(np.abs(expected - got))) / largest
  if not apart <= TOLERANCE:
    raise errors.InputError(
      f"the transform changed what the model computes: float32 outputs are {apart:.2g} "
      f"of the largest apart, allowed are {TOLERANCE:g}; values too large for float32, "
      "or a layer that it cannot handle"
    )


def _outputs(
  model: Any, params: Mapping[str, Any], row: Mapping[str, Any]
) -> np.ndarray:
  exact = precision.PrecisionConfig(matmul="highest")
  model = model.clone(precision=exact)
  with exact.context():
    output, _ = jax.jit(model.apply)(
      {"params": params},
      row["inputs"],
      positions=row.get("positions"),
      segments=row.get("segments"),
    )
  return np.asarray(output, np.float32)


def specs_of(model: Any, made: Any, specs: Mapping[str, Any]) -> Mapping[str, Any]:
  """The specs of the parameters of `made`, which came of `model` with `specs`."""
  return specs if made is model else specs_lib.specs(made)
