"""ArrayRecord files whose records are UTF-8 texts, read in place."""

import dataclasses
import glob
import pathlib
from collections.abc import Mapping
from typing import Any

import grain

from effjax.core import config, errors
from effjax.data import documents
from effjax.data.builders import _external, base


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
  """Which files.

  Attributes:
    train: glob pattern, relative to `manual_dir`.
    validation: the same for validation text.
  """

  train: str = "train*.array_record*"
  validation: str = "validation*.array_record*"


class ArrayRecord:
  """`manual_dir` is the folder with the files of both splits."""

  @classmethod
  def check(cls, options: Mapping[str, Any], manual_dir: str | None) -> Options:
    """Checks that both patterns match; see `CorpusBuilder.check`."""
    checked = config.build(Options, options, "config.data.options")
    cls._files(checked, manual_dir)
    return checked

  @classmethod
  def open(cls, options: Mapping[str, Any], manual_dir: str | None) -> base.Corpus:
    """Opens the files of both splits; see `CorpusBuilder.open`."""
    checked = cls.check(options, manual_dir)
    files = cls._files(checked, manual_dir)
    sources = {
      split: _external.TextRecords(
        grain.sources.ArrayRecordDataSource([str(path) for path in paths])
      )
      for split, paths in files.items()
    }
    every = [path for paths in files.values() for path in paths]
    return _external.open_in_place(
      "array_record", sources, every, checked, f"ArrayRecord files in {manual_dir}"
    )

  @classmethod
  def _files(
    cls, options: Options, manual_dir: str | None
  ) -> dict[str, list[pathlib.Path]]:
    if manual_dir is None or not pathlib.Path(manual_dir).is_dir():
      raise errors.InputError(
        f"corpus 'array_record': set data.manual_dir to a folder, got {manual_dir}"
      )
    found = {}
    for split in documents.SPLITS:
      pattern = getattr(options, split)
      matches = glob.glob(pattern, root_dir=manual_dir)
      if not matches:
        raise errors.InputError(
          f"corpus 'array_record': no file matches {pattern!r} in {manual_dir}"
        )
      found[split] = [pathlib.Path(manual_dir, name) for name in sorted(matches)]
    return found


TECHNIQUE = ArrayRecord
