"""BigBird equals attention under its mask, and HF transformers with either's plan."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.core import config, errors
from effjax.models import config as model_config
from effjax.nn.mixers import bigbird
from effjax.ops.attention import api as attention_ops
from effjax.ops.attention import patterns
from tests.models import bert_oracle as oracle

WIDTH, LENGTH = 16, 22
SEGMENTS = [[1] * 22, [1] * 9 + [2] * 11 + [0] * 2]
POSITIONS = [[*range(22)], [*range(9), *range(11), 0, 0]]


def _options(**changes):
  values = {
    "num_heads": 2,
    "num_kv_heads": 1,
    "head_dim": 4,
    "block": 2,
    "num_random": 1,
    "bias": True,
  }
  return config.build(bigbird.BigBirdOptions, values | changes, "bigbird")


def _build(causal, **changes):
  module = bigbird.BigBird(_options(**changes), WIDTH, causal=causal)
  x_BLD = jax.random.normal(jax.random.key(0), (2, LENGTH, WIDTH))
  ids = jnp.ones((2, LENGTH), jnp.int32)
  params = module.init(jax.random.key(1), x_BLD, positions=ids, segments=ids)["params"]
  return module, params, x_BLD


def _difference(a, b):
  """The largest, over the largest value or 1."""
  return float(jnp.max(jnp.abs(a - b)) / jnp.maximum(jnp.max(jnp.abs(b)), 1))


@pytest.mark.parametrize("causal", [False, True], ids=["encoder", "decoder"])
def test_equals_the_naive_form_in_outputs_and_gradients(causal):
  found = []
  ids = jnp.array(SEGMENTS)
  for implementation in ("auto", "reference"):
    module, params, x_BLD = _build(causal, implementation=implementation)

    def loss(params, x_BLD, module=module):
      y, _ = module.apply(
        {"params": params}, x_BLD, positions=jnp.array(POSITIONS), segments=ids
      )
      y = y * (ids > 0)[..., None]
      return jnp.sum(jnp.sin(3 * y)), y

    run = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))
    found.append(run(params, x_BLD))
  fast, naive = found
  for a, b in zip(jax.tree.leaves(fast), jax.tree.leaves(naive), strict=True):
    assert a.shape == b.shape
    assert _difference(a, b) <= 1e-4


def test_the_pattern_is_sparse_and_reaches_far():
  """Which tokens a token depends on, in a document longer than the window."""
  module, params, x_BLD = _build(False, num_kv_heads=2, num_random=2)
  ids = jnp.ones((1, LENGTH), jnp.int32)

  def at_ten(x_1LD):
    y, _ = module.apply({"params": params}, x_1LD, positions=ids, segments=ids)
    return jnp.sum(y[0, 10])

  gradient = jax.jit(jax.grad(at_ten))(x_BLD[:1])[0]
  blocks = np.any(np.asarray(gradient).reshape(11, -1) != 0, axis=1)
  assert blocks[[0, 4, 5, 6, 10]].all() and blocks.sum() == 7


def test_prompts_and_steps_equal_the_parallel_form():
  module, params, x_BLD = _build(True)
  step = jax.jit(module.apply)
  index = jnp.broadcast_to(jnp.arange(LENGTH), (2, LENGTH))
  ones = jnp.ones_like(index)
  whole, _ = step({"params": params}, x_BLD, positions=index, segments=ones)
  state, start = module.init_state(2, LENGTH, "float32"), 0
  for size in (15, *[1] * 7):
    part = slice(start, start + size)
    y, state = step(
      {"params": params},
      x_BLD[:, part],
      state,
      positions=index[:, part],
      segments=ones[:, part],
    )
    assert _difference(y, whole[:, part]) <= 1e-4
    start += size


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"block": 0}, "block=0 must be at least 1"),
    ({"window": 3}, "window=3 must be a multiple of block=2"),
    ({"window": 0}, "window=0 must be at least 1"),
    ({"num_random": -1}, "num_random=-1 must not be negative"),
    ({"num_kv_heads": 3}, "num_kv_heads=3 must divide num_heads=2"),
  ],
)
def test_mistakes(changes, message):
  with pytest.raises(errors.InputError, match=message) as caught:
    _options(**changes)
  assert "\n" not in str(caught.value)


def test_an_even_window_is_for_causal_models():
  with pytest.raises(errors.InputError, match="num_window_blocks=2 .* odd"):
    _build(False, window=4)


# HF's sizes: 10 blocks, of which it takes all if there are fewer than 2 * 2 + 6.
BLOCK, RANDOM, BLOCKS = 4, 2, 10


def _layout(num_random, seed):
  pattern = patterns.BigBird(block=BLOCK, num_random=num_random, seed=seed)
  return pattern.layout(BLOCKS, BLOCKS, BLOCK)


def _masks(drawn, seed):
  """bool [head, block, block]: draws of each head on top of our other blocks."""
  seen = np.stack([_layout(0, seed)] * len(drawn))
  for head, rows in enumerate(drawn):
    for row, columns in enumerate(rows):
      assert not seen[head, row + 1, columns].any()
      seen[head, row + 1, columns] = True
  return seen


def _use_our_draws(model):
  """Gives HF our random blocks, the same for every head."""
  for seed, layer in enumerate(model.bert.encoder.layer):
    extra = _layout(RANDOM, seed) & ~_layout(0, seed)
    drawn = np.stack([np.flatnonzero(row) for row in extra[1:-1]]).astype(np.int32)
    same = lambda drawn=drawn, **_: [drawn] * oracle.HEADS
    layer.attention.self._bigbird_block_rand_mask_with_head = same


def _use_their_draws(model, monkeypatch):
  """Gives our mixer HF's masks, head by head; a layer is known by its seed."""
  masks = {}
  for seed, layer in enumerate(model.bert.encoder.layer):
    draw = layer.attention.self._bigbird_block_rand_mask_with_head

    def recorded(seed=seed, draw=draw, **sizes):
      drawn = draw(**sizes)
      masks[seed] = _masks(drawn, seed)
      return drawn

    layer.attention.self._bigbird_block_rand_mask_with_head = recorded

  def attend(self, q_BLHK, keys, segments):
    k_BLGK, v_BLGK, state = keys
    heads = [
      attention_ops.attention(
        q_BLHK[:, :, h : h + 1],
        k_BLGK[:, :, h : h + 1],
        v_BLGK[:, :, h : h + 1],
        pattern=patterns.BlockMask(tuple(map(tuple, seen.tolist())), BLOCK),
        q_segments_BL=segments,
        kv_segments_BS=segments,
      )
      for h, seen in enumerate(masks[self.options.seed])
    ]
    return jnp.concatenate(heads, axis=2), state

  monkeypatch.setattr(bigbird.BigBird, "_attend", attend)


