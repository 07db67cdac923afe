"""A language model small enough to train in a test, and batches for it."""

import types
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

from effjax.core import precision, specs
from effjax.optim import config as optim_config
from effjax.parallel import spread as spread_lib
from effjax.train import config as train_config
from effjax.train import loop as loop_lib
from effjax.train import state as state_lib
from effjax.train import step as step_lib
from effjax.weights import verbs
from effjax.weights import weight as weight_lib

VOCAB, DIM, HIDDEN, LENGTH = 32, 8, 16, 6


class Toy(nn.Module):
  """Bigrams through one hidden layer, with every collection a module may write.

  Attributes:
    auxiliary: size of an auxiliary loss; 0 for none.
    counts: whether to keep a running count in the collection `state`.
    noise: size of noise from the stream "dropout".
    has_readout: whether the output head can be handed over.
  """

  auxiliary: float = 0.0
  counts: bool = False
  noise: float = 0.0
  has_readout: bool = False
  precision: Any = precision.PrecisionConfig()

  @nn.compact
  def __call__(
    self, tokens_BL, positions=None, segments=None, state=None, readout=None
  ):
    init = nn.initializers.normal(0.5)
    make = lambda *args, **kwargs: weight_lib.weight(self, *args, **kwargs)
    table = make("table", init, (VOCAB, DIM), axes=("vocab", "embed"), kind="embedding")
    up = make("up", init, (DIM, HIDDEN), axes=("embed", "mlp"))
    down = make("down", init, (HIDDEN, DIM), axes=("mlp", "embed"))
    x_BLD = verbs.lookup(table, tokens_BL).astype(self.precision.dtype)
    h_BLF = jnp.tanh(verbs.contract(x_BLD, up))
    if self.noise and self.has_rng("dropout"):
      key = self.make_rng("dropout")
      h_BLF = h_BLF + self.noise * jax.random.normal(key, h_BLF.shape)
    if self.auxiliary:
      self.sow("losses", "size", self.auxiliary * jnp.mean(h_BLF**2))
      self.sow("metrics", "hidden", jnp.mean(h_BLF**2))
    if self.counts:
      seen = self.variable("state", "seen", lambda: jnp.float32(0))
      if not self.is_initializing():
        seen.value = seen.value + tokens_BL.size
    x_BLD = x_BLD + verbs.contract(h_BLF, down)
    head_fn = lambda x, head: verbs.contract(x, head, transpose=True).astype(
      jnp.float32
    )
    if readout is not None:
      return readout(x_BLD, head_fn, table.leaf), state
    return head_fn(x_BLD, table.leaf), state

  @nn.nowrap
  def example_inputs(self):
    return (jnp.zeros((1, 2), jnp.int32),)


def make_rows(count, seed=0):
  """Rows whose next token follows from the last one, some targets left out."""
  rng = np.random.default_rng(seed)
  first = rng.integers(0, VOCAB, (count, 1))
  tokens = (first + 5 * np.arange(LENGTH + 1)) % VOCAB
  weights = (rng.random((count, LENGTH)) < 0.8).astype(np.float32)
  return [
    {
      "inputs": row[:-1].astype(np.int32),
      "targets": row[1:].astype(np.int32),
      "weights": weight,
      "segments": np.ones(LENGTH, np.int32),
      "positions": np.arange(LENGTH, dtype=np.int32),
    }
    for row, weight in zip(tokens, weights, strict=True)
  ]


def make_batches(batch_size=8, count=64):
  """An endless grain iterator over shuffled rows."""
  dataset = grain.MapDataset.source(make_rows(count)).seed(0).shuffle().repeat()
  # By default grain would read 500 batches ahead, with 16 threads.
  options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)
  return iter(dataset.batch(batch_size).to_iter_dataset(options))


def make_config(**changes):
  """Options of a short training with everything small."""
  optimizer = optim_config.OptimizerConfig(
    name="adamw", learning_rate=0.01, schedule="constant", clip_norm=1.0
  )
  values = {"num_steps": 6, "log_every": 1, "checkpoint_every": 2}
  return train_config.TrainConfig(**{"optimizer": optimizer, **values, **changes})


def make_spread(preset="dp", num_devices=1, **fields):
  return spread_lib.over(preset, num_devices=num_devices, **fields)


class Hooked(grain.DatasetIterator):
  """A grain iterator that gives what `hook(n)` gives for batch n, unless None."""

  def __init__(self, hook):
    super().__init__(make_batches())
    self._hook, self._given = hook, 0

  def __next__(self):
    instead = self._hook(self._given)
    self._given += 1
    batch = next(self._parent)
    return batch if instead is None else instead

  def get_state(self):
    return self._parent.get_state()

  def set_state(self, state):
    self._parent.set_state(state)


@pytest.fixture(scope="session")
def toy():
  """See make_toy."""
  return make_toy()


def make_toy():
  """The model, its parameters and specs, and makers of everything else."""
  model = Toy(noise=0.1)
  tree = specs.specs(model)
  params = jax.jit(model.init)(jax.random.key(0), *model.example_inputs())["params"]

  def arguments(**changes):
    """Keyword arguments of loop.train."""
    values = {
      "model": model,
      "params": params,
      "specs": tree,
      "batches": make_batches(),
      "config": make_config(),
      "spread": make_spread(),
      "key": jax.random.key(1),
    }
    return values | changes

  def build(**changes):
    """A step, and a function that makes its first state."""
    values = {
      "model": model,
      "params": params,
      "paths": frozenset(params),
      "tx": optax.sgd(0.1),
      "preset": "dp",
      "num_devices": 1,
    } | changes
    spread = make_spread(values["preset"], values["num_devices"])
    place = lambda: state_lib.place(
      values["model"],
      values["params"],
      tree,
      values["paths"],
      values["tx"],
      jax.random.key(1),
      spread,
    )
    state, frozen, shardings = place()
    step = step_lib.make(
      values["model"],
      make_config().make_loss(),
      values["tx"],
      lambda step: 0.1,
      frozen,
      shardings,
      specs=tree,
      spread=spread,
      micro_batches=values.get("micro_batches", 1),
      policy=values.get("policy"),
    )
    fresh = jax.jit(lambda s: jax.tree.map(jnp.copy, s), out_shardings=shardings)
    return step, lambda: fresh(state)

  plain = build()

  def make_loop(workdir=None, config=None, batches=None, evaluate=None):
    """A loop around the one compiled step of all tests that need no special one."""
    step, start = plain
    batches = make_batches() if batches is None else batches
    config = make_config() if config is None else config
    return loop_lib.Loop(step, start(), batches, config, evaluate, workdir)

  return types.SimpleNamespace(
    model=model,
    params=params,
    specs=tree,
    make_model=Toy,
    rows=make_rows,
    batches=make_batches,
    config=make_config,
    spread=make_spread,
    arguments=arguments,
    build=build,
    plain=plain,
    loop=make_loop,
    batch=lambda n=8: jax.tree.map(lambda *a: jnp.stack(a), *make_rows(n)),
    hooked=Hooked,
  )
