"""The network, its data, and training of several seeds in one program.

MLP 784-300-100-10 with ReLU. The two hidden matrices may be sparse; the readout (1,000
of 266,200 weights) stays dense, as in the experiments of RigL and SET on such networks.
Every array has an axis of seeds in front; seeds differ in initialization, order of the
data and masks, and methods share all three.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn

from effjax.core import specs as specs_lib
from effjax.data.builders import fashion_mnist
from effjax.optim import config as optim_config
from effjax.optim import sparse
from effjax.weights import verbs
from effjax.weights import weight as weight_lib

VALIDATION = 5_000


class Mlp(nn.Module):
  """ReLU layers and a linear readout.

  Attributes:
    sizes: of the input, the hidden layers and the output.
  """

  sizes: tuple[int, ...] = (784, 300, 100, 10)

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Images `[B, pixels]` to logits `[B, classes]`."""
    last = len(self.sizes) - 2
    for i, (fan_in, fan_out) in enumerate(
      zip(self.sizes, self.sizes[1:], strict=False)
    ):
      name = "readout" if i == last else f"hidden_{i}"
      axes = ("pixels" if i == 0 else f"units_{i - 1}", f"units_{i}")
      make = functools.partial(weight_lib.weight, self)
      w = make(name, nn.initializers.he_normal(), (fan_in, fan_out), axes=axes)
      zeros = nn.initializers.zeros_init()
      b = make(f"{name}_bias", zeros, (fan_out,), axes=axes[1:], kind="bias")
      x = verbs.contract(x, w) + verbs.dense(b)[None]
      x = x if i == last else nn.relu(x)
    return x

  @nn.nowrap
  def example_inputs(self) -> tuple[jax.Array, ...]:
    """One image."""
    return (jnp.zeros((1, self.sizes[0])),)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Split:
  """Images `[n, pixels]`, uint8, and labels `[n]`, int32; a pytree."""

  images: jax.Array
  labels: jax.Array


def fashion() -> dict[str, Split]:
  """Fashion-MNIST; the last 5,000 training images are held out for choices."""
  corpus = fashion_mnist.TECHNIQUE.open({}, None)
  arrays = {}
  for name, source in corpus.sources.items():
    records = [source[i] for i in range(len(source))]
    images = np.stack([record["image"].reshape(-1) for record in records])
    labels = np.array([record["label"] for record in records], np.int32)
    arrays[name] = images, labels
  images, labels = arrays["train"]
  parts = {
    "train": (images[:-VALIDATION], labels[:-VALIDATION]),
    "validation": (images[-VALIDATION:], labels[-VALIDATION:]),
    "test": arrays["validation"],
  }
  return {name: Split(*map(jnp.asarray, part)) for name, part in parts.items()}


@dataclasses.dataclass(frozen=True)
class Plan:
  """What all methods have in common.

  Attributes:
    num_steps: optimizer steps of a training.
    every: steps of a block; topologies change between blocks.
    batch_size: images a step.
    num_seeds: trainings in one program.
    sizes: of the network.
  """

  num_steps: int = 4_000
  every: int = 100
  batch_size: int = 128
  num_seeds: int = 5
  sizes: tuple[int, ...] = (784, 300, 100, 10)


