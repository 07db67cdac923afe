"""Programs are read as they are written."""

import textwrap

import jax
import jax.numpy as jnp

from effjax.parallel import hlo

TEXT = textwrap.dedent("""
  HloModule jit_step

  %body.1 (p.1: (s32[], bf16[4,8])) -> (s32[], bf16[4,8]) {
    %p.1 = (s32[]{:T(128)}, bf16[4,8]{1,0:T(8,128)(2,1)S(1)}) parameter(0)
    %kernel.2 = (f32[2,4]{1,0}, s4[16]{0:T(1024)E(4)}) custom-call(%p.1, \
/*index=1*/%x), custom_call_target="tpu_custom_call", \
frontend_attributes={kernel_metadata={
  "block": 5
  }}, metadata={op_name="jit(step)/visits_3_of_4/call"}
    ROOT %t.3 = (s32[], bf16[4,8]) tuple(%a, %b)
  }

  %condition.1 (p: (s32[], bf16[4,8])) -> pred[] {
    %limit = s32[]{:T(128)} constant(7)
    ROOT %lt = pred[]{:T(512)} compare(%i, %limit), direction=LT
  }

  ENTRY %main (x: f32[4]) -> f32[4] {
    %x = f32[4]{0} parameter(0)
    %loop = (s32[], bf16[4,8]{1,0}) while(%t), condition=%condition.1, body=%body.1
    %either = f32[4]{0} conditional(%i, %x, %x), branch_computations={%one, %two}
    ROOT %copy = f32[4]{0} copy(%x)
  }
""")


def test_every_form_of_an_instruction():
  program = hlo.read(TEXT)
  assert program.entry == "main" and [*program.computations] == [
    "body.1",
    "condition.1",
    "main",
  ]
  parameter, kernel, root = program.computations["body.1"]
  assert [(a.dtype, a.dims, a.space) for a in parameter.results] == [
    ("s32", (), hlo.MAIN_MEMORY),
    ("bf16", (4, 8), 1),
  ]
  assert [a.num_bytes for a in kernel.results] == [32, 8]
  assert kernel.operands == ("p.1", "x")
  assert "visits_3_of_4" in kernel.text and '"block": 5' in kernel.text
  assert root.is_root and not kernel.is_root
  loop, either = program.computations["main"][1:3]
  assert [*loop.called()] == ["body.1"] and program.trip_count(loop) == 7
  assert [*either.called()] == ["one", "two"]
  assert program.operand(program.by_name["copy"], 0).dims == (4,)


def test_a_program_of_the_compiler_at_hand():
  def fn(x):
    return jax.lax.fori_loop(0, 5, lambda _, x: jnp.tanh(x @ x), x)

  text = jax.jit(fn).lower(jnp.zeros((8, 8))).compile().as_text()
  program = hlo.read(text)
  (loop,) = [one for one in program.by_name.values() if one.operation == "while"]
  assert program.trip_count(loop) == 5
  assert {name for name in loop.called()} <= set(program.computations)
