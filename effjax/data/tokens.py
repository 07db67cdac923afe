"""A corpus as token ids on disk: one flat array a split, tokenized once.

A document is `bos_id` and then the ids of its text; document `d` of a split is
`ids[offsets[d] : offsets[d + 1]]`. The arrays are memory-mapped, so opening a corpus
costs nothing and only the pages a batch needs are read. Where a corpus is ids to begin
with, a third array says which tokens are answers, the only ones that are scored.
"""

import dataclasses
import hashlib
import json
import logging
import pathlib
from collections.abc import Iterable, Iterator

import numpy as np

from effjax.data import cache, documents, symbols, tokenizers
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
    scored_T: bool, which ids are answers that count; None for text, where all of a
      document but its first do.
  """

  ids_T: np.ndarray
  offsets_D1: np.ndarray
  scored_T: np.ndarray | None = None

  @property
  def num_documents(self) -> int:
    """Number of documents."""
    return len(self.offsets_D1) - 1

  @property
  def num_targets(self) -> int:
    """Tokens that are predicted and count."""
    if self.scored_T is None:
      return len(self.ids_T) - self.num_documents
    return int(np.count_nonzero(self.scored_T))


def tokenizer_for(
  corpus: base.Corpus, kind: str, vocab_size: int
) -> tokenizers.AnyTokenizer:
  """The tokenizer of a corpus: trained on its training split once, then cached."""
  if kind == "ids":
    return symbols.Symbols(corpus.symbols)
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
  corpus: base.Corpus, tokenizer: tokenizers.AnyTokenizer
) -> dict[str, TokenArray]:
  """The token arrays of every split, from the cache if they were made before."""
  used = hashlib.sha256(tokenizer.to_json().encode()).hexdigest()[:16]
  folder = cache.folder() / "tokens" / f"{corpus.facts['hash'][:16]}-{used}-v{_VERSION}"
  with cache.locked(folder):
    if not folder.exists():
      log.info("tokenizing %s", corpus.name)
      with cache.replacing(folder) as made:
        for split in documents.SPLITS:
          if corpus.kind == "tokens":
            _write_examples(made, split, corpus, tokenizer.vocab_size)
          else:
            _write(made, split, corpus.texts(split), tokenizer)
  return {split: _read(folder, split) for split in documents.SPLITS}


def _write(
  folder: pathlib.Path,
  split: str,
  texts: Iterable[str],
  tokenizer: tokenizers.AnyTokenizer,
) -> None:
  dtype = _dtype(tokenizer.vocab_size)
  lengths: list[int] = []
  with open(folder / f"{split}.ids", "wb") as file:
    for block in _blocks(texts):
      for ids in tokenizer.encode_documents(block):
        file.write(ids.astype(dtype).tobytes())
        lengths.append(len(ids))
  _write_layout(folder, split, lengths, dtype)


def _write_examples(
  folder: pathlib.Path, split: str, corpus: base.Corpus, vocab_size: int
) -> None:
  dtype = _dtype(vocab_size)
  source = corpus.sources[split]
  lengths: list[int] = []
  with (
    open(folder / f"{split}.ids", "wb") as ids_file,
    open(folder / f"{split}.scored", "wb") as scored_file,
  ):
    for index in range(len(source)):
      record = source[index]
      ids_file.write(record["tokens"].astype(dtype).tobytes())
      scored_file.write(record["scored"].astype(np.bool_).tobytes())
      lengths.append(len(record["tokens"]))
  _write_layout(folder, split, lengths, dtype)


def _write_layout(
  folder: pathlib.Path, split: str, lengths: list[int], dtype: np.dtype
) -> None:
  offsets = np.concatenate([[0], np.cumsum(np.array(lengths, np.int64))])
  np.save(folder / f"{split}_offsets.npy", offsets.astype(np.int64))
  (folder / f"{split}.json").write_text(json.dumps({"dtype": dtype.name}))


def _read(folder: pathlib.Path, split: str) -> TokenArray:
  dtype = json.loads((folder / f"{split}.json").read_text())["dtype"]
  scored = folder / f"{split}.scored"
  return TokenArray(
    ids_T=np.memmap(folder / f"{split}.ids", dtype=dtype, mode="r"),
    offsets_D1=np.load(folder / f"{split}_offsets.npy"),
    scored_T=np.memmap(scored, np.bool_, mode="r") if scored.exists() else None,
  )


def _dtype(vocab_size: int) -> np.dtype:
  return np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.uint32)


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
