"""Names of tokens as bytes, against the library's own decoders."""

import json

import pytest
import tokenizers as hf
from tokenizers import decoders

from effjax.core import errors
from effjax.data import token_bytes


def _state(decoder):
  content = hf.Tokenizer(hf.models.BPE())
  content.decoder = decoder
  return json.loads(content.to_str())["decoder"]


DECODERS = {
  "byte level": (decoders.ByteLevel(), ["ĠThe", "Ã", "©", "Ċ", "x"]),
  "metaspace": (decoders.Metaspace(), ["▁▁The", "▁fox", "es", "▁"]),
  "metaspace first": (decoders.Metaspace(prepend_scheme="first"), ["▁a", "▁b"]),
  "metaspace never": (decoders.Metaspace(prepend_scheme="never"), ["▁a", "▁b"]),
  "other space": (decoders.Metaspace(replacement="_"), ["_a", "▁b_c"]),
  "word piece": (
    decoders.WordPiece(),
    ["##The", "##fox", "do", "not", ".", "n't", "'", "'m", "'re", "##."],
  ),
  "no cleanup": (decoders.WordPiece("@@", cleanup=False), ["a", "@@b", ".", "##c"]),
  "byte fallback": (
    decoders.Sequence(
      [
        decoders.Replace("▁", " "),
        decoders.ByteFallback(),
        decoders.Fuse(),
        decoders.Strip(" ", 1, 0),
      ]
    ),
    ["▁▁a", "<0xC3>", "<0xA9>", "▁b", "<0x0A>", "<0xZZ>"],
  ),
}


@pytest.mark.parametrize("name", DECODERS)
def test_equals_the_library(name):
  decoder, tokens = DECODERS[name]
  spelling = token_bytes.Spelling(_state(decoder))
  pieces = [spelling.read(t, first=i == 0) for i, t in enumerate(tokens)]
  text = b"".join(pieces).decode()
  cut = min(len(text) - len(text.lstrip(" ")), spelling.strip)
  assert text[cut:] == decoder.decode(tokens)


def test_no_decoder_joins_with_spaces():
  spelling = token_bytes.Spelling(None)
  backend = hf.Tokenizer(hf.models.WordLevel({"a": 0, "b": 1}, "a"))
  expected = backend.decode([0, 1, 0])
  found = [spelling.read(t, first=i == 0) for i, t in enumerate("aba")]
  assert b"".join(found).decode() == expected == "a b a"


def test_added_tokens_are_plain_text():
  spelling = token_bytes.Spelling({"type": "ByteLevel"})
  assert spelling.read("Ã©") == "é".encode()
  assert spelling.read("é", added=True) == "é".encode()
  assert spelling.read("  ", added=True) == b"  "


def test_every_byte_has_one_character():
  alphabet = token_bytes.byte_alphabet()
  spelling = token_bytes.Spelling({"type": "ByteLevel"})
  assert b"".join(spelling.read(c) for c in alphabet) == bytes(range(256))
  assert set(alphabet) == set(hf.pre_tokenizers.ByteLevel.alphabet())


@pytest.mark.parametrize(
  "decoder",
  [
    {"type": "CTC"},
    {"type": "Replace", "pattern": {"Regex": "a+"}, "content": ""},
    {"type": "Strip", "content": " ", "start": 1, "stop": 0},
    {"type": "Sequence", "decoders": [{"type": "Fuse"}, {"type": "BPEDecoder"}]},
    {"type": "Sequence", "decoders": [{"type": "ByteLevel"}, {"type": "ByteFallback"}]},
    3,
  ],
)
def test_other_decoders_are_refused(decoder):
  with pytest.raises(errors.InputError, match="not one effjax reads"):
    token_bytes.Spelling(decoder)
