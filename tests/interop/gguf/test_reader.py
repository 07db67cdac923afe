"""The reader gives what a file holds, and refuses what is not whole with one line."""

import struct
import tracemalloc

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from effjax.core import errors
from effjax.interop.gguf import blocks, formats, reader
from tests.interop.gguf import layout

SAMPLE = layout.sample()
EXTREMES = (0, 1, 2**16, 2**31, 2**32, 2**40, 2**61, 2**63 - 1, 2**63, 2**64 - 1)
PROFILE = hypothesis.settings(
  max_examples=400,
  deadline=None,
  derandomize=True,
  suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
)


def opened(folder, content: bytes) -> reader.File:
  path = folder / "model.gguf"
  path.write_bytes(content)
  return reader.open_file(path)


def refusal(folder, content: bytes) -> str | None:
  """The message with which a file is refused, or None once all of it was read."""
  try:
    file = opened(folder, content)
  except errors.InputError as error:
    return str(error)
  for name, info in file.tensors.items():
    raw = file.raw(name)
    assert raw.nbytes == info.num_bytes
    if info.type in formats.TYPES:
      assert blocks.decode(raw, info.type).shape == (info.shape or (1,))
  return None


def test_reads_what_is_there(tmp_path):
  file = opened(tmp_path, SAMPLE)
  assert (file.version, file.alignment) == (3, 32)
  metadata = file.metadata
  types = metadata.pop("types")
  assert types.dtype == np.uint32 and types.tolist() == [1, 2, 3]
  nested = metadata.pop("nested")
  assert [list(inner) for inner in nested] == [[1, 2, 3], ["x"]]
  assert metadata == {
    "general.architecture": "llama",
    "n": 7,
    "tokens": ["a", "é"],
    "flag": True,
  }
  assert metadata["flag"] is True
  assert file.metadata_types == {
    "general.architecture": "string",
    "n": "uint32",
    "tokens": "string[]",
    "types": "uint32[]",
    "flag": "bool",
    "nested": "array[]",
  }
  assert [v.type for v in file.values["nested"].value] == ["uint8[]", "string[]"]
  start = len(SAMPLE) - 96
  assert list(file.tensors) == ["a", "b"]
  assert file.tensors["a"] == reader.TensorInfo(
    name="a", type="F32", shape=(2, 3), offset=start, num_bytes=24
  )
  assert file.tensors["b"] == reader.TensorInfo(
    name="b", type="Q4_0", shape=(2, 32), offset=start + 32, num_bytes=36
  )
  assert file.raw("a").shape == (2, 12) and file.raw("b").shape == (2, 18)
  assert file.raw("b").reshape(-1).tolist() == list(range(36))


def test_tensors_are_views_of_a_read_only_map(tmp_path):
  file = opened(tmp_path, SAMPLE)
  raw = file.raw("b")
  assert np.shares_memory(raw, file.data)
  assert not raw.flags.writeable


def test_version_2_and_other_alignments(tmp_path):
  keys = [layout.key("general.alignment", 4, struct.pack("<I", 64))]
  content = layout.file(keys, [layout.info("a", (4,))], bytes(16), alignment=64)
  file = opened(tmp_path, content[:4] + struct.pack("<I", 2) + content[8:])
  assert (file.version, file.alignment) == (2, 64)
  assert file.tensors["a"].offset == len(content) - 16
  assert file.tensors["a"].offset % 64 == 0


def test_a_scalar_tensor_and_no_tensors(tmp_path):
  scalar = opened(tmp_path, layout.file([], [layout.info("s", ())], bytes(4)))
  assert scalar.tensors["s"].shape == () and scalar.raw("s").shape == (4,)
  empty = opened(tmp_path, layout.file()[:24])
  assert empty.tensors == {} and empty.metadata == {}


def test_unknown_tensor_names_the_nearest(tmp_path):
  content = layout.file([], [layout.info("output.weight", (4,))], bytes(16))
  file = opened(tmp_path, content)
  with pytest.raises(errors.InputError, match="'ouput.weight'; did you mean 'output"):
    file.raw("ouput.weight")
  with pytest.raises(errors.InputError, match="no tensor 'zzz'$"):
    file.raw("zzz")


def test_no_file(tmp_path):
  (tmp_path / "empty.gguf").write_bytes(b"")
  with pytest.raises(errors.InputError, match="none.gguf: no such file"):
    reader.open_file(tmp_path / "none.gguf")
  with pytest.raises(errors.InputError, match="no such file"):
    reader.open_file(str(tmp_path))
  with pytest.raises(errors.InputError, match="empty.gguf: empty file"):
    reader.open_file(tmp_path / "empty.gguf")


