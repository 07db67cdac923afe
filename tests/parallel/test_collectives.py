"""What programs send, counted: loops, groups, and forms that compilers write."""

import textwrap

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from effjax.core import errors
from effjax.parallel import collectives, topology
from effjax.parallel import spread as spread_lib


def test_a_loop_counts_as_often_as_it_runs():
  mesh = spread_lib.over("dp+tp", shape={"tensor": 4}).mesh
  split = lambda *spec: NamedSharding(mesh, P(*spec))

  def layers(x, w):
    step = lambda x, w: (jax.lax.with_sharding_constraint(x @ w, split("data")), None)
    return jax.lax.scan(step, x, w)[0]

  x = jax.ShapeDtypeStruct((8, 16), jnp.float32, sharding=split("data", "tensor"))
  w = jax.ShapeDtypeStruct(
    (3, 16, 16), jnp.float32, sharding=split(None, "tensor", None)
  )
  found = collectives.find(jax.jit(layers).lower(x, w).compile().as_text())
  reduced = [one for one in found if one.kind == "all-reduce" and one.times == 3]
  # Parts of [4, 16] sums, over the four devices of "tensor".
  assert [(one.num_bytes, one.group_size) for one in reduced] == [(4 * 16 * 4, 4)]
  assert reduced[0].wire_bytes == 3 * 2 * 3 / 4 * 256
  total = collectives.totals(reduced)["all-reduce"]
  assert total == {"count": 3, "num_bytes": 768, "wire_bytes": 1152.0}


TPU_TEXT = textwrap.dedent("""
  HloModule jit_update

  %all-reduce-scatter.8 (a: bf16[512,1024], b: bf16[64]) -> (bf16[64,1024], bf16[8]) {
    %a = bf16[512,1024]{1,0:T(8,128)(2,1)} parameter(0)
    %ar = (bf16[512,1024]{1,0}, bf16[64]{0}) all-reduce(%a, %b), \
  replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add
  }

  %body (p: (s32[], bf16[2,64])) -> (s32[], bf16[2,64]) {
    %kernel = f32[2]{0} custom-call(%x), backend_config={"text":"
  }}, metadata={op_name="kernel"}
    %fusion.3 = bf16[64,1024]{1,0} fusion(%z), kind=kCustom, calls=%all-reduce-scatter.8
    %ag = (bf16[64]{0}, bf16[512]{0}) all-gather-start(%y), \
  replica_groups=mesh['axis_0'=8,'axis_1'=2] {'axis_0'}, dimensions={0}
    %agd = bf16[512]{0} all-gather-done(%ag)
  }

  %condition (p: (s32[], bf16[2,64])) -> pred[] {
    %c = s32[]{:T(128)} constant(5)
    ROOT %lt = pred[]{:T(512)} compare(%i, %c), direction=LT
  }

  ENTRY %main (x: f32[4]) -> f32[4] {
    %w = (s32[], bf16[2,64]{1,0}) while(%t), condition=%condition, body=%body
    %pp = f32[4]{0} collective-permute(%x), source_target_pairs={{0,1},{1,0}}
    %rs = f32[4]{0} reduce-scatter(%x), replica_groups=[2,4]<=[8], to_apply=%add
    %hs = f32[4]{0} all-reduce(%x), replica_groups=mesh['axis_0'=1,'axis_1'=4,\
  'axis_2'=2], device_ids=([2,4]T(1,0)) {'axis_1'}, use_global_device_ids=true
    ROOT %aa = f32[4]{0} all-to-all(%x), replica_groups=[4,2]<=[8]
  }
""")


def test_forms_of_the_tpu_compiler():
  found = collectives.find(TPU_TEXT)
  assert [(one.kind, one.num_bytes, one.group_size, one.times) for one in found] == [
    ("reduce-scatter", 2 * (512 * 1024 + 64), 4, 5),
    ("all-gather", 2 * 512, 8, 5),
    ("collective-permute", 16, 2, 1),
    ("reduce-scatter", 64, 4, 1),
    ("all-reduce", 16, 4, 1),
    ("all-to-all", 16, 2, 1),
  ]
  assert found[2].wire_bytes == 16


def test_a_form_that_is_not_known_is_no_guess():
  with pytest.raises(ValueError, match="how many devices take part"):
    collectives.find(
      "ENTRY %m (x: f32[4]) -> f32[4] {\n  %a = f32[4]{0} all-reduce(%x)"
    )


def test_topologies_that_cannot_be(monkeypatch):
  with pytest.raises(errors.InputError, match="unknown TPU generation 'v5x'"):
    topology.devices("v5x:2x4")
  monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
  with pytest.raises(errors.InputError, match=r"pip install 'effjax\[plan\]'"):
    topology.devices("v5e:2x4")
