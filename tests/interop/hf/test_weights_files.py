"""Safetensors files: bits, shards, and whatever somebody made of their headers."""

import json
import struct

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import numpy as safetensors_numpy

from effjax.core import errors
from effjax.interop import assemble
from effjax.interop.hf import weights_files

TENSORS = {
  "a": np.arange(6, dtype=np.float32).reshape(2, 3),
  "b": np.arange(4, dtype=np.float16),
  "c": np.array([1.5, -2.0], ml_dtypes.bfloat16),
  "d": np.array(3.0, np.float32),
  "e": np.zeros((0, 2), np.float32),
}


def _foreign(tensors):
  return [
    assemble.Foreign(name, a.shape, a.dtype, lambda a=a: a)
    for name, a in tensors.items()
  ]


@pytest.mark.parametrize("shard_bytes", [10**9, 30])
def test_what_is_written_is_read_here_and_by_the_library(shard_bytes, tmp_path):
  weights_files.write(tmp_path, _foreign(TENSORS), shard_bytes)
  files = sorted(tmp_path.glob("*.safetensors"))
  assert (len(files) > 1) == (shard_bytes == 30)
  found = weights_files.Tensors(tmp_path)
  assert found.shapes() == {name: a.shape for name, a in TENSORS.items()}
  library = {k: v for f in files for k, v in safetensors_numpy.load_file(f).items()}
  for name, array in TENSORS.items():
    for other in (found.read(name), library[name]):
      assert other.dtype == array.dtype
      np.testing.assert_array_equal(other, array)


def _file(tmp_path, header=None, data=b"\0" * 24):
  text = header if isinstance(header, bytes) else json.dumps(header).encode()
  content = struct.pack("<Q", len(text)) + text + data
  (tmp_path / weights_files.SINGLE).write_bytes(content)


def _entry(dtype="F32", shape=(2, 3), offsets=(0, 24)):
  return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


@pytest.mark.parametrize(
  "header",
  [
    b"",
    b"{",
    b"[]",
    {"a": {}},
    {"a": _entry(shape=(2, 4))},
    {"a": _entry(shape=(-2, 3))},
    {"a": _entry(shape=(2**40, 2**40))},
    {"a": _entry(offsets=(0, 2**60))},
    {"a": _entry(offsets=(8, 32))},
    {"a": _entry(offsets=(24, 0))},
    {"a": _entry(dtype="F31")},
    {"a": _entry(dtype="F8_E4M3", shape=(4, 6))},
    {"a": _entry(), "b": _entry()},
  ],
)
def test_a_bad_header_is_one_line(header, tmp_path):
  _file(tmp_path, header)
  with pytest.raises(errors.InputError, match="model.safetensors") as raised:
    weights_files.Tensors(tmp_path)
  assert "\n" not in str(raised.value)


def test_a_length_beyond_the_file_allocates_nothing(tmp_path):
  (tmp_path / weights_files.SINGLE).write_bytes(struct.pack("<Q", 2**62) + b"{}")
  with pytest.raises(errors.InputError, match="not a safetensors file"):
    weights_files.Tensors(tmp_path)


@settings(
  max_examples=300,
  deadline=None,
  derandomize=True,
  suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.data())
def test_changed_bytes_are_refused_or_read(data, tmp_path):
  weights_files.write(tmp_path, _foreign(TENSORS))
  path = tmp_path / weights_files.SINGLE
  content = bytearray(path.read_bytes())
  for _ in range(data.draw(st.integers(1, 4))):
    content[data.draw(st.integers(0, len(content) - 1))] = data.draw(
      st.integers(0, 255)
    )
  cut = data.draw(st.none() | st.integers(0, len(content)))
  path.write_bytes(content[:cut])
  try:
    found = weights_files.Tensors(tmp_path)
  except errors.InputError as error:
    assert "\n" not in str(error)
    return
  size = sum(found.read(name).nbytes for name in found.shapes())
  assert size <= len(content)


@pytest.mark.parametrize(
  ("index", "message"),
  [
    ("{", "cannot be read"),
    ("[]", "does not hold an object"),
    ("{}", "no table weight_map"),
    ('{"weight_map": {"a": "../x.safetensors"}}', "which is no file name"),
    ('{"weight_map": {"a": "gone.safetensors"}}', "gone.safetensors is missing"),
    ('{"weight_map": {"z": "model.safetensors"}}', "but not in both"),
  ],
)
def test_a_bad_index_is_one_line(index, message, tmp_path):
  weights_files.write(tmp_path, _foreign(TENSORS))
  (tmp_path / weights_files.INDEX).write_text(index)
  with pytest.raises(errors.InputError, match=message):
    weights_files.Tensors(tmp_path)


def test_a_file_that_is_cut_later_is_named(tmp_path):
  weights_files.write(tmp_path, _foreign(TENSORS))
  found = weights_files.Tensors(tmp_path)
  path = tmp_path / weights_files.SINGLE
  path.write_bytes(path.read_bytes()[:-25])
  with pytest.raises(errors.InputError, match="b is not whole any more"):
    found.read("b")
