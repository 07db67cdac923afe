"""Real configs, cut to two layers, planned for two slices: memory, time and network."""

import dataclasses
import os
import pathlib
import re

import pytest

from effjax.core import errors
from effjax.measure.pods import chips, compiled, planned
from effjax.recipe import config as config_lib
from effjax.recipe import pods

pytest.importorskip("libtpu")

CONFIGS = pathlib.Path(__file__).parents[2] / "configs"
# Configs and the slices that their docstrings name.
WHOLE = {
  "lm_1b": "v5e:4x4",
  "lm_7b": "v5e:16x16",
  "moe_8x7b": "v5p:4x4x4",
  "mamba2_3b": "v5e:8x8",
}
GB = 10**9


def load(name, *changes):
  return config_lib.load(
    str(CONFIGS / f"{name}.py"), [f"--config.{c}" for c in changes]
  )


def small(*changes):
  """Two layers of the 7B, a sequence a chip."""
  return load(
    "lm_7b",
    "model.num_layers=2",
    "model.embed_dim=1024",
    "model.mixer_options.attention.num_heads=8",
    "model.mixer_options.attention.num_kv_heads=8",
    "model.mlp_options.swiglu.hidden_dim=4096",
    "data.sequence_length=2048",
    *changes,
  )


MATRICES = 2 * (4 * 1024**2 + 3 * 1024 * 4096)
TABLES = 2 * 32_000 * 1024
NORMS = 5 * 1024


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
  """Programs are compiled, not found compiled before."""
  with pytest.MonkeyPatch.context() as patch:
    # One folder for all test processes of a run.
    folder = tmp_path_factory.getbasetemp()
    folder = folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder
    patch.setenv("EFFJAX_CACHE", str(folder / "pods"))
    yield


@pytest.fixture(scope="module")
def sharded():
  """Fully sharded over 16 v5e chips, two sequences each."""
  config = small("data.batch_size=32")
  steps, spread = pods.training(config, "v5e:4x4")
  program = compiled.compiled(steps.lower(spread), "v5e:4x4")
  made = planned.of(
    program,
    spread,
    chips.parse("v5e:4x4"),
    steps.held_bytes(spread),
    pods.model_flops(steps),
  )
  return made, program


def test_memory_is_what_the_compiler_says(sharded):
  made, program = sharded
  assert made.fits and made.hbm_limit_bytes == int(15.75 * 2**30)
  assert made.hbm_bytes == program.peak_bytes == sum(made.memory.values())
  params = (MATRICES + TABLES + NORMS) * 4 / 16
  assert made.memory["params"] == params
  # Two moments, and two counts of the chain.
  assert made.memory["optimizer"] == pytest.approx(2 * params, abs=64)
  # Each layer's input: two sequences in bfloat16.
  assert made.memory["activations"] == 2 * (2 * 2048 * 1024 * 2)
  assert made.memory["gradients"] == pytest.approx(MATRICES * 4 / 16, rel=0.01)
  assert made.hbm_bytes < 3 * GB
  given = sum(made.memory[name] for name in ("params", "optimizer", "batch"))
  assert program.argument_bytes == pytest.approx(given, rel=0.05)


def test_flops_are_the_models_and_what_is_recomputed(sharded):
  made, _ = sharded
  tokens = 32 * 2048
  # Of a row of scores the blocks up to its own: 10 of 16 at blocks of 512.
  attention = 2 * 4 * 2048 * 1024 * 10 / 16
  head = TABLES / 2
  needed = 3 * (2 * (MATRICES + head) + attention) * tokens
  assert made.model_flops == pytest.approx(needed, rel=0.02)
  # Layers run forward twice, but for the last product of each.
  again = 2 * (MATRICES - 2 * 1024 * 4096) + attention
  # Kernels form scores again for both gradients: 9 products instead of 6.
  kernels = attention * 3 / 2
  assert made.flops == pytest.approx(
    (needed + (again + kernels) * tokens) / 16, rel=0.02
  )
  assert made.mfu == pytest.approx(
    made.model_flops / (made.step_secs * 16 * 197e12), rel=1e-6
  )
  assert made.best_secs <= made.step_secs and made.unknown_kernels == ()


def test_parameters_are_gathered_twice_and_gradients_summed(sharded):
  made, _ = sharded
  gathered = made.collectives["all-gather"]
  # In bfloat16: layers in both passes, the head once or twice; words are looked up
  # where their rows are.
  layers, head = 2 * MATRICES * 2, TABLES
  assert layers + head <= gathered["num_bytes"] <= layers + 2 * head
  # Which of the two is the compiler's choice.
  summed = sum(
    made.collectives.get(kind, {"num_bytes": 0})["num_bytes"]
    for kind in ("reduce-scatter", "all-reduce")
  )
  assert MATRICES * 2 <= summed <= (MATRICES + 2 * TABLES) * 2.2
  sent = sum(row["wire_bytes"] for row in made.collectives.values())
  assert made.collective_bytes == pytest.approx(sent)
  assert made.ici_secs == pytest.approx(
    sum(row["secs"] for row in made.collectives.values())
  )


