"""GGUF files put together byte by byte, with no help from what is tested."""

import struct

UINT32, STRING, ARRAY = 4, 8, 9
F32, Q4_0 = 0, 2


def text(value: str | bytes) -> bytes:
  value = value.encode() if isinstance(value, str) else value
  return struct.pack("<Q", len(value)) + value


def key(name: str | bytes, kind: int, payload: bytes) -> bytes:
  return text(name) + struct.pack("<I", kind) + payload


def info(
  name: str | bytes, sizes: tuple[int, ...], kind: int = F32, offset: int = 0
) -> bytes:
  """A tensor's description; the contiguous size comes first, as in the file."""
  head = text(name) + struct.pack(f"<I{len(sizes)}Q", len(sizes), *sizes)
  return head + struct.pack("<IQ", kind, offset)


def file(
  keys: list[bytes] = (),
  infos: list[bytes] = (),
  data: bytes = b"",
  *,
  magic: bytes = b"GGUF",
  version: int = 3,
  num_keys: int | None = None,
  num_infos: int | None = None,
  alignment: int = 32,
) -> bytes:
  num_keys = len(keys) if num_keys is None else num_keys
  num_infos = len(infos) if num_infos is None else num_infos
  head = magic + struct.pack("<IQQ", version, num_infos, num_keys)
  head += b"".join(keys) + b"".join(infos)
  return head + bytes(-len(head) % alignment) + data


def sample() -> bytes:
  """A small whole file with every kind of thing in it."""
  keys = [
    key("general.architecture", STRING, text("llama")),
    key("n", UINT32, struct.pack("<I", 7)),
    key("tokens", ARRAY, struct.pack("<IQ", STRING, 2) + text("a") + text("é")),
    key("types", ARRAY, struct.pack("<IQ", UINT32, 3) + struct.pack("<3I", 1, 2, 3)),
    key("flag", 7, b"\1"),
    key(
      "nested",
      ARRAY,
      struct.pack("<IQ", ARRAY, 2)
      + (struct.pack("<IQ", 0, 3) + b"\1\2\3")
      + (struct.pack("<IQ", STRING, 1) + text("x")),
    ),
  ]
  infos = [info("a", (3, 2)), info("b", (32, 2), Q4_0, offset=32)]
  return file(keys, infos, bytes(range(24)) + bytes(8) + bytes(range(36)) + bytes(28))
