"""What is written is read back, by gguf-py too, and copies are equal bit for bit."""

import struct

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from effjax.core import errors
from effjax.interop.gguf import encode, reader, values, writer
from effjax.interop.gguf.values import Value
from effjax.interop.gguf.writer import Tensor
from tests.interop.gguf import layout

PROFILE = hypothesis.settings(
  max_examples=60,
  deadline=None,
  derandomize=True,
  suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
)
SCALARS = {
  "uint8": 200,
  "int8": -100,
  "uint16": 60_000,
  "int16": -30_000,
  "uint32": 4_000_000_000,
  "int32": -2_000_000_000,
  "float32": 0.1,
  "bool": True,
  "string": "größer",
  "uint64": 2**64 - 1,
  "int64": -(2**63),
  "float64": 0.1,
}


def copied(file: reader.File) -> list[Tensor]:
  return [
    Tensor(name=name, type=info.type, shape=info.shape, raw=file.raw(name))
    for name, info in file.tensors.items()
  ]


def rewritten(path) -> bytes:
  """The bytes of a copy made by reading and writing."""
  file = reader.open_file(path)
  copy = path.with_name("copy.gguf")
  writer.write(copy, file.values, copied(file))
  return copy.read_bytes()


def written(path, metadata=None, tensors=()) -> reader.File:
  writer.write(path, metadata or {}, tensors)
  return reader.open_file(path)


def floats(name: str, shape=(2, 3), raw=None) -> Tensor:
  raw = np.zeros(int(np.prod(shape)) * 4, np.uint8) if raw is None else raw
  return Tensor(name=name, type="F32", shape=shape, raw=raw)


def gguf_file(path, alignment: int | None = None):
  """A file by gguf-py with all value types and several tensor types."""
  gguf = pytest.importorskip("gguf")
  out = gguf.GGUFWriter(path, "llama")
  if alignment:
    out.add_custom_alignment(alignment)
  for name, value in SCALARS.items():
    out.add_key_value(f"one.{name}", value, gguf.GGUFValueType[name.upper()])
    many = [value] * 3
    element = gguf.GGUFValueType[name.upper()]
    out.add_key_value(f"many.{name}", many, gguf.GGUFValueType.ARRAY, sub_type=element)
  out.add_array("nested", [[1, 2], [3, 4, 5], ["a", ""]])
  out.add_token_list(["<s>", "a", "é", ""] * 50)
  rng = np.random.default_rng(0)
  x = rng.normal(size=(3, 512)).astype(np.float32)
  out.add_tensor("norm", x[0])
  out.add_tensor("half", x[:, :7].astype(np.float16))
  for type in ("Q4_0", "Q8_0", "Q5_1", "BF16", "TQ2_0"):
    kind = gguf.GGMLQuantizationType[type]
    out.add_tensor(f"w.{type}", gguf.quantize(x, kind), raw_dtype=kind)
  out.add_tensor("experts", rng.normal(size=(2, 3, 5)).astype(np.float32))
  out.add_tensor("ids", np.arange(5, dtype=np.int64))
  out.write_header_to_file()
  out.write_kv_data_to_file()
  out.write_tensors_to_file()
  out.close()
  return x


@pytest.mark.oracle
@pytest.mark.parametrize("alignment", [None, 8, 32, 128])
def test_copy_of_a_gguf_file_is_equal_bit_for_bit(tmp_path, alignment):
  path = tmp_path / "model.gguf"
  gguf_file(path, alignment)
  assert rewritten(path) == path.read_bytes()
  assert reader.open_file(path).alignment == (alignment or 32)


@pytest.mark.oracle
def test_reads_what_gguf_wrote(tmp_path):
  path = tmp_path / "model.gguf"
  x = gguf_file(path)
  file = reader.open_file(path)
  for name, value in SCALARS.items():
    value = float(np.float32(value)) if name == "float32" else value
    assert file.metadata[f"one.{name}"] == value
    assert file.metadata_types[f"one.{name}"] == name
    assert list(file.metadata[f"many.{name}"]) == [value] * 3
    assert file.metadata_types[f"many.{name}"] == f"{name}[]"
  assert file.metadata["tokenizer.ggml.tokens"] == ["<s>", "a", "é", ""] * 50
  nested = [list(inner) for inner in file.metadata["nested"]]
  assert nested == [[1, 2], [3, 4, 5], ["a", ""]]
  assert file.tensors["experts"].shape == (2, 3, 5)
  np.testing.assert_array_equal(file.raw("norm").view(np.float32), x[0])
  for type in ("Q4_0", "Q8_0", "Q5_1", "BF16"):
    assert file.tensors[f"w.{type}"].shape == (3, 512)
    np.testing.assert_array_equal(file.raw(f"w.{type}"), encode.encode(x, type))


