"""Estimates against hand counts, the step's own shapes, and compiled programs."""

import dataclasses
import functools

import pytest

from effjax.core import precision
from effjax.measure.pods import chips, closed_form, compiled, laid, planned, traced
from effjax.models import config as model_config
from effjax.models import decoder
from effjax.optim import config as optim_config
from effjax.parallel import mesh as mesh_lib
from effjax.parallel import spread as spread_lib
from effjax.parallel import topology
from effjax.recipe import pods
from effjax.train import config as train_config
from effjax.train import lowering

LAYERS, WIDTH, HEADS, HEAD, HIDDEN, VOCAB, EXPERTS = 4, 256, 8, 64, 512, 1024, 8
BATCH, LENGTH = 16, 256
BF16, FP32 = 2, 4
MATRICES = 4 * WIDTH * HEADS * HEAD + 3 * WIDTH * HIDDEN  # Weights of a dense layer.
HEAD_MATRIX = WIDTH * VOCAB
# What is sent of norms and routers is below this.
SMALL = 100_000
SLICE = chips.parse("v5e:2x4")


@functools.cache
def steps(mixer="attention", mlp="swiglu", remat="none", width=WIDTH, batch=BATCH):
  moe = {"num_experts": EXPERTS, "hidden_dim": HIDDEN, "dispatch": "capacity"}
  heads = {"num_heads": HEADS, "num_kv_heads": HEADS, "head_dim": HEAD}
  options = {"moe": moe, "swiglu": {"hidden_dim": HIDDEN}, "none": {}}
  cfg = model_config.DecoderConfig(
    vocab_size=VOCAB,
    embed_dim=width,
    num_layers=LAYERS,
    max_len=LENGTH,
    tie_embeddings=False,
    remat=remat,
    pattern=(mixer,),
    mlp=mlp,
    mixer_options={"attention": heads},
    mlp_options={mlp: options[mlp]},
  )
  config = train_config.TrainConfig(
    num_steps=10,
    optimizer=optim_config.OptimizerConfig(name="adamw", learning_rate=1e-3),
    precision=precision.PrecisionConfig(compute="bfloat16"),
  )
  training = lowering.of_model(decoder.Decoder(cfg))
  return lowering.Steps(
    training=training, config=config, batch_size=batch, length=LENGTH
  )


@functools.cache
def facts(**kwargs):
  one = spread_lib.over("dp", num_devices=1)
  return traced.facts(steps(**kwargs), one, pods.model_flops(steps(**kwargs)))


def estimate(spread, micro_batches=1, **kwargs):
  found = facts(**kwargs)
  return closed_form.Estimate(
    laid=laid.Laid(found, spread),
    facts=found,
    micro_batches=micro_batches,
    slice=SLICE,
  )


def over(preset, **shape):
  return spread_lib.over(preset, shape=shape)


def sent(found):
  table = {}
  for one in found.collectives:
    if one.num_bytes > SMALL:
      table.setdefault(one.kind, []).append((one.num_bytes, one.times))
  return table


def total(sizes):
  return sum(num_bytes * times for num_bytes, times in sizes)


@pytest.mark.parametrize(
  ("preset", "shape", "model"),
  [
    ("dp", {}, {}),
    ("zero1", {}, {}),
    ("zero2+tp", {"tensor": 2}, {}),
    ("fsdp", {}, {"mixer": "mamba2"}),
    ("hsdp+tps", {"data": 2, "tensor": 2}, {}),
    ("ep+fsdp", {"expert": 4, "fsdp": 2}, {"mlp": "moe"}),
  ],
)
def test_held_bytes_are_those_of_the_step(preset, shape, model):
  spread = over(preset, **shape)
  held = steps(**model).held_bytes(spread)
  memory = estimate(spread, **model).memory
  assert {name: memory[name] for name in held} == held


@pytest.mark.parametrize("model", [{}, {"mixer": "mamba2"}])
def test_flops_are_those_of_the_model(model):
  found = facts(**model)
  forward = found.unowned_flops + sum(one.row_flops for one in found.products)
  assert 3 * forward * BATCH == pods.model_flops(steps(**model))


def test_recomputation_repeats_all_but_the_last_product():
  none, full = facts(), facts(remat="full")
  again = LAYERS * 2 * LENGTH * (MATRICES - WIDTH * HIDDEN) + none.unowned_flops
  assert full.row_flops - none.row_flops == again
  # Products with parameters are saved, attention is not.
  dots = facts(remat="dots")
  assert dots.row_flops - none.row_flops == none.unowned_flops


def test_products_of_activations_are_those_of_attention():
  # Scores and their values are held here, as no kernel runs: queries with keys, and
  # what they weight; each reads two and makes one, in float32.
  heads, scores = LENGTH * HEADS * HEAD, HEADS * LENGTH**2
  layer = FP32 * (2 * (2 * heads + scores))
  assert facts().mixed == (LAYERS * layer, layer)