@pytest.mark.oracle
@pytest.mark.parametrize("draws", ["ours", "theirs"])
def test_equals_hf_transformers(draws, monkeypatch):
  """In training mode, where theirs draws; outside it repeats the first block instead.

  Padding ends inside the last block, since theirs makes the last block of the padded
  row global and ours that of the document.
  """
  transformers = pytest.importorskip("transformers")
  length = BLOCK * BLOCKS
  sizes = oracle.hf_sizes(
    attention_type="block_sparse", block_size=BLOCK, num_random_blocks=RANDOM
  )
  model = oracle.randomized(
    transformers.BigBirdForMaskedLM(transformers.BigBirdConfig(**sizes))
  ).train()
  if draws == "ours":
    _use_our_draws(model)
  else:
    _use_their_draws(model, monkeypatch)
  options = {
    "num_heads": oracle.HEADS,
    "head_dim": oracle.WIDTH // oracle.HEADS,
    "block": BLOCK,
    "num_random": RANDOM,
  }
  cfg = oracle.config(
    pattern=("bigbird",),
    mixer_options={"bigbird": options},
    mlp_options={"gelu": {"hidden_dim": oracle.HIDDEN, "approximate": True}},
    head_approximate=True,
  )
  layers = tuple(
    model_config.LayerConfig(
      mixer="bigbird",
      mlp="gelu",
      mixer_options=layer.mixer_options | {"seed": seed},
      mlp_options=layer.mlp_options,
    )
    for seed, layer in enumerate(cfg.layers)
  )
  cfg = dataclasses.replace(cfg, layers=layers)
  mask = np.ones((2, length), np.int64)
  mask[1, -2:] = 0
  inputs = {"input_ids": oracle.tokens(length), "attention_mask": mask}
  assert oracle.compare(cfg, model, oracle.bert, inputs, segments=mask) <= 1e-4
