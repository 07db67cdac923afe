"""Byte-level byte-pair encoding: every text has ids, and its ids give it back exactly.

Source: Sennrich et al. 2016, arXiv:1508.07909 (byte-pair encoding), over bytes as in
Radford et al. 2019 (GPT-2); the `tokenizers` library learns and applies the merges.
Deviations: text is first cut where merges must not reach across, by a pattern made for
source code and prose alike: a word takes along one character before it (a space, `.`,
`(` or `_`), and a line break takes along the indentation of the next line, so that the
most frequent thing in source code is one token. Digits come at most three together.

Id 0 starts a document (`bos_id`). It is an entry of the vocabulary that no text can
spell, so text that contains the characters of its name is encoded as any other.
"""

import json
import pathlib
from collections.abc import Iterable, Sequence

import numpy as np
import tokenizers as hf

from effjax.core import config, errors
from effjax.data import (
  pretrained_folder,
  pretrained_tokenizer,
  symbols,
  token_bytes,
)

# The space keeps these names apart from learned tokens, whose spaces are written "Ġ".
BOS = "<|document start|>"
_UNUSED = "<|unused {}|>"
_NUM_BYTES = 256
_PATTERN = (
  r"[^\r\n\p{L}\p{N}]?\p{L}+"
  r"|\p{N}{1,3}"
  r"| ?[^\s\p{L}\p{N}]+(?:(?:\r?\n)+[ \t]*)?"
  r"|(?:[ \t]*\r?\n)+[ \t]*"
  r"|[ \t]+(?=\S)"
  r"|\s+"
)
# Of what training depends on beside the texts and the size: part of the cache's key.
RECIPE = f"{BOS}{_UNUSED}{_PATTERN}"
# Longer texts are encoded in parts that end with a line: the library keeps more than
# a hundred bytes a token while it works.
_PART_CHARS = 1 << 20


class Tokenizer:
  """Text to ids and back.

  Attributes:
    vocab_size: number of ids; some may be unused if the corpus was small.
    bos_id: the id that starts every document.
    eos_ids: `bos_id`: where the next document starts, this one has ended.
    pad_id, chat_template: None.
    add_bos: True.
    start_id: `bos_id`.
    prefix_ids, suffix_ids: `bos_id`, and nothing: what an encoder reads around a text.
  """

  pad_id = None
  add_bos = True
  chat_template = None

  def __init__(self, backend: hf.Tokenizer):
    """Wraps a byte-level tokenizer of the `tokenizers` library that knows `BOS`."""
    self._backend = backend
    self.vocab_size: int = backend.get_vocab_size(with_added_tokens=True)
    bos_id = backend.token_to_id(BOS)
    if bos_id is None:
      raise errors.InputError(f"the tokenizer has no {BOS} token to start a document")
    self.bos_id = self.start_id = bos_id
    self.eos_ids = self.prefix_ids = (bos_id,)
    self.suffix_ids = ()
    byte_of = {char: byte for byte, char in enumerate(token_bytes.byte_alphabet())}
    self._bytes_of = [b""] * self.vocab_size
    for token, index in backend.get_vocab().items():
      if all(char in byte_of for char in token):
        self._bytes_of[index] = bytes(byte_of[char] for char in token)

  def encode(self, text: str, *, special: bool = False) -> list[int]:
    """The ids of a text, without `bos_id`, which text cannot spell either way."""
    ids: list[int] = []
    for part in _parts(text):
      ids += self._backend.encode(part, add_special_tokens=False).ids
    return ids

  def encode_documents(self, texts: Sequence[str]) -> list[np.ndarray]:
    """The ids of each text after `bos_id`, as uint32, on all cores."""
    parts = [_parts(text) for text in texts]
    flat = [part for group in parts for part in group]
    encoded = iter(self._backend.encode_batch_fast(flat, add_special_tokens=False))
    documents = []
    for group in parts:
      ids = [self.bos_id]
      for _ in group:
        ids += next(encoded).ids
      documents.append(np.array(ids, np.uint32))
    return documents

  def decode_bytes(self, ids: Iterable[int]) -> bytes:
    """The bytes of some ids; `bos_id` and unused ids have none.

    Raises:
      InputError: an id outside the vocabulary.
    """
    pieces = []
    for index in ids:
      if not 0 <= index < self.vocab_size:
        raise errors.InputError(
          f"token id {int(index)} is not in the vocabulary (0 to {self.vocab_size - 1})"
        )
      pieces.append(self._bytes_of[index])
    return b"".join(pieces)

  def decode(self, ids: Iterable[int]) -> str:
    """The text of some ids; bytes that form no character become U+FFFD."""
    return self.decode_bytes(ids).decode("utf-8", errors="replace")

  def name(self, index: int) -> str:
    """How the vocabulary writes an id.

    Raises:
      InputError: an id outside the vocabulary.
    """
    self.decode_bytes([index])
    return self._backend.id_to_token(index)

  def save(self, path: str | pathlib.Path) -> None:
    """Writes the `tokenizers` library's JSON format."""
    pathlib.Path(path).write_text(self.to_json(), encoding="utf-8")

  def to_json(self) -> str:
    """The content of a saved file."""
    return self._backend.to_str()