def test_flops_are_divided_among_chips():
  alone = estimate(over("dp", data=1)).flops
  for preset, shape in (("fsdp", {}), ("tp", {}), ("fsdp+tp", {"tensor": 4})):
    assert estimate(over(preset, **shape)).flops == pytest.approx(alone / 8)


def test_what_is_kept_is_split_as_its_names_say():
  rows = BATCH * LENGTH * LAYERS * BF16
  stream = rows * WIDTH
  assert estimate(over("tp"), remat="full").memory["activations"] == stream
  assert estimate(over("tps"), remat="full").memory["activations"] == stream / 8
  # Queries, keys and values, the gate and what it opens; the stream and two outputs, of
  # which the last need not be kept.
  inside, outside = rows * (3 * HEADS * HEAD + 2 * HIDDEN), 2 * stream
  assert estimate(over("tp"), remat="dots").memory["activations"] == (
    inside / 8 + outside
  )
  assert estimate(over("tps"), remat="dots").memory["activations"] == (
    (inside + outside) / 8
  )
  assert estimate(over("fsdp"), micro_batches=2, remat="dots").memory[
    "activations"
  ] == ((inside + outside) / 16)


def test_fsdp_gathers_parameters_and_scatters_gradients():
  found = sent(estimate(over("fsdp"), micro_batches=2, remat="dots"))
  gathered = 2 * LAYERS * MATRICES + HEAD_MATRIX
  assert total(found["all-gather"]) == 2 * gathered * BF16
  scattered = LAYERS * MATRICES + HEAD_MATRIX
  assert total(found["reduce-scatter"]) == 2 * scattered * BF16
  assert "all-reduce" not in found


def test_tensor_parallelism_adds_up_twice_a_layer():
  found = sent(estimate(over("tp")))
  activations = BATCH * LENGTH * WIDTH * BF16
  # After attention and after the MLP, forward and backward; the embedding and the head.
  assert found.keys() == {"all-reduce"}
  assert total(found["all-reduce"]) == activations * (4 * LAYERS + 2)


def test_zero_gathers_what_it_has_updated():
  weights = LAYERS * MATRICES + HEAD_MATRIX + VOCAB * WIDTH
  first, second = sent(estimate(over("zero1"))), sent(estimate(over("zero2")))
  for found in (first, second):
    assert total(found["all-gather"]) == weights * FP32
  dense = LAYERS * MATRICES + HEAD_MATRIX
  assert total(first["all-reduce"]) == dense * BF16 + VOCAB * WIDTH * FP32
  assert total(second["reduce-scatter"]) == dense * BF16


def test_tokens_go_to_experts_and_back():
  found = sent(estimate(over("ep"), mlp="moe"))
  tokens = BATCH * LENGTH // 8
  rows = EXPERTS * int(1.25 * 2 * tokens / EXPERTS) * WIDTH * BF16
  assert total(found["all-to-all"]) == rows * 4 * LAYERS
  assert "all-gather" not in found


def test_time_adds_up():
  found = estimate(over("fsdp"), remat="full")
  assert found.flops / SLICE.chip.flops <= found.chip_secs
  assert found.hbm_bytes == sum(found.memory.values())
  larger = dataclasses.replace(found, micro_batches=2)
  assert larger.collective_bytes > found.collective_bytes
  assert larger.memory["activations"] == found.memory["activations"] / 2


@pytest.mark.oracle
@pytest.mark.parametrize(
  ("preset", "shape", "remat"),
  [("fsdp", {}, "full"), ("fsdp+tp", {"tensor": 2}, "dots")],
)
def test_estimates_are_near_what_the_compiler_makes(preset, shape, remat):
  pytest.importorskip("libtpu")
  one = topology.spread("v5e:2x4", mesh_lib.MeshConfig(num_devices=1))
  spread = topology.spread("v5e:2x4", mesh_lib.MeshConfig(preset=preset, shape=shape))
  # Less would be kept in a smaller memory than the main one.
  wanted = steps(remat=remat, width=1024, batch=256)
  found = traced.facts(wanted, one, pods.model_flops(wanted))
  ours = closed_form.Estimate(
    laid=laid.Laid(found, spread), facts=found, micro_batches=1, slice=SLICE
  )
  program = compiled.compiled(wanted.lower(spread), SLICE.name)
  held = wanted.held_bytes(spread)
  theirs = planned.of(program, spread, SLICE, held, found.model_flops)
  memory = theirs.memory["activations"]
  assert ours.memory["activations"] == pytest.approx(memory, rel=0.2)
  assert ours.flops == pytest.approx(theirs.flops, rel=0.1)
  assert ours.collective_bytes == pytest.approx(theirs.collective_bytes, rel=0.1)
