"""A corpus as token ids on disk: one flat array a split, tokenized once.

A document is `bos_id` and then the ids of its text; document `d` of a split is
`ids[offsets[d] : offsets[d + 1]]`. The arrays are memory-mapped, so opening a corpus
costs nothing and only the pages a batch needs are read.
"""

import dataclasses
import hashlib
import json
import logging
import pathlib
from collections.abc import Iterable, Iterator

import numpy as np

from effjax.data import cache, documents, tokenizers
from effjax.data.builders import base

log = logging.getLogger(__name__)

_VERSION = 1  # Of the layout of the files.
_BLOCK_CHARS = 8_000_000


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenArray:
  """The documents of one split.

  Attributes:
    ids_T: token ids, uint16 or uint32, all documents one after the other.
    offsets_D1: int64, where each document starts, and the end of the last one.
  """

  ids_T: np.ndarray
  offsets_D1: np.ndarray

  @property
  def num_documents(self) -> int:
    """Number of documents."""
    return len(self.offsets_D1) - 1


def tokenizer_for(
  corpus: base.Corpus, kind: str, vocab_size: int
) -> tokenizers.Tokenizer:
  """The tokenizer of a corpus: trained on its training split once, then cached."""
  if kind == "bytes":
    return tokenizers.byte_tokenizer()
  recipe = hashlib.sha256(tokenizers.RECIPE.encode()).hexdigest()[:8]
  name = f"{corpus.facts['hash'][:16]}-{kind}-{vocab_size}-{recipe}"
  folder = cache.folder() / "tokenizers" / name
  with cache.locked(folder):
    if not folder.exists():
      log.info("training a tokenizer of %d ids on %s", vocab_size, corpus.name)
      with cache.replacing(folder) as made:
        trained = tokenizers.train(corpus.texts("train"), vocab_size)
        trained.save(made / "tokenizer.json")
  return tokenizers.load(folder / "tokenizer.json")


def tokenize(
  corpus: base.Corpus, tokenizer: tokenizers.Tokenizer
) -> dict[str, TokenArray]:
  """The token arrays of every split, from the cache if they were made before."""
  used = hashlib.sha256(tokenizer.to_json().encode()).hexdigest()[:16]
  folder = cache.folder() / "tokens" / f"{corpus.facts['hash'][:16]}-{used}-v{_VERSION}"
  with cache.locked(folder):
    if not folder.exists():
      log.info("tokenizing %s", corpus.name)
      with cache.replacing(folder) as made:
        for split in documents.SPLITS:
          _write(made, split, corpus.texts(split), tokenizer)
  return {split: _read(folder, split) for split in documents.SPLITS}


def _write(
  folder: pathlib.Path,
  split: str,
  texts: Iterable[str],
  tokenizer: tokenizers.Tokenizer,
) -> None:
  dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32)
  lengths: list[int] = []
  with open(folder / f"{split}.ids", "wb") as file:
    for block in _blocks(texts):
      for ids in tokenizer.encode_documents(block):
        file.write(ids.astype(dtype).tobytes())
        lengths.append(len(ids))
  offsets = np.concatenate([[0], np.cumsum(np.array(lengths, np.int64))])
  np.save(folder / f"{split}_offsets.npy", offsets.astype(np.int64))
  (folder / f"{split}.json").write_text(json.dumps({"dtype": dtype.name}))


def _read(folder: pathlib.Path, split: str) -> TokenArray:
  dtype = json.loads((folder / f"{split}.json").read_text())["dtype"]
  return TokenArray(
    ids_T=np.memmap(folder / f"{split}.ids", dtype=dtype, mode="r"),
    offsets_D1=np.load(folder / f"{split}_offsets.npy"),
  )


def _blocks(texts: Iterable[str]) -> Iterator[list[str]]:
  """Texts in groups of some millions of characters."""
  block, size = [], 0
  for text in texts:
    block.append(text)
    size += len(text)
    if size >= _BLOCK_CHARS:
      yield block
      block, size = [], 0
  if block:
    yield block