@pytest.mark.oracle
@pytest.mark.parametrize("alignment", [32, 64])
def test_gguf_reads_what_was_written(tmp_path, alignment):
  gguf = pytest.importorskip("gguf")
  x = np.random.default_rng(0).normal(size=(3, 512)).astype(np.float32)
  types = ("F32", "F16", "Q4_K", "Q6_K", "Q8_0")
  tensors = [
    Tensor(name=t, type=t, shape=x.shape, raw=lambda t=t: encode.encode(x, t))
    for t in types
  ]
  metadata = {"general.alignment": alignment, "tokens": ["a", "b"], "ids": [1, -2]}
  metadata |= {name: Value(name, value) for name, value in SCALARS.items()}
  path = tmp_path / "model.gguf"
  writer.write(path, metadata, tensors)
  theirs = gguf.GGUFReader(path)
  for name, value in SCALARS.items():
    field = theirs.fields[name]
    value = float(np.float32(value)) if name == "float32" else value
    assert field.contents() == value and field.types[0].name == name.upper()
  assert theirs.fields["tokens"].contents() == ["a", "b"]
  assert theirs.fields["ids"].contents() == [1, -2]
  assert [t.name for t in theirs.tensors] == list(types)
  for tensor in theirs.tensors:
    assert tensor.shape.tolist() == [512, 3]
    assert tensor.data_offset % alignment == 0
    raw = np.ascontiguousarray(tensor.data).view(np.uint8)
    np.testing.assert_array_equal(raw, encode.encode(x, tensor.name))


def test_copy_of_a_file_made_by_hand_is_equal_bit_for_bit(tmp_path):
  path = tmp_path / "model.gguf"
  for content in (layout.sample(), layout.file()):
    path.write_bytes(content)
    assert rewritten(path) == content


VECTORS = {
  "float32": hnp.arrays(np.float32, st.integers(0, 5)),
  "uint8": hnp.arrays(np.uint8, st.integers(0, 5)),
  "int64": hnp.arrays(np.int64, st.integers(0, 5)),
  "bool": hnp.arrays(bool, st.integers(0, 5)),
  "string": st.lists(st.text(max_size=8), max_size=4),
}
ARRAYS = st.one_of(
  *(s.map(lambda v, n=n: Value(f"{n}[]", v)) for n, s in VECTORS.items())
)
VALUES = st.one_of(
  st.integers(-(2**63), 2**64 - 1),
  st.booleans(),
  st.text(max_size=20),
  st.floats(allow_nan=False, width=32),
  ARRAYS,
  st.lists(ARRAYS, max_size=3).map(lambda v: Value("array[]", v)),
)


@PROFILE
@hypothesis.given(st.dictionaries(st.text(min_size=1, max_size=12), VALUES, max_size=6))
def test_any_metadata_comes_back(tmp_path, metadata):
  hypothesis.assume("general.alignment" not in metadata)
  file = written(tmp_path / "model.gguf", metadata, [floats("a")])
  assert list(file.values) == list(metadata)
  for key, value in metadata.items():
    expected = values.infer(value)
    assert file.values[key].type == expected.type
    if expected.type == "array[]":
      np.testing.assert_equal(file.metadata[key], expected.plain)
    else:
      np.testing.assert_equal(file.metadata[key], expected.value)
  assert rewritten(file.path) == file.path.read_bytes()


def test_tensors_are_asked_for_one_at_a_time_in_order(tmp_path):
  asked = []

  def raw(number):
    asked.append((number, (tmp_path / "model.gguf").exists()))
    return np.full(24, number, np.uint8)

  tensors = (floats(f"t{i}", raw=lambda i=i: raw(i)) for i in range(3))
  file = written(tmp_path / "model.gguf", {}, tensors)
  assert asked == [(0, False), (1, False), (2, False)]
  assert [file.raw(f"t{i}").min() for i in range(3)] == [0, 1, 2]
  assert file.data.size % 32 == 0


def test_a_failure_leaves_what_was_there(tmp_path):
  path = tmp_path / "model.gguf"
  path.write_bytes(b"before")

  def broken():
    raise KeyboardInterrupt

  with pytest.raises(KeyboardInterrupt):
    writer.write(path, {}, [floats("a"), floats("b", raw=broken)])
  with pytest.raises(
    errors.InputError, match="'a' .* takes 24 bytes in uint8; got uin"
  ):
    writer.write(path, {}, [floats("a", raw=np.zeros(23, np.uint8))])
  with pytest.raises(errors.InputError, match=r"got float32 of shape \(24,\)"):
    writer.write(path, {}, [floats("a", raw=lambda: np.zeros(24, np.float32))])
  with pytest.raises(errors.InputError, match="got list"):
    writer.write(path, {}, [floats("a", raw=lambda: [0])])
  assert [p.name for p in tmp_path.iterdir()] == ["model.gguf"]
  assert path.read_bytes() == b"before"


def test_replaces_a_file_that_is_being_read(tmp_path):
  path = tmp_path / "model.gguf"
  file = written(path, {"n": 1}, [floats("a", raw=np.arange(24, dtype=np.uint8))])
  writer.write(path, file.values | {"n": Value("uint32", 2)}, copied(file))
  again = reader.open_file(path)
  assert (file.metadata["n"], again.metadata["n"]) == (1, 2)
  np.testing.assert_array_equal(again.raw("a"), file.raw("a"))