class Network:
  """Compiled blocks of training at one learning rate."""

  def __init__(self, plan: Plan, data: Mapping[str, Split], learning_rate: float):
    self.plan, self.data = plan, data
    self.model = Mlp(plan.sizes)
    self.specs = specs_lib.specs(self.model)
    config = optim_config.OptimizerConfig(
      name="sgd", learning_rate=learning_rate, clip_norm=None
    )
    self._tx, _ = optim_config.build(config, self.specs, plan.num_steps)
    self._block = jax.jit(self._run_block, donate_argnums=(0, 1))
    self._gradient = jax.jit(self._dense_gradient)
    self._right = jax.jit(jax.vmap(self._num_right, in_axes=(0, None)))

  @property
  def shapes(self) -> dict[str, tuple[int, int]]:
    """Of the matrices that may be sparse."""
    return {
      path: spec.shape
      for path, spec in self.specs.items()
      if spec.kind == "matrix" and path != "readout"
    }

  def keys(self, purpose: int) -> jax.Array:
    """A random key for each seed."""
    make = lambda seed: jax.random.fold_in(jax.random.key(seed), purpose)
    return jax.vmap(make)(jnp.arange(self.plan.num_seeds))

  def init(self, purpose: int = 0) -> tuple[Any, Any]:
    """Fresh parameters and optimizer states."""
    init = lambda key: self.model.init(key, *self.model.example_inputs())["params"]
    params = jax.vmap(init)(self.keys(purpose))
    return params, jax.vmap(self._tx.init)(params)

  def train(
    self,
    params: Any,
    opt_state: Any,
    masks: Mapping[str, jax.Array],
    *,
    start: int = 0,
    stop: int | None = None,
    revise: Callable[..., dict[str, jax.Array] | None] | None = None,
  ) -> tuple[Any, Any, dict[str, jax.Array]]:
    """Trains from step `start` to `stop`; the given arrays are used up.

    Args:
      params, opt_state: as `init` makes them.
      masks: of the matrices that are sparse, `{}` for a dense training.
      start, stop: whole blocks; by default the whole training.
      revise: `revise(step, weights, masks, gradient) -> masks`, asked after each block
        but the last; None leaves masks as they are. `gradient()` is dense, of a batch
        of its own. What goes becomes 0 with its momentum.

    Returns:
      Parameters, optimizer states and masks.
    """
    train = self.data["train"]
    every, stop = self.plan.every, self.plan.num_steps if stop is None else stop
    number = self.plan.num_seeds
    whole = {p: jnp.ones((number, *shape), bool) for p, shape in self.shapes.items()}
    masks = whole | dict(masks)
    params, opt_state = _apply(params, opt_state, masks)
    for step in range(start, stop, every):
      params, opt_state = self._block(params, opt_state, masks, step, train)
      after = step + every
      if revise is None or after == self.plan.num_steps:
        continue
      weights = {path: params[path] for path in masks}
      gradient = functools.partial(self._gradient, params, after, train)
      new = revise(after, weights, masks, gradient)
      if new is not None:
        masks = new
        params, opt_state = _apply(params, opt_state, masks)
    return params, opt_state, masks

  def accuracy(self, params: Any, split: str) -> np.ndarray:
    """Share that is classified right, by seed."""
    data = self.data[split]
    return np.asarray(self._right(params, data)) / len(data.labels)

  def _loss(self, params: Any, x: jax.Array, labels: jax.Array) -> jax.Array:
    logits = self.model.apply({"params": params}, x)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

  def _batch(self, key: jax.Array, data: Split) -> tuple[jax.Array, jax.Array]:
    shape = (self.plan.batch_size,)
    ids = jax.random.randint(key, shape, 0, len(data.labels))
    return _pixels(data.images[ids]), data.labels[ids]

  def _run_block(self, params, opt_state, masks, start, data):
    def one(params, opt_state, masks, key):
      gradients = jax.grad(self._loss)(params, *self._batch(key, data))
      updates, opt_state = self._tx.update(
        gradients | _masked(masks, gradients), opt_state, params
      )
      return optax.apply_updates(params, updates), opt_state

    def body(carry, step):
      keys = jax.vmap(jax.random.fold_in, in_axes=(0, None))(self.keys(1), step)
      return jax.vmap(one)(*carry, masks, keys), None

    steps = start + jnp.arange(self.plan.every)
    return jax.lax.scan(body, (params, opt_state), steps)[0]

  def _dense_gradient(self, params, step, data):
    one = lambda params, key: jax.grad(self._loss)(params, *self._batch(key, data))
    keys = jax.vmap(jax.random.fold_in, in_axes=(0, None))(self.keys(2), step)
    return jax.vmap(one)(params, keys)

  def _num_right(self, params, data):
    logits = self.model.apply({"params": params}, _pixels(data.images))
    return jnp.sum(jnp.argmax(logits, axis=-1) == data.labels)


def _pixels(images: jax.Array) -> jax.Array:
  return images.astype(jnp.float32) / 255


def _masked(masks, arrays):
  return {path: jnp.where(mask, arrays[path], 0) for path, mask in masks.items()}


@jax.jit
def _apply(params, opt_state, masks):
  return params | _masked(masks, params), sparse.forgotten(opt_state, masks)
