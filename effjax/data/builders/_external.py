"""Data sets that exist already: read in place, surveyed once, never copied."""

import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from effjax.core import config, errors
from effjax.data import cache, documents
from effjax.data.builders import base


@dataclasses.dataclass(frozen=True)
class TextRecords(Sequence[Mapping[str, Any]]):
  """Random-access records as {"name", "text"}.

  Attributes:
    records: random-access source of bytes, or of mappings with the text in `field`.
    field: key of the text; None if a record is the text itself.
  """

  records: Any
  field: str | None = None

  def __len__(self) -> int:
    return len(self.records)

  def __getitem__(self, index: int) -> Mapping[str, Any]:
    record = self.records[index]
    text = record if self.field is None else record[self.field]
    return {"name": str(index), "text": text}


def open_in_place(
  name: str,
  sources: Mapping[str, TextRecords],
  files: Sequence[pathlib.Path],
  options: Any,
  origin: str,
) -> base.Corpus:
  """A corpus over existing records; counts and hashes them the first time.

  Args:
    name: registry key.
    sources: records of each split.
    files: what the records are read from; a change makes a new survey.
    options: the corpus's options.
    origin: for the report.

  Raises:
    InputError: a split is empty, or a record is not UTF-8 text.
  """
  identity = [name, config.to_dict(options), base.listing(files)]
  digest = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:16]
  folder = cache.folder() / "surveys" / f"{name}-{digest}"
  with cache.locked(folder):
    if not folder.exists():
      with cache.replacing(folder) as made:
        facts = _survey(name, sources)
        (made / "facts.json").write_text(json.dumps(facts))
    facts = json.loads((folder / "facts.json").read_text())
  facts |= {"origin": origin, "licence": "as you hold it"}
  return base.Corpus(name=name, kind="text", sources=sources, facts=facts)


def _survey(name: str, sources: Mapping[str, TextRecords]) -> dict[str, Any]:
  sizes: dict[str, int] = {}
  digests: dict[str, list[bytes]] = {}
  for split, source in sources.items():
    if not len(source):
      raise errors.InputError(f"corpus {name!r} is empty: split {split} has no record")
    sizes[split], digests[split] = 0, []
    for index in range(len(source)):
      text = source[index]["text"]
      documents.decode(text, f"corpus {name!r}, {split} record {index}")
      sizes[split] += len(text)
      digests[split].append(hashlib.sha256(text).digest())
  return {
    "hash": documents.corpus_digest(digests),
    "documents": {split: len(source) for split, source in sources.items()},
    "bytes": sizes,
  }