def test_the_program_does_not_grow_with_depth_and_is_kept(sharded, monkeypatch):
  _, program = sharded
  config = small("data.batch_size=32", "model.num_layers=12")
  deep = pods.plan_training(config, "v5e:4x4")
  assert deep.program_bytes < 1.05 * len(program.text)
  assert deep.memory["activations"] == 12 * (2 * 2048 * 1024 * 2)
  monkeypatch.setattr(compiled, "_compile", lambda lowered: program)
  again = pods.plan_training(config, "v5e:4x4")
  assert again == deep
  # Another generation's program is another one, though it is asked for alike.
  other = pods.plan_training(config, "v6e:4x4")
  assert other.program_bytes == len(program.text) != deep.program_bytes


def test_tensor_parallelism_on_another_generation():
  config = small(
    "data.batch_size=8",
    "mesh.preset=fsdp+tps",
    "mesh.shape.tensor=2",
    "model.remat=dots",
  )
  made = pods.plan_training(config, "v5p:2x2x1")
  assert made.num_chips == 4 and made.hbm_limit_bytes == int(95.74 * 2**30)
  assert made.memory["params"] == pytest.approx((MATRICES + TABLES) * 4 / 4, rel=0.01)
  assert "reduce-scatter" in made.collectives
  # A chip's half of: queries, keys, values, attended, gate, up; and the layer's input.
  tokens, width = 4 * 2048, 4 * 1024 + 2 * 4096 + 1024
  assert made.memory["activations"] == pytest.approx(
    2 * tokens * width * 2 / 2, rel=0.2
  )


def test_what_does_not_fit_says_what_it_needs():
  config = small("data.batch_size=256", "model.remat=none", "mesh.preset=dp")
  made = pods.plan_training(config, "v5e:2x2")
  assert not made.fits and made.hbm_bytes > made.hbm_limit_bytes
  assert made.step_secs is None and made.mfu is None


def test_prefill_and_decoding_of_what_a_stage_makes():
  config = small("mesh.preset=tp", "data.batch_size=4")
  made = pods.plan_serving(config, "v5e:2x2", "int8", rows=4, max_len=512)
  codes = (MATRICES + TABLES) / 4
  decode = made["decode"]
  assert decode.memory["params"] == pytest.approx(codes, rel=0.05)
  assert decode.memory["cache"] == pytest.approx(
    2 * 2 * 4 * 512 * 1024 * 2 / 4, rel=0.01
  )
  # Every weight but the embedding's, and the cache, are read once.
  read = codes - TABLES / 2 / 4 + decode.memory["cache"]
  assert read <= decode.hbm_traffic_bytes <= 1.6 * read
  assert made["prefill"].mfu > 0 and decode.mfu is None
  # Attention and MLP of both layers; what the head makes stays in parts.
  assert decode.collectives["all-reduce"]["count"] >= 4


@pytest.mark.parametrize(
  ("changes", "topology", "message"),
  [
    ((), "v5x:2x2", "unknown TPU generation 'v5x'"),
    ((), "v5e:3x5", "libtpu knows no topology 'v5e:3x5'"),
    (("mesh.preset=fsdp+tp", "mesh.shape.tensor=3"), "v5e:2x2", "product divides 4"),
    (("mesh.preset=tp", "mesh.num_devices=8"), "v5e:2x2", "use at most 4"),
    (("mesh.shape.fsdp=2",), "v5e:2x2", "takes 2 of the 4 chips of v5e:2x2"),
    (("data.batch_size=6",), "v5e:2x2", "make batch_size a multiple of 4"),
  ],
)
def test_what_cannot_be_planned(changes, topology, message):
  with pytest.raises(errors.InputError, match=re.escape(message)):
    pods.plan_training(small(*changes), topology)


def test_stages_that_cannot_be_planned():
  with pytest.raises(errors.InputError, match="unknown training stage 'int8'"):
    pods.training(small(), "v5e:2x2", "int8")
  with pytest.raises(errors.InputError, match="unknown stage 'int9'"):
    pods.plan_serving(small(), "v5e:2x2", "int9", rows=1, max_len=8)
  with pytest.raises(errors.InputError, match="more than model.max_len=4096"):
    pods.plan_serving(small(), "v5e:2x2", "int8", rows=1, max_len=8192)


@pytest.mark.slow
@pytest.mark.parametrize("name", WHOLE)
def test_whole_configs_fit_as_they_say(name):
  made = pods.plan_training(load(name), WHOLE[name])
  said = (CONFIGS / f"{name}.py").read_text().split("Planned: ")[1].split("\n")[0]
  used, limit = made.hbm_bytes / GB, made.hbm_limit_bytes / GB
  assert made.fits and said == (
    f"{used:.2f} of {limit:.2f} GB a chip, {made.step_secs:.2f} s a step, "
    f"MFU {100 * made.mfu:.1f} % "
    f"({100 * made.mfu_range[0]:.1f} to {100 * made.mfu_range[1]:.1f})"
  )
  assert {field.name for field in dataclasses.fields(made)} >= {
    "fits",
    "hbm_bytes",
    "step_secs",
    "mfu",
    "collective_bytes",
    "compile_secs",
  }
