"""Documents before tfds: decoding, duplicates, and which split each belongs to."""

import dataclasses
import hashlib
from collections.abc import Iterable, Mapping, Sequence

from effjax.core import errors
from effjax.data import near_duplicates

SPLITS = ("train", "validation")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Document:
  """One text, the unit that is packed, shuffled and never split between splits.

  Attributes:
    name: unique, stable between machines (a relative path, or path and row).
    text: the content.
    split: "train" or "validation" where the corpus decides, else None.
  """

  name: str
  text: str
  split: str | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Entry:
  """A document that is kept: its place in the corpus's own order, and its part.

  `start` and `stop` are characters; they cover the whole text unless a corpus of one
  single document had to be cut in two.
  """

  index: int
  start: int = 0
  stop: int | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Survey:
  """What one pass over a corpus found.

  Attributes:
    splits: the entries of each split, in order.
    num_bytes: UTF-8 bytes of each split.
    digest: SHA-256 over the SHA-256 of every kept text, split by split, in order.
    dropped: number of documents dropped, by reason: blank, exact, near.
  """

  splits: dict[str, tuple[Entry, ...]]
  num_bytes: dict[str, int]
  digest: str
  dropped: dict[str, int]


def decode(data: bytes, name: str, offset: int = 0) -> str:
  """Bytes of a user's file as text.

  Args:
    data: the bytes.
    name: of the file, for the error.
    offset: where `data` starts in the file.

  Raises:
    InputError: not UTF-8; the message says where.
  """
  try:
    return data.decode("utf-8")
  except UnicodeDecodeError as error:
    raise errors.InputError(
      f"{name} is not UTF-8 text: byte 0x{data[error.start]:02x} at offset "
      f"{offset + error.start}; convert it first, for example with "
      "`iconv -f latin1 -t utf-8`"
    ) from None


def corpus_digest(digests: Mapping[str, Sequence[bytes]]) -> str:
  """SHA-256 of a corpus, from the SHA-256 of each text of each split, in order."""
  total = hashlib.sha256()
  for split in SPLITS:
    total.update(f"{split} {len(digests[split])}\n".encode())
    total.update(b"".join(digests[split]))
  return total.hexdigest()


def hash_fraction(name: str) -> float:
  """A number in [0, 1) that depends on nothing but the name."""
  digest = hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()
  return int.from_bytes(digest[:8], "big") / 2**64


def survey(
  documents: Iterable[Document],
  *,
  corpus: str,
  duplicates: str = "exact",
  similarity: float = 0.3,
  validation_fraction: float = 0.05,
) -> Survey:
  """Decides which documents are kept and which split each of them belongs to.

  A document goes to validation if the hash of its name falls below
  `validation_fraction`, unless the corpus assigns splits itself. So adding a document
  moves no other one. Of several equal (or similar) documents the first stays.

  Args:
    documents: in the corpus's own, fixed order.
    corpus: its name, for errors.
    duplicates: "keep", "exact" (drop equal texts) or "near" (also similar ones).
    similarity: estimated Jaccard similarity from which "near" drops a document.
    validation_fraction: expected share of the documents, in (0, 1).

  Raises:
    InputError: no document is left.
  """
  dropped = {"blank": 0, "exact": 0, "near": 0}
  seen: set[bytes] = set()
  similar = near_duplicates.Index(similarity) if duplicates == "near" else None
  kept: list[tuple[int, Document, bytes, int]] = []
  for index, document in enumerate(documents):
    data = document.text.encode()
    digest = hashlib.sha256(data).digest()
    if not document.text.strip():
      dropped["blank"] += 1
    elif duplicates != "keep" and digest in seen:
      dropped["exact"] += 1
    elif similar is not None and similar.add(document.text) is not None:
      dropped["near"] += 1
    else:
      seen.add(digest)
      name_only = dataclasses.replace(document, text="")
      kept.append((index, name_only, digest, len(data)))
      last = document
  if not kept:
    raise errors.InputError(f"corpus {corpus!r} is empty: no document holds any text")
  if len(kept) == 1 and last.split is None:
    return _cut(kept[0][0], last, corpus, dropped, validation_fraction)
  return _assign(kept, corpus, dropped, validation_fraction)


def _assign(
  kept: list[tuple[int, Document, bytes, int]],
  corpus: str,
  dropped: dict[str, int],
  fraction: float,
) -> Survey:
  assigned: list[str | None] = [document.split for _, document, _, _ in kept]
  if not any(assigned):
    fractions = [hash_fraction(document.name) for _, document, _, _ in kept]
    # Even a corpus of two documents gets one of each.
    ranks = sorted(fractions)
    threshold = min(max(fraction, ranks[1]), ranks[-1])
    assigned = [SPLITS[fraction < threshold] for fraction in fractions]
  splits: dict[str, list[Entry]] = {split: [] for split in SPLITS}
  digests: dict[str, list[bytes]] = {split: [] for split in SPLITS}
  num_bytes = dict.fromkeys(SPLITS, 0)
  for (index, _, digest, size), split in zip(kept, assigned, strict=True):
    split = split or "train"
    splits[split].append(Entry(index=index))
    digests[split].append(digest)
    num_bytes[split] += size
  for split, entries in splits.items():
    if not entries:
      raise errors.InputError(f"corpus {corpus!r} has no {split} document")
  return _summarize(splits, digests, num_bytes, dropped)


def _cut(
  index: int,
  document: Document,
  corpus: str,
  dropped: dict[str, int],
  fraction: float,
) -> Survey:
  """A single document: its last part is the validation text, cut after a line."""
  text = document.text
  middle = min(max(round(len(text) * (1 - fraction)), 1), len(text) - 1)
  line_end = text.find("\n", middle, len(text) - 1)
  middle = line_end + 1 if line_end >= 0 else middle
  parts = {"train": text[:middle], "validation": text[middle:]}
  if not parts["train"].strip() or not parts["validation"].strip():
    raise errors.InputError(
      f"corpus {corpus!r} is one document of {len(text)} characters, too short to "
      "be split into training and validation text"
    )
  data = {split: part.encode() for split, part in parts.items()}
  return _summarize(
    {
      "train": [Entry(index=index, stop=middle)],
      "validation": [Entry(index=index, start=middle)],
    },
    {split: [hashlib.sha256(value).digest()] for split, value in data.items()},
    {split: len(value) for split, value in data.items()},
    dropped,
  )


def _summarize(
  splits: dict[str, list[Entry]],
  digests: dict[str, list[bytes]],
  num_bytes: dict[str, int],
  dropped: dict[str, int],
) -> Survey:
  return Survey(
    splits={split: tuple(entries) for split, entries in splits.items()},
    num_bytes=num_bytes,
    digest=corpus_digest(digests),
    dropped=dropped,
  )
