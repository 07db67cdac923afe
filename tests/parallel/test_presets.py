"""Every preset, and the pairs that make sense, trains like one device."""

import pytest

from effjax.parallel import spread as spread_lib
from tests.parallel import models

# Preset, and the shape of the mesh where it is not the main axis alone.
SINGLE = {
  "dp": {},
  "zero1": {},
  "zero2": {},
  "fsdp": {},
  "hsdp": {"data": 2},
  "tp": {"tensor": 4},
}
EXPERTS = {
  "ep": {},
  "ep+fsdp": {"fsdp": 2},
  "ep+tp": {"expert": 4},
  "dp+ep": {"expert": 2},
}
PAIRS = {
  "fsdp+tp": {"tensor": 2},
  "zero1+tp": {"tensor": 2},
  "zero2+fsdp": {"fsdp": 2},
}


def check(name, preset, shape, **changes):
  spread = spread_lib.over(preset, shape=shape)
  losses, gradients, params, state = models.train(
    spread, *models.model(name), **changes
  )
  wanted = models.on_one_device(name, changes.get("micro_batches", 1))
  models.assert_close(losses[0], wanted[0][0], 1e-5)
  models.assert_close(gradients, wanted[1], 1e-5)
  models.assert_close(params, wanted[2], 1e-4)
  return spread, state


@pytest.mark.parametrize("preset", SINGLE)
def test_dense(preset):
  check("dense", preset, SINGLE[preset])


@pytest.mark.parametrize("preset", ["fsdp", "tp", "fsdp+tp"])
def test_mamba2(preset):
  check("mamba2", preset, (SINGLE | PAIRS)[preset])


@pytest.mark.parametrize("preset", ["zero2", "tp", "zero2+fsdp"])
def test_hybrid(preset):
  check("hybrid", preset, (SINGLE | PAIRS)[preset])


@pytest.mark.parametrize("preset", [*EXPERTS, "fsdp"])
@pytest.mark.parametrize("name", ["moe", "dropless"])
def test_experts(name, preset):
  check(name, preset, (SINGLE | EXPERTS)[preset])