byte_alphabet = token_bytes.byte_alphabet
AnyTokenizer = Tokenizer | symbols.Symbols | pretrained_tokenizer.Pretrained
from_hf_folder = pretrained_folder.from_hf_folder


def load(path: str | pathlib.Path) -> AnyTokenizer:
  """Reads what `save` of a Tokenizer, Symbols or Pretrained wrote.

  Raises:
    InputError: the file is missing or is not such a tokenizer.
  """
  path = pathlib.Path(path)
  if not path.is_file():
    raise errors.InputError(f"tokenizer file {path} is missing")
  try:
    content = json.loads(path.read_bytes())
  except ValueError as error:
    raise errors.InputError(f"{path} is not a tokenizer file: {error}") from None
  if isinstance(content, dict) and isinstance(content.get("symbols"), list):
    return symbols.Symbols(content["symbols"])
  if isinstance(content, dict) and content.get("format") == pretrained_tokenizer.FORMAT:
    try:
      return pretrained_tokenizer.from_content(content)
    except errors.InputError as error:
      raise errors.InputError(f"{path}: {error}") from None
  model = content.get("model") if isinstance(content, dict) else None
  vocab = model.get("vocab") if isinstance(model, dict) else None
  if not isinstance(vocab, dict) or BOS not in vocab:
    raise errors.InputError(
      f"{path} is not a tokenizer file: it has no {BOS} token, no symbols and no "
      f'"format": "{pretrained_tokenizer.FORMAT}"'
    )
  return Tokenizer(hf.Tokenizer.from_str(json.dumps(content)))


def train(texts: Iterable[str], vocab_size: int) -> Tokenizer:
  """Learns merges from texts: the same texts in any order of threads, the same merges.

  Args:
    texts: the training split, and nothing else.
    vocab_size: ids in all: `bos_id`, 256 bytes, and merges. A corpus too small for
      that many merges leaves the last ids unused.

  Raises:
    InputError: `vocab_size` below 257.
  """
  config.require(
    vocab_size > _NUM_BYTES,
    f"vocab_size must be at least {_NUM_BYTES + 1}, got {vocab_size}",
  )
  backend = hf.Tokenizer(hf.models.BPE())
  backend.pre_tokenizer = _pre_tokenizer()
  trainer = hf.trainers.BpeTrainer(
    vocab_size=vocab_size - 1,
    initial_alphabet=list(token_bytes.byte_alphabet()),
    show_progress=False,
  )
  backend.train_from_iterator(texts, trainer)
  model = json.loads(backend.to_str())["model"]
  learned = sorted(model["vocab"], key=model["vocab"].get)[_NUM_BYTES:]
  merges = [tuple(pair) for pair in model["merges"]]
  return _assemble(learned, merges, vocab_size)


def byte_tokenizer() -> Tokenizer:
  """One id a byte: id `b + 1` is byte `b`."""
  return _assemble([], [], _NUM_BYTES + 1)


def _assemble(
  learned: list[str], merges: list[tuple[str, str]], vocab_size: int
) -> Tokenizer:
  """A tokenizer whose ids are: `BOS`, the bytes in order, learned tokens, unused."""
  names = [BOS, *token_bytes.byte_alphabet(), *learned]
  names += [_UNUSED.format(index) for index in range(len(names), vocab_size)]
  vocab = {name: index for index, name in enumerate(names)}
  backend = hf.Tokenizer(hf.models.BPE(vocab, merges))
  backend.pre_tokenizer = _pre_tokenizer()
  backend.decoder = hf.decoders.ByteLevel()
  return Tokenizer(backend)


def _pre_tokenizer() -> hf.pre_tokenizers.PreTokenizer:
  to_bytes = hf.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
  cut = hf.pre_tokenizers.Split(hf.Regex(_PATTERN), behavior="isolated")
  return hf.pre_tokenizers.Sequence([cut, to_bytes])


def _parts(text: str) -> list[str]:
  """A text in parts of about a million characters, each but the last ending a line."""
  parts, start = [], 0
  while len(text) - start > _PART_CHARS:
    line_end = text.rfind("\n", start, start + _PART_CHARS)
    stop = line_end + 1 if line_end >= start else start + _PART_CHARS
    parts.append(text[start:stop])
    start = stop
  return [*parts, text[start:]]
