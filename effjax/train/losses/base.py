"""What a registered loss is, and what it returns."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from effjax.core import config

# Collections a module may write while it trains; "stats" belongs to calibration.
WRITTEN = ("losses", "metrics", "state")


class Loss(NamedTuple):
  """Sums over one (micro-)batch, so that accumulation is exact addition.

  Attributes:
    objective: what is differentiated: a sum over the targets, float32 scalar.
    weight: the sum of the targets' weights, float32 scalar.
    metrics: name to float32 scalar, each a sum like `objective`; the step divides all
      of them by the total weight.
    collections: `{"state": ...}` as the model left it, or `{}`.
  """

  objective: jax.Array
  weight: jax.Array
  metrics: dict[str, jax.Array]
  collections: dict[str, Any]


# loss_fn(model, variables, batch, rng); variables are {"params": ..., "state": ...}. A
# loss that needs a teacher gets it as the keyword `teacher`, in every call.
LossFn = Callable[..., Loss]


@dataclasses.dataclass(frozen=True)
class Teacher:
  """A model that is learned from and stays as it is.

  The train step passes its parameters as an argument of the compiled function: they
  are no constants of it, no part of the train state, and in no checkpoint.

  Attributes:
    model: Linen module; the step gives it the precision of the student.
    params: its parameters, of any leaf kinds, already placed.
  """

  model: nn.Module
  params: Any

  def apply(self, batch: Mapping[str, jax.Array], **kwargs: Any) -> Any:
    """The model's output for a batch, without noise and without gradients.

    Args:
      batch: see data.pipeline.
      **kwargs: more arguments of the model's call, such as `readout`.
    """
    params = jax.tree.map(jax.lax.stop_gradient, self.params)
    output, _ = self.model.apply(
      {"params": params},
      batch["inputs"],
      positions=batch.get("positions"),
      segments=batch.get("segments"),
      **kwargs,
    )
    return output


@dataclasses.dataclass(frozen=True)
class LossTechnique:
  """A loss the registry hands out.

  Attributes:
    make: `make(options) -> loss_fn`, see LossFn.
    options_cls: frozen dataclass of its options, every field with a default.
    needs_teacher: whether it learns from a teacher; else it takes none.
  """

  make: Callable[[Any], LossFn]
  options_cls: type
  needs_teacher: bool = False

  def options(self, values: Mapping[str, Any], path: str = "loss_options") -> Any:
    """Validated options; raises InputError with one line."""
    return config.build(self.options_cls, values, path)


def auxiliary(written: Mapping[str, Any]) -> jax.Array:
  """The sum of everything modules put into the collection `losses`."""
  terms = jax.tree.leaves(written.get("losses", {}))
  return sum((jnp.sum(t).astype(jnp.float32) for t in terms), jnp.float32(0))


def logged(written: Mapping[str, Any]) -> dict[str, jax.Array]:
  """Means over layers of what modules put into `metrics`, by the last name."""
  found: dict[str, list[jax.Array]] = {}
  flat, _ = jax.tree_util.tree_flatten_with_path(written.get("metrics", {}))
  for path, value in flat:
    names = [key.key for key in path if isinstance(key, jax.tree_util.DictKey)]
    found.setdefault(names[-1], []).append(jnp.ravel(value).astype(jnp.float32))
  return {name: jnp.mean(jnp.concatenate(values)) for name, values in found.items()}
