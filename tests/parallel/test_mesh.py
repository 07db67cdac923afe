"""The mesh: shapes, combinations of presets, slices, and every mistake in one line."""

import dataclasses

import jax
import numpy as np
import pytest

from effjax.core import errors
from effjax.parallel import mesh as mesh_lib
from effjax.parallel import rules
from effjax.parallel import spread as spread_lib


def _sizes(num_present, num_slices=1, **fields):
  shape = mesh_lib.sizes(mesh_lib.MeshConfig(**fields), num_present, num_slices)
  return {a: n for a, n in zip(rules.AXES, shape, strict=True) if n > 1}


@pytest.mark.parametrize(
  ("fields", "expected"),
  [
    ({}, {"data": 8}),
    ({"num_devices": 4}, {"data": 4}),
    ({"preset": "fsdp"}, {"fsdp": 8}),
    ({"preset": "fsdp+tp", "shape": {"tensor": 2}}, {"fsdp": 4, "tensor": 2}),
    ({"preset": "tp+fsdp", "shape": {"fsdp": 2}}, {"fsdp": 2, "tensor": 4}),
    ({"preset": "hsdp", "shape": {"data": 2}}, {"data": 2, "fsdp": 4}),
    ({"preset": "pp", "shape": {"stage": 4}}, {"stage": 4}),
    ({"preset": "dp+ep", "shape": {"data": 1, "expert": 2}}, {"expert": 2}),
  ],
)
def test_the_main_axis_takes_the_devices_that_are_left(fields, expected):
  assert _sizes(8, **fields) == expected


def test_slices_become_replicas():
  assert _sizes(512, 2, preset="hsdp") == {"data": 2, "fsdp": 256}
  assert _sizes(512, 2, preset="hsdp", shape={"data": 8}) == {"data": 8, "fsdp": 64}


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"preset": "fdsp"}, "did you mean 'fsdp'"),
    ({"preset": "fsdp+tq"}, "unknown preset 'tq'"),
    ({"preset": "fsdp+fsdp"}, "says a part twice"),
    ({"preset": "ring+ulysses"}, "ring and ulysses exclude each other"),
    ({"preset": "zero1+zero2"}, "exclude each other"),
    ({"shape": {"dat": 2}}, "did you mean 'data'"),
    ({"shape": {"tensor": 2}}, "'dp' splits nothing over 'tensor', only over data"),
    ({"shape": {"data": 0}}, "data=0 must be positive"),
    ({"repeats": 2}, "repeats and micro_batches are of 'pp'"),
  ],
)
def test_configs_that_cannot_be(fields, message):
  with pytest.raises(errors.InputError, match=message):
    mesh_lib.MeshConfig(**fields)


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"shape": {"data": 16}}, "takes 16 devices, 16 are asked for and 8 are present"),
    ({"num_devices": 16}, "use at most 8"),
    (
      {"preset": "fsdp+tp", "shape": {"tensor": 3}},
      "{'tensor': 3} of preset 'fsdp\\+tp' takes 3 devices, 8 are asked for and 8 are "
      "present; choose sizes whose product divides 8",
    ),
    (
      {"preset": "fsdp+tp", "shape": {"fsdp": 2, "tensor": 2}, "num_devices": 8},
      "takes 2 x 2 = 4 devices, 8 are asked for and 8 are present; choose sizes whose "
      "product is 8, or num_devices=4",
    ),
  ],
)
def test_meshes_that_do_not_multiply_to_the_devices(fields, message):
  with pytest.raises(errors.InputError, match=message):
    mesh_lib.make(mesh_lib.MeshConfig(**fields))


def test_every_device_has_one_place():
  mesh = spread_lib.over("hsdp+tp", shape={"data": 2, "tensor": 2}).mesh
  assert dict(mesh.shape) == dict(zip(rules.AXES, (1, 2, 2, 1, 1, 2), strict=True))
  assert [d.id for d in mesh.devices.flat] == [d.id for d in jax.devices()]


@dataclasses.dataclass(frozen=True)
class _Device:
  """A device of one of two slices, as a pod of two would show it."""

  id: int
  platform: str = "cpu"
  device_kind: str = "cpu"

  @property
  def slice_index(self) -> int:
    return self.id % 2

  @property
  def process_index(self) -> int:
    return self.id % 2


def test_only_stages_and_replicas_cross_slices():
  devices = [_Device(i) for i in range(8)]
  shape = tuple({"data": 2, "fsdp": 4}.get(axis, 1) for axis in rules.AXES)
  grid = mesh_lib.grid(devices, shape).reshape(2, 4)
  slices = np.vectorize(lambda device: device.slice_index)(grid)
  assert [len(set(row)) for row in slices] == [1, 1]
  with pytest.raises(errors.InputError, match="make mesh.shape's stage x data a multi"):
    mesh_lib.grid(devices, tuple(8 if a == "fsdp" else 1 for a in rules.AXES))