u32 = lambda x: struct.pack("<I", x)
u64 = lambda x: struct.pack("<Q", x)
deep = (u32(9) + u64(1)) * 4 + u32(0) + u64(0)
two = [layout.info("a", (8,)), layout.info("b", (8,), offset=0)]
BAD = {
  "not a GGUF file: it starts with b'GGML'": layout.file(magic=b"GGML"),
  "not a GGUF file": b"GG",
  "big-endian GGUF; only": b"GGUF" + struct.pack(">IQQ", 3, 0, 0),
  "big-endian GGUF": layout.file(magic=b"FUGG"),
  "GGUF version 1; available: 2, 3": layout.file(version=1),
  "GGUF version 0;": layout.file(version=0),
  "number of tensors is 4611686018427387904; at most": layout.file(num_infos=2**62),
  "number of tensors is 9, each of at least 24 bytes": layout.file(num_infos=9),
  "number of keys is 65537; at most 65536": layout.file(num_keys=2**16 + 1),
  "number of keys is 10, each of at least 13 bytes": layout.file(num_keys=10),
  "name of key 0 takes 9223372036854775808 bytes": layout.file(
    [u64(2**63) + bytes(64)]
  ),
  "name of key 0 is not UTF-8": layout.file([layout.key(b"\xff\xfe", 4, u32(1))]),
  "key 'k' is not UTF-8": layout.file([layout.key("k", 8, layout.text(b"\xc3("))]),
  "key 'k' appears twice": layout.file([layout.key("k", 4, u32(1))] * 2),
  "key 'k' has the unknown type 13; available: 0 to 12": layout.file(
    [layout.key("k", 13, bytes(32))]
  ),
  "key 'k' is a bool of value 2": layout.file([layout.key("k", 7, b"\2")]),
  "elements of key 'k' has the unknown type 99": layout.file(
    [layout.key("k", 9, u32(99) + u64(0))]
  ),
  "length of key 'k' is 4294967296, each of at least 8": layout.file(
    [layout.key("k", 9, u32(8) + u64(2**32))]
  ),
  "key 'k' takes 9223372036854775808 bytes": layout.file(
    [layout.key("k", 9, u32(12) + u64(2**60))]
  ),
  "length of key 'k' is 9999, each of at least 12": layout.file(
    [layout.key("k", 9, u32(9) + u64(9999))]
  ),
  "number of arrays up to key 'k' is 65538; at most 65536": layout.file(
    [layout.key("k", 9, u32(9) + u64(1) + u32(9) + u64(2**16 + 1))], data=bytes(2**20)
  ),
  "string 1 of key 'k' is not UTF-8": layout.file(
    [layout.key("k", 9, u32(8) + u64(2) + layout.text("a") + layout.text(b"\xff"))]
  ),
  "string 1 of key 'k' ends at byte ": layout.file(
    [layout.key("k", 9, u32(8) + u64(2) + layout.text("a") + u64(2**63))]
  ),
  "key 'k' nests arrays more than 4 deep": layout.file([layout.key("k", 9, deep)]),
  "general.alignment must be a uint32 power of two up to 16777216; got 24": layout.file(
    [layout.key("general.alignment", 4, u32(24))]
  ),
  "general.alignment must be a uint32 power of two up to 16777216; got 0 ": layout.file(
    [layout.key("general.alignment", 4, u32(0))]
  ),
  "got 2147483648 (uint32)": layout.file(
    [layout.key("general.alignment", 4, u32(2**31))]
  ),
  "got 32 (uint64)": layout.file([layout.key("general.alignment", 10, u64(32))]),
  "got 'x' (string)": layout.file(
    [layout.key("general.alignment", 8, layout.text("x"))]
  ),
  "name of tensor 0 is not UTF-8": layout.file([], [layout.info(b"\xff", (4,))]),
  "tensor 'a' appears twice": layout.file([], [layout.info("a", (4,))] * 2, bytes(99)),
  "tensor 'a' has 5 dimensions; at most 4": layout.file(
    [], [layout.info("a", (1,) * 5)], bytes(4)
  ),
  "tensor 'a' has 4294967295 dimensions": layout.file(
    [], [layout.text("a") + u32(2**32 - 1) + bytes(99)]
  ),
  "tensor 'a' of shape (0, 4) has no elements": layout.file(
    [], [layout.info("a", (4, 0))], bytes(64)
  ),
  "tensor 'a' has the unknown type 5; available: F32 (0), F16 (1)": layout.file(
    [], [layout.info("a", (4,), kind=5)], bytes(64)
  ),
  "tensor 'a': a row of 48 elements is not whole blocks of 32 (Q4_0)": layout.file(
    [], [layout.info("a", (48, 2), layout.Q4_0)], bytes(256)
  ),
  "tensor 'a' has offset 8, which is not a multiple of the alignment, 32": layout.file(
    [], [layout.info("a", (4,), offset=8)], bytes(64)
  ),
  "tensor 'a' of shape (5,) (F32) ends at byte 84; the file ends at byte 80": (
    layout.file([], [layout.info("a", (5,))], bytes(16))
  ),
  "tensor 'a' of shape (4,) (F32) ends at byte 18446744073709551600": layout.file(
    [], [layout.info("a", (4,), offset=2**64 - 32 - 64)], bytes(64)
  ),
  "(9223372036854775808, 9223372036854775808) (F32) ends at": layout.file(
    [], [layout.info("a", (2**63, 2**63))], bytes(64)
  ),
  "tensors 'a' and 'b' overlap at byte 96": layout.file([], two, bytes(64)),
}


