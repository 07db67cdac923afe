"""A vocabulary of named symbols, for corpora that are token ids to begin with."""

import json
import pathlib
from collections.abc import Iterable, Sequence

import numpy as np

from effjax.core import errors

START = "|start|"


class Symbols:
  """Symbols separated by spaces, one id each; what a `Tokenizer` is for text.

  Attributes:
    names: the symbol of each id; id 0 starts every example.
    vocab_size: number of ids.
    bos_id, start_id: 0.
    eos_ids: `bos_id`.
    pad_id, chat_template: None.
    add_bos: True.
  """

  bos_id = start_id = 0
  eos_ids = (0,)
  pad_id = None
  add_bos = True
  chat_template = None

  def __init__(self, names: Sequence[str]):
    """Raises InputError unless the names are distinct words that begin with START."""
    self.names = tuple(names)
    self._ids = {name: index for index, name in enumerate(self.names)}
    words = all(name.split() == [name] for name in self.names)
    if not words or len(self._ids) < len(self.names) or self.names[:1] != (START,):
      raise errors.InputError(f"symbols must be distinct words, the first one {START}")
    self.vocab_size = len(self.names)

  def encode(self, text: str, *, special: bool = False) -> list[int]:
    """The ids of symbols separated by white space; START is one of them.

    Raises:
      InputError: a word that is no symbol.
    """
    unknown = next((word for word in text.split() if word not in self._ids), None)
    if unknown is not None:
      raise errors.unknown("symbol", unknown, self.names)
    return [self._ids[word] for word in text.split()]

  def encode_documents(self, texts: Sequence[str]) -> list[np.ndarray]:
    """The ids of each text after `bos_id`, as uint32."""
    return [np.array([self.bos_id, *self.encode(text)], np.uint32) for text in texts]

  def decode(self, ids: Iterable[int]) -> str:
    """The symbols of some ids, `bos_id` left out.

    Raises:
      InputError: an id outside the vocabulary.
    """
    words = []
    for index in ids:
      if not 0 <= index < self.vocab_size:
        raise errors.InputError(
          f"token id {int(index)} is not in the vocabulary (0 to {self.vocab_size - 1})"
        )
      if index != self.bos_id:
        words.append(self.names[index])
    return " ".join(words)

  def decode_bytes(self, ids: Iterable[int]) -> bytes:
    """`decode`, in UTF-8."""
    return self.decode(ids).encode()

  def name(self, index: int) -> str:
    """The symbol of an id, START too.

    Raises:
      InputError: an id outside the vocabulary.
    """
    self.decode([index])
    return self.names[index]

  def save(self, path: str | pathlib.Path) -> None:
    """Writes JSON that `tokenizers.load` reads."""
    pathlib.Path(path).write_text(self.to_json(), encoding="utf-8")

  def to_json(self) -> str:
    """The content of a saved file."""
    return json.dumps({"symbols": self.names})
