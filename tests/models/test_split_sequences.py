"""Models of every recurrent mixer on devices that share each sequence."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.core import registry, specs
from effjax.models import config, decoder, encoder, encoder_config
from effjax.nn.mixers import _recurrent
from effjax.ops.recurrence import across_devices
from effjax.parallel import mesh as mesh_lib
from effjax.parallel import spread

ROWS, LENGTH, WIDTH, VOCAB = 2, 32, 32, 40
SMALL = {
  "head_dim": 8,
  "state_dim": 8,
  "chunk": 4,
  "num_heads": 4,
  "num_features": 16,
  "position": "rope",
}
# Slices of 4 and of 8 tokens: documents of less than one slice and of several.
SEGMENTS = np.array([[1] * 19 + [2] * 2 + [3] * 11, [1] * 3 + [2] * 24 + [0] * 5])
POSITIONS = np.array([[*range(19), *range(2), *range(11)], [*range(3), *range(29)]])
SPLITS = {
  "ring": {"preset": "ring"},
  "ring+tp": {"preset": "ring+tp", "shape": {"context": 4, "tensor": 2}},
  "ulysses+dp": {"preset": "ulysses+dp", "shape": {"context": 4, "data": 2}},
}
MIXERS = [
  name
  for name in registry.names(config.MIXERS)
  if issubclass(registry.find(config.MIXERS, name), _recurrent.RecurrentMixer)
]


@pytest.fixture(scope="module", autouse=True)
def quick_compilation():
  """Most of the time here is XLA's; what is compared does not need its last effort."""
  jax.config.update("jax_disable_most_optimizations", True)
  yield
  jax.config.update("jax_disable_most_optimizations", False)


TWO_SIDED = [
  name for name in MIXERS if registry.find(config.MIXERS, name).bidirectional
]


@functools.cache
def _built(mixer, two_sided=False):
  fields = registry.find(config.MIXERS, mixer).options_cls.__dataclass_fields__
  options = {key: value for key, value in SMALL.items() if key in fields}
  sizes = {
    "vocab_size": VOCAB,
    "embed_dim": WIDTH,
    "num_layers": 2,
    "pattern": (mixer,),
    "mlp": "none",
    "mixer_options": {mixer: options},
    "max_len": LENGTH,
  }
  if two_sided:
    model = encoder.Encoder(encoder_config.EncoderConfig(**sizes))
  else:
    model = decoder.Decoder(config.DecoderConfig(**sizes))
  tokens_BL = jax.random.randint(jax.random.key(0), (ROWS, LENGTH), 0, VOCAB)
  params = jax.jit(model.init)(jax.random.key(1), tokens_BL)["params"]
  if mixer == "mamba1":  # Its matrices start so small that what is far hardly counts.
    params = jax.tree.map(lambda w: 2 * w if w.ndim > 2 else w, params)
  return model, params, tokens_BL


def _apply(built, params):
  model, _, tokens_BL = built
  packed = jnp.asarray(POSITIONS), jnp.asarray(SEGMENTS)
  logits_BLV, _ = model.apply({"params": params}, tokens_BL, *packed)
  return jnp.where(packed[1][..., None] != 0, logits_BLV, 0.0)


def _results(built, params):
  """Logits at real tokens and gradients of their loss; the program."""

  def loss(params):
    logits_BLV = _apply(built, params)
    return jnp.mean(jax.nn.logsumexp(2 * logits_BLV, axis=-1)), logits_BLV

  compiled = jax.jit(jax.grad(loss, has_aux=True)).lower(params).compile()
  gradient, logits_BLV = compiled(params)
  return (logits_BLV, gradient), compiled.as_text()


@functools.cache
def _whole(mixer):
  return _results(_built(mixer), _built(mixer)[1])[0]


def _distance(got, wanted, floor=1.0):
  """The largest difference in any array, over its largest number or the floor."""

  def leaf(a, b):
    a, b = np.asarray(a), np.asarray(b)
    return np.abs(a - b).max() / max(floor, np.abs(b).max())

  return max(jax.tree.leaves(jax.tree.map(leaf, got, wanted)))


def _spread(split):
  mesh_config = mesh_lib.MeshConfig(**SPLITS[split])
  return spread.Spread(mesh_lib.make(mesh_config), mesh_config)


def _cases():
  for mixer in MIXERS:
    for split in SPLITS:
      slow = split == "ulysses+dp" or (mixer == "s4d" and split != "ring")
      yield pytest.param(mixer, split, marks=pytest.mark.slow if slow else ())


@pytest.mark.parametrize(("mixer", "split"), list(_cases()))
def test_devices_that_share_a_sequence_equal_one(mixer, split):
  built = model, params, _ = _built(mixer)
  over = _spread(split)
  placed = jax.device_put(params, over.params(specs.specs(model), params))
  with over.active():
    got, program = _results(built, placed)
  assert _distance(got, _whole(mixer)) <= 1e-5
  # Gradients of a mean are small numbers.
  assert _distance(got, _whole(mixer), 1e-9) <= 1e-4
  # Segment ids are gathered, activations are not, for gradients of weights neither.
  gathered = re.findall(r"= \(?(\w+)\[.* all-gather", program)
  assert set(gathered) == {"s32"}


@pytest.mark.parametrize("mixer", TWO_SIDED)
def test_sums_over_both_sides_come_from_all_devices(mixer):
  built = _, params, _ = _built(mixer, two_sided=True)
  wanted, _ = _results(built, params)
  with _spread("ring+tp").active():
    got, _ = _results(built, params)
  assert _distance(got, wanted) <= 1e-5


@pytest.mark.parametrize("mixer", ["mamba1", "mamba2", "gla"])
def test_prompts_are_read_on_slices_and_continued_whole(mixer):
  """Two parts of a padded prompt, then a token, through the decoding state."""
  model, params, tokens_BL = _built(mixer)
  parts = [
    (tokens_BL, jnp.ones((ROWS, LENGTH), jnp.int32)),
    (tokens_BL[:, ::-1], jnp.asarray(np.arange(LENGTH) < [[27], [5]], jnp.int32)),
    (tokens_BL[:, :1], jnp.ones((ROWS, 1), jnp.int32)),
  ]

  def read():
    step = jax.jit(lambda *args: model.apply({"params": params}, *args))
    state = model.init_state(ROWS, 3 * LENGTH)
    for tokens, segments in parts:
      logits_BLV, state = step(tokens, None, segments, state)
    return logits_BLV, state

  wanted = read()
  with _spread("ring").active():
    got = read()
  assert _distance(got, wanted) <= 1e-5


@pytest.mark.parametrize("mixer", MIXERS)
def test_it_takes_the_states_of_all_slices_before(mixer, monkeypatch):
  """With those of the neighbours alone, logits are others than on one device."""

  def from_neighbour(decay, added, over, *, times=None, reverse=False):
    return across_devices.receive(added, 1, over, reverse=reverse)

  monkeypatch.setattr(across_devices, "arriving", from_neighbour)
  built = _built(mixer)
  with _spread("ring").active():
    got = jax.jit(lambda params: _apply(built, params))(built[1])
  assert _distance(got, _whole(mixer)[0]) > 1e-4
