"""Training under masks that change: what every kind of sparse training shares.

Parameters stay plain arrays with exact zeros; masks live in the optimizer state. Each
kind is a `Rule`: which weights are there at first, when that changes, and to what. This
module wraps an optimizer so that it sees and steps only the weights that are there.
"""

import dataclasses
import math
import zlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from effjax.core import tree as tree_lib
from effjax.ops.sparsity import amounts

Arrays = Mapping[str, jax.Array]
Due = Callable[[jax.Array], jax.Array]


class SparseState(NamedTuple):
  """State of an optimizer under changing masks; dicts go by path of the parameter.

  Attributes:
    count: updates done, int32; those that only change masks count.
    masks: bool, of each chosen parameter's shape.
    scores: what a rule adds up of each weight, float32; or `{}`.
    held: last values of weights that are not there, for rules that bring them back.
    key_data: of the random key that masks are drawn with.
    sparsity: share of the chosen weights that is not there, float32.
    inner: state of the optimizer.
  """

  count: jax.Array
  masks: dict[str, jax.Array]
  scores: dict[str, jax.Array]
  held: dict[str, jax.Array]
  key_data: jax.Array
  sparsity: jax.Array
  inner: Any


class Now(NamedTuple):
  """What a rule knows when masks change.

  Attributes:
    count: number of this update, from 1; for a rule that lets no optimizer step in it,
      updates done before.
    masks: those so far.
    weights: values after the step, also of weights that are not there, if held.
    gradients: dense.
    scores: those added up, this update's included.
    key: random key of this update.
  """

  count: jax.Array
  masks: Arrays
  weights: Arrays
  gradients: Arrays
  scores: Arrays
  key: jax.Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rule:
  """A kind of sparse training.

  Attributes:
    start: `start(weights, key) -> masks` at initialization.
    revise: `revise(now) -> masks`; None where masks never change.
    due: `due(count)`, whether update `count` (see Now) changes masks.
    steps: whether the optimizer steps in such an update.
    score: `score(weight, gradient)`, added up in every update; None for no scores.
    holds: whether weights keep their value while they are not there; else new ones
      are 0.
  """

  start: Callable[[Arrays, jax.Array], dict[str, jax.Array]]
  revise: Callable[[Now], dict[str, jax.Array]] | None = None
  due: Due | None = None
  steps: bool = True
  score: Callable[[jax.Array, jax.Array], jax.Array] | None = None
  holds: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Target:
  """What is made sparse, and how far.

  Attributes:
    shapes: of each chosen parameter, `[*stack, I, O]`.
    shares: of each matrix of it that is not there in the end, in [0, 1).
  """

  shapes: Mapping[str, tuple[int, ...]]
  shares: Mapping[str, float]

  def matrix_size(self, path: str) -> int:
    """Places in one matrix of a parameter."""
    return math.prod(self.shapes[path][-2:])

  def num_kept(self, path: str) -> int:
    """Weights that each matrix of a parameter has in the end."""
    return amounts.number_kept(self.matrix_size(path), self.shares[path])


