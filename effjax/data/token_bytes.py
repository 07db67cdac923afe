"""The bytes each token of a vocabulary stands for.

A Hugging Face tokenizer spells bytes in its tokens' names in one of these ways, told by
the decoder in its file:

    ByteLevel     each character is a byte, by the alphabet of GPT-2
    Metaspace,    a space is written "▁"; a token "<0xE2>" is that byte, where the
    ByteFallback  decoder says so (SentencePiece, Kudo and Richardson 2018,
                  arXiv:1808.06226)
    WordPiece     a space comes before every token but those that begin with "##"
    none          a space comes between tokens
"""

import re
from collections.abc import Callable, Mapping
from typing import Any

from effjax.core import errors

_NUM_BYTES = 256
_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
# What the library's WordPiece decoder calls cleanup, within one token.
_CLEANUP = {
  f" {end}": end for end in (".", "?", "!", ",", "n't", "'m", "'s", "'ve", "'re")
} | {" ' ": "'", " do not": " don't"}
_KNOWN = (
  "ByteFallback",
  "ByteLevel",
  "Fuse",
  "Metaspace",
  "Replace",
  "Strip",
  "WordPiece",
)


def byte_alphabet() -> str:
  """The printable character that stands for each byte in a byte-level vocabulary.

  Printable Latin-1 bytes stand for themselves; the others, in order, for the
  characters from U+0100 on.
  """
  printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
  others = iter(range(0x100, 0x200))
  return "".join(
    chr(byte) if byte in printable else chr(next(others)) for byte in range(_NUM_BYTES)
  )


# Characters that stand for no byte go where Latin-1 does not follow.
_LATIN_1 = {byte: "\uffff" for byte in range(_NUM_BYTES)} | {
  ord(char): chr(byte) for byte, char in enumerate(byte_alphabet())
}


class Spelling:
  """How names of tokens are read as bytes.

  Attributes:
    strip: spaces taken away at the beginning of a whole text, at most.
  """

  def __init__(self, decoder: Any):
    """Reads the `decoder` entry of a Hugging Face tokenizer file.

    Args:
      decoder: the entry, an object; None if tokens are words.

    Raises:
      InputError: a decoder of another kind.
    """
    self.strip = 0
    self._joined = decoder is None
    self._steps: list[Callable[[str, bool], str | bytes]] = []
    self._byte_level = self._byte_fallback = False
    fused = False
    for step in _flatten(decoder):
      kind = step.get("type")
      if kind == "Fuse":
        fused = True
      elif kind == "Strip":
        if not fused or step.get("content") != " " or step.get("stop"):
          raise _unreadable(step)
        self.strip = int(step.get("start", 0))
      elif kind == "ByteLevel":
        self._byte_level = True
      elif kind == "ByteFallback":
        self._byte_fallback = True
      else:
        self._steps.append(_step(step))
    if self._byte_level and (self._steps or self._byte_fallback):
      raise _unreadable(decoder)

  def read(self, name: str, *, added: bool = False, first: bool = False) -> bytes:
    """The bytes of one token.

    Args:
      name: the token as the vocabulary writes it.
      added: it was added to the vocabulary as a piece of raw text.
      first: it begins a whole text: a space that the tokenizer puts before a text, or
        between two words, is left out.
    """
    if self._byte_level:
      return name.encode() if added else _byte_level(name)
    byte = _BYTE.fullmatch(name) if self._byte_fallback else None
    if byte:
      return bytes([int(byte[1], 16)])
    for step in self._steps:
      name = step(name, first)
    return (name if first or not self._joined else f" {name}").encode()


def _byte_level(name: str) -> bytes:
  """A byte for each character; a name that has others is plain text."""
  try:
    return name.translate(_LATIN_1).encode("latin-1")
  except UnicodeEncodeError:
    return name.encode()


def _flatten(decoder: Any) -> list[Mapping[str, Any]]:
  if decoder is None:
    return []
  if not isinstance(decoder, Mapping):
    raise _unreadable(decoder)
  if decoder.get("type") != "Sequence":
    return [decoder]
  return [step for inner in decoder.get("decoders", ()) for step in _flatten(inner)]


def _step(step: Mapping[str, Any]) -> Callable[[str, bool], str]:
  """What one step of a decoder makes of a token's name."""
  kind = step.get("type")
  if kind == "Replace":
    pattern = step.get("pattern")
    if isinstance(pattern, Mapping) and isinstance(pattern.get("String"), str):
      return lambda name, first: name.replace(pattern["String"], step["content"])
  if kind == "Metaspace":
    space = step["replacement"]
    begins = "" if step.get("prepend_scheme", "always") != "never" else " "
    return lambda name, first: name.replace(space, begins if first else " ")
  if kind == "WordPiece":
    return lambda name, first: _word_piece(name, first, step)
  raise _unreadable(step)


def _word_piece(name: str, first: bool, step: Mapping[str, Any]) -> str:
  prefix = step.get("prefix", "##")
  if not first:
    name = name[len(prefix) :] if name.startswith(prefix) else f" {name}"
  if step.get("cleanup", True):
    for found, written in _CLEANUP.items():
      name = name.replace(found, written)
  return name


def _unreadable(step: Any) -> errors.InputError:
  return errors.InputError(
    f"this tokenizer's decoder step {str(step)[:80]} is not one effjax reads; "
    f"readable: {', '.join(_KNOWN)} (Replace of plain text, Strip of leading spaces "
    "after Fuse)"
  )
