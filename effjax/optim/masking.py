"""Training a pruned model without waking what was pruned."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from effjax.core import tree as tree_lib


class KeepMasksState(NamedTuple):
  """The masks (bool arrays, `None` where nothing is pruned) and the inner state."""

  masks: Any
  inner: Any


def keep_masks(
  masks: Mapping[str, Any], inner: optax.GradientTransformation | None = None
) -> optax.GradientTransformation:
  """Runs `inner` on the weights that remain; all others get an update of exactly zero.

  Parameters stay plain arrays with exact zeros, and these stay exact zeros. Gradients
  are masked before `inner` too: what was pruned is no part of the model, so it counts
  neither in a clipping norm, nor in Adafactor's means, nor in Muon's matrices. `inner`
  must be the whole chain, weight decay and learning rate included.

  Args:
    masks: the parameters' structure; a bool array (True: the weight remains) of the
      parameter's shape, or `None` where nothing is pruned.
    inner: the optimizer; by default updates are only masked.

  Returns:
    A transformation that holds a copy of the masks in its state, so they are saved,
    restored and sharded like the parameters they belong to.
  """
  inner = optax.identity() if inner is None else inner

  def init_fn(params):
    return KeepMasksState(_own(masks, params), inner.init(params))

  def update_fn(updates, state, params=None):
    updates = _apply(state.masks, updates)
    updates, inner_state = inner.update(updates, state.inner, params)
    updates = _apply(state.masks, updates)
    return updates, KeepMasksState(state.masks, inner_state)

  return optax.GradientTransformation(init_fn, update_fn)


def _own(masks: Mapping[str, Any], params: Mapping[str, Any]) -> dict[str, Any]:
  """Copies of the masks of the parameters that are there, with their shapes checked."""

  def own(path, param, mask):
    if param is None or mask is None:
      return None
    if mask.shape != param.shape:
      raise ValueError(
        f"the mask of {path} has shape {mask.shape}, the parameter {param.shape}"
      )
    # A copy, because a training step that donates its state would delete the caller's.
    return jnp.array(mask, dtype=bool, copy=True)

  return tree_lib.map_leaves(own, params, masks)


def _apply(masks: Any, updates: Any) -> Any:
  def keep(update, mask):
    if mask is None:
      return update
    return jnp.where(mask, update, jnp.zeros_like(update))

  return jax.tree.map(keep, updates, masks)