def wrap(
  inner: optax.GradientTransformation, target: Target, rule: Rule, key: jax.Array
) -> optax.GradientTransformation:
  """Runs `inner` on the weights that are there; all others are exactly zero.

  Gradients are masked before `inner`, which must be the whole chain. Of weights that go
  every moment in the state of `inner` (any array with the path and shape of the
  parameter) becomes zero and stays so, hence new weights start without moments. `init`
  leaves parameters as they are: `masked_params` zeroes what is not there; the first
  update would do so too.

  Args:
    inner: the optimizer.
    target: the parameters; they must be arrays.
    rule: the kind of sparse training.
    key: random key of the masks.
  """
  chosen = lambda tree: _chosen(tree, target.shapes)

  def init_fn(params):
    weights = chosen(params)
    masks = rule.start(weights, jax.random.fold_in(key, 0))
    zeros = lambda wanted: {p: jnp.zeros_like(w) for p, w in weights.items() if wanted}
    return SparseState(
      count=jnp.int32(0),
      masks=masks,
      scores=zeros(rule.score is not None),
      held={p: jnp.where(masks[p], 0, w) for p, w in weights.items() if rule.holds},
      key_data=jnp.array(jax.random.key_data(key), copy=True),
      sparsity=_sparsity(masks),
      inner=inner.init(params),
    )

  def update_fn(updates, state, params=None):
    if params is None:
      raise ValueError("update needs the parameters: tx.update(updates, state, params)")
    gradients, weights = chosen(updates), chosen(params)
    scores = state.scores
    if rule.score is not None:
      last = _last_values(state, weights)
      scores = {p: s + rule.score(last[p], gradients[p]) for p, s in scores.items()}
      state = state._replace(scores=scores)

    def step():
      masked = _replaced(updates, _masked(state.masks, gradients))
      stepped, inner_state = inner.update(masked, state.inner, params)
      cast = lambda u, g: u.astype(g.dtype)
      return jax.tree.map(cast, stepped, updates), inner_state

    def settle(stepped, inner_state):
      return _settled(stepped, state.masks, weights), state._replace(inner=inner_state)

    def revise(stepped, inner_state):
      moves = _masked(state.masks, chosen(stepped))
      now = Now(
        count=state.count + rule.steps,
        masks=state.masks,
        weights={p: w + moves[p] for p, w in _last_values(state, weights).items()},
        gradients=gradients,
        scores=scores,
        key=jax.random.fold_in(_key(state), state.count + 1),
      )
      masks = rule.revise(now)
      back = {p: moves[p] + h for p, h in state.held.items()} if rule.holds else moves
      moved = _settled(_replaced(stepped, back), masks, weights)
      return moved, state._replace(
        masks=masks,
        held={p: jnp.where(masks[p], 0, now.weights[p]) for p in state.held},
        sparsity=_sparsity(masks),
        inner=forgotten(inner_state, masks),
      )

    if rule.revise is None:
      moved, state = settle(*step())
    elif rule.steps:
      due, stepped = rule.due(state.count + 1), step()
      moved, state = jax.lax.cond(due, revise, settle, *stepped)
    else:
      nothing = jax.tree.map(jnp.zeros_like, updates)
      moved, state = jax.lax.cond(
        rule.due(state.count),
        lambda: revise(nothing, state.inner),
        lambda: settle(*step()),
      )
    return moved, state._replace(count=state.count + 1)

  return optax.GradientTransformation(init_fn, update_fn)


def find(opt_state: Any) -> SparseState | None:
  """The state of sparse training inside that of an optimizer, if there is any."""
  is_sparse = lambda x: isinstance(x, SparseState)
  found = [x for x in jax.tree.leaves(opt_state, is_leaf=is_sparse) if is_sparse(x)]
  return found[0] if found else None


def masked_params(params: Mapping[str, Any], opt_state: Any) -> dict[str, Any]:
  """Parameters with exact zeros where the masks of an optimizer state say so."""
  state = find(opt_state)
  if state is None:
    return dict(params)
  return _replaced(params, _masked(state.masks, _chosen(params, state.masks)))


def path_key(key: jax.Array, path: str) -> jax.Array:
  """A random key of a parameter's own."""
  return jax.random.fold_in(key, zlib.crc32(path.encode()))


def _key(state: SparseState) -> jax.Array:
  return jax.random.wrap_key_data(state.key_data)


def _chosen(tree: Any, paths: Mapping[str, Any]) -> dict[str, jax.Array]:
  flat = tree_lib.flatten(tree)
  return {path: flat[path] for path in paths}


def _replaced(tree: Any, arrays: Arrays) -> dict[str, Any]:
  return tree_lib.unflatten(tree_lib.flatten(tree) | arrays)


def _masked(masks: Arrays, arrays: Arrays) -> dict[str, jax.Array]:
  return {p: jnp.where(masks[p], a, jnp.zeros_like(a)) for p, a in arrays.items()}


def _last_values(state: SparseState, weights: Arrays) -> dict[str, jax.Array]:
  """Weights with what is held of those that are not there, else 0."""
  return {
    path: jnp.where(state.masks[path], w, state.held.get(path, 0.0))
    for path, w in weights.items()
  }


def _settled(updates: Any, masks: Arrays, weights: Arrays) -> dict[str, Any]:
  """Updates after which what is not there is exactly zero."""
  flat = tree_lib.flatten(updates)
  # p + (-p) is 0 in every float format.
  new = {p: jnp.where(m, flat[p], -weights[p]) for p, m in masks.items()}
  return _replaced(updates, new)


def forgotten(inner_state: Any, masks: Arrays) -> Any:
  """The optimizer's state with zero moments of what is not there."""

  def forget(path: tuple[Any, ...], array: Any) -> Any:
    names = [str(key.key) for key in path if isinstance(key, jax.tree_util.DictKey)]
    for start in range(len(names)):
      mask = masks.get("/".join(names[start:]))
      if mask is not None and mask.shape == jnp.shape(array):
        return jnp.where(mask, array, jnp.zeros_like(array))
    return array

  return jax.tree_util.tree_map_with_path(forget, inner_state)


def _sparsity(masks: Arrays) -> jax.Array:
  total = sum(mask.size for mask in masks.values())
  counts = [jnp.sum(mask, dtype=jnp.int32) for mask in masks.values()]
  return 1 - sum(count.astype(jnp.float32) for count in counts) / jnp.float32(total)
