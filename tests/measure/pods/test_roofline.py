"""Times of a small program, worked out by hand."""

import textwrap

import pytest

from effjax.measure.pods import calibration, chips, kernels, links, roofline
from effjax.parallel import hlo

# Three turns of: a product of [128, 256] and [256, 512] from memory, a gather of 1 MB
# over four chips, and a kernel on what is on the chip already.
TEXT = textwrap.dedent("""
  HloModule step

  %product (a: bf16[128,256], b: bf16[256,512]) -> bf16[128,512] {
    %a = bf16[128,256]{1,0} parameter(0)
    %b = bf16[256,512]{1,0} parameter(1)
    ROOT %c = bf16[128,512]{1,0} convolution(%a, %b), dim_labels=bf_io->bf
  }

  %body (p: (s32[], bf16[128,256])) -> (s32[], bf16[128,256]) {
    %p = (s32[], bf16[128,256]{1,0}) parameter(0)
    %x = bf16[128,256]{1,0} get-tuple-element(%p), index=1
    %w = bf16[256,512]{1,0} get-tuple-element(%p), index=2
    %y = bf16[128,512]{1,0} fusion(%x, %w), kind=kOutput, calls=%product
    %g = bf16[4,131072]{1,0} all-gather(%y), replica_groups={{0,1,2,3}}, dimensions={0}
    %q = bf16[2,8,256,64]{3,2,1,0:S(1)} bitcast(%g)
    %splash_mha_fwd.1 = bf16[2,8,256,64]{3,2,1,0:S(1)} custom-call(%q, %q, %q), \
  custom_call_target="tpu_custom_call", metadata={op_name="visits_3_of_4/call"}
  }

  ENTRY %main (x: bf16[128,256]) -> bf16[128,256] {
    %loop = (s32[], bf16[128,256]{1,0}) while(%t), body=%body, condition=%condition, \
  backend_config={"known_trip_count":{"n":"3"}}
  }
""")


def test_a_loop_takes_its_products_and_then_its_gathers():
  slice_ = chips.parse("v5e:2x4")
  places = [(i // 4, i % 4) for i in range(8)]
  cost = roofline.of(hlo.read(TEXT), links.Wiring(slice_, places))
  product = 2 * 128 * 256 * 512
  attention = 2 * 2 * (2 * 8 * 256 * 256 * 64) * 3 // 4
  moved = 2 * (128 * 256 + 256 * 512 + 128 * 512)
  gather = 0.75 * 2**20 / 50e9 + 4e-6
  assert cost.flops == 3 * (product + attention)
  assert cost.hbm_bytes == 3 * moved
  assert cost.compute_secs == pytest.approx(3 * (product + attention) / 197e12)
  assert cost.hbm_secs == pytest.approx(3 * moved / 819e9)
  assert cost.ici_secs == pytest.approx(3 * gather)
  # The product waits for memory, the kernel does not; the gather for both.
  alone = moved / 819e9 + attention / 197e12
  assert product / 197e12 < moved / 819e9
  assert cost.step_secs == pytest.approx(3 * (alone + gather))
  assert cost.best_secs == pytest.approx(3 * max(alone, gather))
  assert [(one.kind, one.times) for one in cost.sent] == [("all-gather", 3)]
  assert cost.unknown == ()


def test_kernels_that_are_not_known_are_named():
  text = TEXT.replace("splash_mha_fwd.1", "other.1")
  program = hlo.read(text)
  assert kernels.flops(program.by_name["other.1"], program) is None
  wiring = links.Wiring(chips.parse("v5e:2x4"), [(0, i) for i in range(4)])
  assert roofline.of(program, wiring).unknown == ("other.1",)


def test_what_published_runs_say_is_kept():
  ratios = calibration.ratios()
  assert ratios.count >= 4
  assert 1 < ratios.low <= ratios.mean <= ratios.high < 1.2
