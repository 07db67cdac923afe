"""The search: what it tries, what it prefers, and how it says that nothing fits.

Nothing is compiled here; libtpu only says how the chips of a slice are wired.
"""

import itertools
import json
import math

import pytest

from effjax.core import errors
from effjax.measure.pods import calibration
from effjax.parallel import mesh as mesh_lib
from effjax.parallel import rules
from effjax.recipe import config as config_lib
from effjax.recipe import pod_search, pods

CONFIG = "configs/lm_7b.py"


@pytest.mark.parametrize("num_chips", [1, 2, 8, 12])
@pytest.mark.parametrize("with_experts", [False, True])
def test_every_mesh_is_tried_once(num_chips, with_experts):
  found = set()
  for mesh in pod_search.meshes(num_chips, with_experts):
    sizes = mesh_lib.sizes(mesh, num_chips)
    found_one = (frozenset(mesh.preset.split("+")), sizes)
    assert found_one not in found
    found.add(found_one)
  expected = set()
  data = ("dp", "zero1", "zero2", "fsdp", "hsdp")
  for parts in itertools.product(
    (None, *data), (None, "tp", "tps"), (None, "ep") if with_experts else (None,)
  ):
    names = frozenset(filter(None, parts))
    if not names or num_chips == 1:
      continue
    axes = rules.find("+".join(names)).axes
    choices = [range(2, num_chips + 1) if a in axes else (1,) for a in rules.AXES]
    for sizes in itertools.product(*choices):
      if math.prod(sizes) == num_chips:
        expected.add((names, sizes))
  if num_chips == 1:
    expected = {(frozenset({"dp"}), (1,) * len(rules.AXES))}
  assert found == expected


@pytest.fixture(scope="module")
def searched():
  pytest.importorskip("libtpu")
  config = config_lib.load(CONFIG, ["data.batch_size=64"])
  return pod_search.search(config, "v5e:4x4")


def test_the_fastest_that_fits_comes_first(searched):
  secs = [one.estimate.step_secs for one in searched]
  assert secs == sorted(secs)
  assert all(one.estimate.fits for one in searched)
  # 12 bytes for each of seven billion parameters are 81 GB: they must be split.
  assert {one.mesh.preset for one in searched} >= {"fsdp", "fsdp+tp", "fsdp+tps"}
  assert not {"dp", "zero1", "hsdp"} & {one.mesh.preset for one in searched}
  # What is sent between layers costs more than it saves where everything fits anyway.
  assert searched[0].mesh.preset == "fsdp"


def test_less_recomputed_is_faster_and_larger(searched):
  by = {
    (one.mesh.preset, *one.shape.values(), one.remat, one.micro_batches): one.estimate
    for one in searched
  }
  pairs = [
    (by[key], by[(*key[:-2], "dots", key[-1])])
    for key in by
    if key[-2] == "full" and (*key[:-2], "dots", key[-1]) in by
  ]
  assert pairs
  for full, dots in pairs:
    assert dots.step_secs < full.step_secs
    assert dots.hbm_bytes > full.hbm_bytes


def test_fields_are_plain_values(searched):
  fields = searched[0].fields()
  assert json.loads(json.dumps(fields)) == fields
  assert fields["hbm_bytes"] == sum(fields["memory"].values())
  ratio = calibration.ratios().mean
  secs = (fields["chip_secs"] + fields["ici_secs"]) * ratio
  assert fields["step_secs"] == pytest.approx(secs)


def test_overrides_make_the_config_of_a_layout(searched):
  chosen = {
    "few": searched[0],
    "tensor": next(one for one in searched if "tps" in one.mesh.preset),
    "dots": next(one for one in searched if one.remat == "dots"),
    "none": next(one for one in searched if one.remat == "none"),
  }
  for one in chosen.values():
    config = config_lib.load(CONFIG, ["data.batch_size=64", *one.overrides])
    assert config.mesh.preset == one.mesh.preset
    sizes = dict(zip(rules.AXES, mesh_lib.sizes(config.mesh, 16), strict=True))
    assert {axis: n for axis, n in sizes.items() if n > 1} == one.shape
    assert config.model.remat == one.remat
    assert config.stages[0].options["micro_batches"] == one.micro_batches


def test_overrides_undo_another_preset_s_mesh():
  pytest.importorskip("libtpu")
  old = [
    "data.batch_size=64",
    "mesh.preset=fsdp+pp",
    "mesh.shape.stage=4",
    "mesh.repeats=2",
    "mesh.num_devices=8",
  ]
  best = pod_search.search(config_lib.load(CONFIG, old), "v5e:4x4")[0]
  config = config_lib.load(CONFIG, [*old, *best.overrides])
  assert config.mesh == mesh_lib.MeshConfig(preset="fsdp")
  steps, spread = pods.training(config, "v5e:4x4")
  held = steps.held_bytes(spread)
  assert {name: best.estimate.memory[name] for name in held} == held


def test_what_fits_nowhere_names_the_smallest_slice():
  pytest.importorskip("libtpu")
  config = config_lib.load(CONFIG, ["data.batch_size=64"])
  with pytest.raises(errors.InputError) as raised:
    pod_search.search(config, "v5e:2x2")
  line = str(raised.value)
  assert "\n" not in line
  assert line.startswith("nothing fits v5e:2x2: a chip needs at least ")
  assert "has 16.9 GB; the smallest that could hold it is v5e:4x4" in line


def test_a_batch_that_does_not_divide():
  pytest.importorskip("libtpu")
  changes = [
    "data.batch_size=7",
    "model.mixer_options.attention.num_heads=1",
    "model.mixer_options.attention.num_kv_heads=1",
    "model.mlp_options.swiglu.hidden_dim=11",
  ]
  with pytest.raises(errors.InputError, match="change data.batch_size"):
    pod_search.search(config_lib.load(CONFIG, changes), "v5e:4x4")


def test_unrolled_layers_are_refused():
  pytest.importorskip("libtpu")
  config = config_lib.load(CONFIG, ["model.scan=false", "model.num_layers=2"])
  with pytest.raises(errors.InputError, match="scan=True"):
    pod_search.search(config, "v5e:4x4")
