"""What each preset sends on a TPU slice, kind by kind and byte by byte.

The programs are compiled by XLA's TPU compiler for eight chips that are not there: its
CPU compiler never forms reduce-scatters.
"""

import functools

import pytest

from effjax.core import precision
from effjax.models import config as model_config
from effjax.models import decoder
from effjax.optim import config as optim_config
from effjax.parallel import collectives, topology
from effjax.parallel import mesh as mesh_lib
from effjax.train import config as train_config
from effjax.train import lowering

pytest.importorskip("libtpu")
pytestmark = pytest.mark.oracle

LAYERS, WIDTH, HEADS, HEAD, HIDDEN, VOCAB, EXPERTS = 2, 256, 8, 64, 512, 1024, 8
BATCH, LENGTH = 16, 256
BF16, FP32 = 2, 4
MATRICES = 4 * WIDTH * HEADS * HEAD + 3 * WIDTH * HIDDEN  # Weights of a dense layer.
HEAD_MATRIX = WIDTH * VOCAB
# What is sent of norms, sums and token ids is below this.
SMALL = 200_000


@functools.cache
def sent(preset, mlp="swiglu", **shape):
  """`{kind: [(bytes, times), ...]}` of a step in bfloat16, small ones left out."""
  moe = {"num_experts": EXPERTS, "hidden_dim": HIDDEN, "dispatch": "capacity"}
  cfg = model_config.DecoderConfig(
    vocab_size=VOCAB,
    embed_dim=WIDTH,
    num_layers=LAYERS,
    max_len=LENGTH,
    tie_embeddings=False,
    mlp=mlp,
    mixer_options={
      "attention": {"num_heads": HEADS, "num_kv_heads": HEADS, "head_dim": HEAD}
    },
    mlp_options={mlp: moe if mlp == "moe" else {"hidden_dim": HIDDEN}},
  )
  spread = topology.spread("v5e:2x4", mesh_lib.MeshConfig(preset=preset, shape=shape))
  config = train_config.TrainConfig(
    num_steps=10,
    optimizer=optim_config.OptimizerConfig(name="adamw", learning_rate=1e-3),
    precision=precision.PrecisionConfig(compute="bfloat16"),
  )
  steps = lowering.Steps(
    training=lowering.of_model(decoder.Decoder(cfg)),
    config=config,
    batch_size=BATCH,
    length=LENGTH,
  )
  text = topology.compiled(steps.lower(spread), countable=True).as_text()
  found = {}
  for one in collectives.find(text):
    if one.num_bytes > SMALL:
      found.setdefault(one.kind, []).append((one.num_bytes, one.times))
  return found


def total(sizes):
  return sum(num_bytes * times for num_bytes, times in sizes)


def test_fsdp_gathers_parameters_and_scatters_gradients():
  found = sent("fsdp")
  # Each layer forward and again backward, the head once.
  gathered = 2 * LAYERS * MATRICES + HEAD_MATRIX
  assert total(found["all-gather"]) == gathered * BF16
  assert total(found["reduce-scatter"]) == (LAYERS * MATRICES + HEAD_MATRIX) * BF16
  assert "all-reduce" not in found


def test_tensor_parallelism_adds_up_twice_a_layer():
  found = sent("tp")
  assert found.keys() == {"all-reduce"}
  activations = BATCH * LENGTH * WIDTH * BF16
  in_layers = [one for one in found["all-reduce"] if one[1] == LAYERS]
  # After attention and after the MLP, forward and backward.
  assert in_layers == [(activations, LAYERS)] * 4
  # Rows of the split embedding, and what the split head hands back.
  outside = [one for one in found["all-reduce"] if one[1] == 1]
  assert outside == [(activations, 1)] * 2


@pytest.mark.slow
def test_zero_gathers_what_it_has_updated():
  weights = LAYERS * MATRICES + HEAD_MATRIX + VOCAB * WIDTH
  first, second = sent("zero1"), sent("zero2")
  for found in (first, second):
    assert total(found["all-gather"]) == weights * FP32
  assert first["all-reduce"] == [(MATRICES * BF16, LAYERS)]
  assert second["reduce-scatter"][0] == (MATRICES * BF16, LAYERS)
  assert "all-reduce" not in second


def test_tokens_go_to_experts_and_back():
  found = sent("ep", mlp="moe")
  tokens = BATCH * LENGTH // 8  # Of a device.
  capacity = int(1.25 * 2 * tokens / EXPERTS)
  rows = EXPERTS * capacity * WIDTH * BF16
  # There and back, forward and backward.
  assert found["all-to-all"] == [(rows, LAYERS)] * 4
  assert "all-gather" not in found


def test_keys_go_around_the_ring_and_their_gradients_behind_them():
  found = sent("ring")
  steps = 7 * LAYERS  # From each of eight devices to all others.
  slices = BATCH * LENGTH // 8 * HEADS * HEAD
  times = lambda num_bytes: sum(
    n for b, n in found["collective-permute"] if b == num_bytes
  )
  # Keys and values forward and again backward; halves change places besides.
  assert times(slices * BF16) >= 2 * 2 * steps
  assert times(slices * FP32) == 2 * steps
  # Every device has all weights and some of the tokens.
  assert found["all-reduce"][0] == (MATRICES * BF16, LAYERS)
  assert found.keys() == {"collective-permute", "all-reduce"}


@pytest.mark.slow
def test_ulysses_exchanges_lengths_and_heads():
  found = sent("ulysses")
  slices = BATCH * LENGTH // 8 * HEADS * HEAD
  # Queries, keys and values there and the result back, and their gradients.
  assert found["all-to-all"] == [(slices * BF16, LAYERS)] * 8
  assert found["all-reduce"][0] == (MATRICES * BF16, LAYERS)
  assert found.keys() == {"all-to-all", "all-reduce"}


def test_stages_hand_on_micro_batches():
  found = sent("dp+pp", stage=2)
  rows = BATCH // 2 // 4 * LENGTH * WIDTH * BF16  # Of one of two micro-batches.
  steps = 2 + 2 - 1
  assert found["collective-permute"] == [(rows, steps)] * 2
  # The last stage's results to those that have their rows at the head, and back.
  assert found["all-to-all"] == [(2 * rows, 1)] * 2
  # Each of four replicas has one of the two layers.
  assert (MATRICES * BF16, 1) in found["all-reduce"]