def test_refuses_paths(tmp_path):
  with pytest.raises(errors.InputError, match="is a folder; give the name of a file"):
    writer.write(tmp_path, {}, [])
  with pytest.raises(errors.InputError, match="none/model.gguf: No such file or dir"):
    writer.write(tmp_path / "none" / "model.gguf", {}, [])


@pytest.mark.parametrize(
  ("value", "message"),
  [
    (Value("uint8", 256), "256 is not a uint8"),
    (Value("uint32", -1), "-1 is not a uint32"),
    (Value("uint32", 1.5), "1.5 is not a uint32"),
    (Value("float32", 1e300), r"1e\+300 is not a float32"),
    (Value("bool", 1), "expected a bool, got 1"),
    (Value("string", 1), "expected a string, got 1"),
    (Value("string", "\ud800"), "cannot be written as UTF-8"),
    (Value("word", 1), r"GGUF has no type 'word'; available: string, uint8"),
    (Value("array", [1]), "GGUF has no type 'array'"),
    (Value("word[]", [1]), r"GGUF has no type 'word\[\]'"),
    (Value("uint8[]", [1, 256]), r"\[1, 256\] is not a vector of uint8"),
    (Value("int32[]", [0.5]), "is not a vector of int32"),
    (Value("int32[]", 5), "5 is not a vector of int32"),
    (Value("bool[]", [0, 1]), "is not a vector of bool"),
    (Value("float32[]", [1e300]), "is not a vector of float32"),
    (Value("int32[]", [[1], [2, 3]]), "is not a vector of int32"),
    (Value("int32[]", [[1], [2]]), "is not a vector of int32"),
    (Value("string[]", "ab"), r"string\[\] needs a list"),
    (Value("string[]", [1]), "expected a string, got 1"),
    (Value("array[]", [[1]]), r"elements of array\[\] are Values of array types"),
    ([], "a list needs elements of one type"),
    ([1, "a"], "a list needs elements of one type"),
    (None, "GGUF has no values of NoneType"),
    (np.zeros(3, np.complex64), "GGUF has no values of complex64; available: uint8"),
  ],
)
def test_refuses_values_with_one_line(tmp_path, value, message):
  with pytest.raises(errors.InputError, match=f"key 'k': .*{message}") as caught:
    writer.write(tmp_path / "model.gguf", {"k": value}, [])
  assert "\n" not in str(caught.value)
  assert not list(tmp_path.iterdir())


def test_refuses_arrays_nested_too_deep(tmp_path):
  value = Value("uint8[]", [1])
  for _ in range(values.MAX_DEPTH - 1):
    value = Value("array[]", [value])
  file = written(tmp_path / "model.gguf", {"k": value})
  np.testing.assert_array_equal(file.metadata["k"], [[[[1]]]])
  with pytest.raises(errors.InputError, match="nested more than 4 deep"):
    writer.write(file.path, {"k": Value("array[]", [value])}, [])


def test_refuses_alignments(tmp_path):
  for bad in (0, 24, 2**25, "32", Value("uint64", 32)):
    with pytest.raises(errors.InputError, match="general.alignment must be a uint32"):
      writer.write(tmp_path / "model.gguf", {"general.alignment": bad}, [])
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
  ("tensors", "message"),
  [
    ([floats("a"), floats("a")], "'a' is given twice"),
    ([floats("a", (0, 2))], "at most 4 sizes, all positive"),
    ([floats("a", (1,) * 5)], "at most 4 sizes"),
    ([floats("a", (2**64,), np.zeros(4, np.uint8))], "at most 4 sizes"),
    (
      [Tensor(name="a", type="Q4_0", shape=(2, 33), raw=np.zeros(9, np.uint8))],
      "'a': a row of 33 elements is not whole blocks of 32",
    ),
    (
      [Tensor(name="a", type="Q4", shape=(32,), raw=np.zeros(9, np.uint8))],
      "unknown GGUF tensor type 'Q4'; did you mean 'Q4_",
    ),
  ],
)
def test_refuses_tensors_with_one_line(tmp_path, tensors, message):
  with pytest.raises(errors.InputError, match=message) as caught:
    writer.write(tmp_path / "model.gguf", {}, tensors)
  assert "\n" not in str(caught.value)
  assert not list(tmp_path.iterdir())


def test_types_of_plain_values(tmp_path):
  plain = {
    "count": 7,
    "negative": -7,
    "large": 2**32,
    "low": -(2**40),
    "rate": 0.5,
    "flag": False,
    "name": "x",
    "ids": [1, 2],
    "scores": (0.5, 1.0),
    "one": np.uint16(3),
    "vector": np.arange(3, dtype=np.int8),
  }
  file = written(tmp_path / "model.gguf", plain)
  assert list(file.metadata_types.values()) == [
    "uint32",
    "int32",
    "uint64",
    "int64",
    "float32",
    "bool",
    "string",
    "int32[]",
    "float32[]",
    "uint16",
    "int8[]",
  ]
  assert struct.unpack("<I", file.data[4:8].tobytes()) == (writer.VERSION,)