@pytest.mark.parametrize("message", BAD)
def test_refuses_with_one_line(tmp_path, message):
  with pytest.raises(errors.InputError) as caught:
    opened(tmp_path, BAD[message])
  assert message in str(caught.value)
  assert str(caught.value).startswith(f"{tmp_path / 'model.gguf'}: ")
  assert "\n" not in str(caught.value)


def test_names_in_messages_are_short_and_on_one_line(tmp_path):
  name = "line\n" + "x" * 10_000
  content = layout.file([layout.key(name, 99, b"")])
  with pytest.raises(
    errors.InputError, match=r"key 'line\\nxxx.*\.\.\. has the unk"
  ) as e:
    opened(tmp_path, content)
  assert len(str(e.value)) < 300 and "\n" not in str(e.value)


HUGE = {
  "key": layout.file(num_keys=1)[:24] + u64(2**32),
  "strings": layout.file([layout.key("k", 9, u32(8) + u64(2**30))], alignment=1),
  "numbers": layout.file([layout.key("k", 9, u32(12) + u64(2**30))], alignment=1),
  "keys": layout.file([layout.key("k", 9, u32(0) + u64(2**26 - 50))], num_keys=2),
}


@pytest.mark.parametrize("head", HUGE.values(), ids=HUGE)
def test_what_stands_before_the_tensors_is_bounded_in_a_huge_file(tmp_path, head):
  path = tmp_path / "model.gguf"
  with path.open("wb") as file:
    file.write(head)
    file.truncate(2**36)  # a hole: it takes no room on the disk
  tracemalloc.start()
  try:
    with pytest.raises(errors.InputError, match="may take 67108864 bytes"):
      reader.open_file(path)
    assert tracemalloc.get_traced_memory()[1] < 2**28
  finally:
    tracemalloc.stop()


def test_every_truncation_is_refused(tmp_path):
  whole = len(SAMPLE) - 28  # the padding after the last tensor may be missing
  messages = [refusal(tmp_path, SAMPLE[:size]) for size in range(whole)]
  assert all(m and m.startswith(str(tmp_path)) and "\n" not in m for m in messages)
  assert refusal(tmp_path, SAMPLE[:whole]) is None
  assert refusal(tmp_path, SAMPLE) is None


@PROFILE
@hypothesis.given(
  st.lists(
    st.tuples(st.integers(0, len(SAMPLE) - 97), st.integers(0, 255)),
    min_size=1,
    max_size=6,
  )
)
def test_changed_bytes_never_crash(tmp_path, changes):
  content = bytearray(SAMPLE)
  for place, byte in changes:
    content[place] = byte
  message = refusal(tmp_path, bytes(content))
  assert message is None or (message.startswith(str(tmp_path)) and "\n" not in message)


@PROFILE
@hypothesis.given(
  st.integers(4, len(SAMPLE) - 97),
  st.sampled_from(EXTREMES) | st.integers(0, 2 * len(SAMPLE)),
  st.sampled_from(["<Q", "<I"]),
)
def test_changed_lengths_never_crash_nor_allocate(tmp_path, place, number, form):
  word = struct.pack(form, number % 2 ** (8 * struct.calcsize(form)))
  content = SAMPLE[:place] + word + SAMPLE[place + len(word) :]
  tracemalloc.start()
  try:
    message = refusal(tmp_path, content)
    assert tracemalloc.get_traced_memory()[1] < 2**20
  finally:
    tracemalloc.stop()
  assert message is None or (message.startswith(str(tmp_path)) and "\n" not in message)


@PROFILE
@hypothesis.given(st.binary(max_size=200))
def test_any_bytes_after_the_magic_never_crash(tmp_path, tail):
  message = refusal(tmp_path, b"GGUF\3\0\0\0" + tail)
  assert message is None or (message.startswith(str(tmp_path)) and "\n" not in message)
