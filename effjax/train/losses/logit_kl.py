"""Distillation of a teacher's next-token distribution, mixed with cross entropy.

Source: Hinton et al. 2015, arXiv:1503.02531, section 2. With student logits z, teacher
logits v and temperature T, of each target

    alpha * T^2 * KL(softmax(v / T) || softmax(z / T)) + (1 - alpha) * cross entropy

in nats. T^2 keeps the size of the gradient, which is T (q - p) for probabilities q of
the student and p of the teacher, independent of T. With the full-precision model as the
teacher of its quantized copy this is quantization-aware distillation (for language
models: Liu et al. 2023, arXiv:2305.17888, section 2.2, which has alpha = 1 and T = 1).
Deviation: KL in place of Hinton's cross entropy between the two; they differ by the
teacher's entropy, which has no gradient, and the KL of equal models is 0.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from effjax.core import config
from effjax.train.losses import base, cross_entropy


@dataclasses.dataclass(frozen=True, kw_only=True)
class LogitKLOptions:
  """Options of the distillation of logits.

  Attributes:
    temperature: T, by which both logits are divided.
    alpha: the share of the distillation, from 0 (cross entropy alone) to 1 (the
      teacher alone).
    chunk: tokens whose logits exist at once, of student and teacher, where both models
      can hand their output head over; 0 for the whole batch.
  """

  temperature: float = 1.0
  alpha: float = 0.5
  chunk: int = 1024

  def __post_init__(self):
    config.require(
      self.temperature > 0, f"temperature={self.temperature} must be positive"
    )
    config.require(0 <= self.alpha <= 1, f"alpha={self.alpha} must be from 0 to 1")
    config.require(self.chunk >= 0, f"chunk={self.chunk} must not be negative")


def logit_kl(options: LogitKLOptions) -> base.LossFn:
  """The loss function; see losses.base for its contract.

  Metrics are the two parts, `kl` (with its factor T^2) and `cross_entropy`. What
  modules write to `losses` is added to their mix.
  """

  def loss_fn(
    model: nn.Module,
    variables: Mapping[str, Any],
    batch: Mapping[str, jax.Array],
    rng: jax.Array,
    *,
    teacher: base.Teacher,
  ) -> base.Loss:
    weights_BL = batch["weights"].astype(jnp.float32)
    rows = {"targets": batch["targets"], "weights": weights_BL}
    kwargs = {}
    models = (model, teacher.model)
    if options.chunk and all(getattr(m, "has_readout", False) for m in models):
      x_BLD, head_fn, head = teacher.apply(batch, readout=lambda *parts: parts)
      rows["teacher"] = x_BLD
      to_logits = lambda x: head_fn(x, head)
      token_sum = functools.partial(_sums, options, to_logits)
      kwargs["readout"] = lambda x_BLD, head_fn, head: cross_entropy.sums_over_chunks(
        token_sum, head_fn, x_BLD, head, rows, options.chunk
      )
    else:
      rows["teacher"] = teacher.apply(batch)
    (output, _), written = model.apply(
      variables,
      batch["inputs"],
      positions=batch.get("positions"),
      segments=batch.get("segments"),
      rngs={"dropout": rng},
      mutable=list(base.WRITTEN),
      **kwargs,
    )
    sums = output if kwargs else _sums(options, lambda logits: logits, output, rows)
    objective, kl, nll = sums
    weight = jnp.sum(weights_BL)
    metrics = {k: v * weight for k, v in base.logged(written).items()}
    metrics |= {"kl": kl, "cross_entropy": nll}
    if written.get("losses"):
      extra = base.auxiliary(written) * weight
      objective = objective + extra
      metrics["auxiliary_loss"] = extra
    state = {"state": written["state"]} if "state" in written else {}
    return base.Loss(objective, weight, metrics, state)

  return loss_fn


def _sums(options, to_logits, logits, rows):
  """The mix, the divergence and the cross entropy of some tokens, each summed."""
  taught = to_logits(rows["teacher"])
  config.require(
    taught.shape == logits.shape,
    f"the teacher gives {taught.shape[-1]} logits a token, the student "
    f"{logits.shape[-1]}: both need the same vocabulary",
  )
  kl = jnp.sum(kl_of(logits, taught, options.temperature) * rows["weights"])
  nll = cross_entropy.nll_of(logits, rows["targets"])
  nll = jnp.sum(nll * rows["weights"])
  return options.alpha * kl + (1 - options.alpha) * nll, kl, nll


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def kl_of(student: jax.Array, teacher: jax.Array, temperature: float) -> jax.Array:
  """`T^2 KL(teacher || student)` of each token, float32.

  Args:
    student: logits `[..., V]`, any floating dtype; the softmax is in float32.
    teacher: the same; gets no gradient.
    temperature: T.
  """
  return _kl_forward(student, teacher, temperature)[0]


def _kl_forward(student, teacher, temperature):
  log_q = _log_softmax(student, temperature)
  log_p = _log_softmax(teacher, temperature)
  # Where the teacher is certain that a token is not next, 0 * log 0 counts as 0.
  terms = jnp.exp(log_p) * jnp.where(log_p > -jnp.inf, log_p - log_q, 0)
  return temperature**2 * jnp.sum(terms, axis=-1), (student, teacher)


def _kl_backward(temperature, residuals, cotangent):
  student, teacher = residuals
  apart = jnp.exp(_log_softmax(student, temperature)) - jnp.exp(
    _log_softmax(teacher, temperature)
  )
  gradient = temperature * apart * cotangent[..., None]
  return gradient.astype(student.dtype), jnp.zeros_like(teacher)


kl_of.defvjp(_kl_forward, _kl_backward)


def _log_softmax(logits: jax.Array, temperature: float) -> jax.Array:
  return jax.nn.log_softmax(logits.astype(jnp.float32) / temperature, axis=-1)


TECHNIQUE = base.LossTechnique(logit_kl, LogitKLOptions, needs_teacher=True)
