"""A data set that tfds has already prepared as ArrayRecord files, read in place."""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

import tensorflow_datasets as tfds

from effjax.core import config, errors
from effjax.data import documents
from effjax.data.builders import _external, base


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
  """Where the text is.

  Attributes:
    field: name of the text feature.
    train: split, or part of one in tfds's notation, such as "train[:95%]".
    validation: the same for validation text, such as "train[95%:]".
  """

  field: str = "text"
  train: str = "train"
  validation: str = "validation"


class TfdsDirectory:
  """`manual_dir` is the version folder, the one that holds dataset_info.json."""

  @classmethod
  def check(cls, options: Mapping[str, Any], manual_dir: str | None) -> Options:
    """Checks folder, format, feature and splits; see `CorpusBuilder.check`."""
    checked = config.build(Options, options, "config.data.options")
    cls._builder(checked, manual_dir)
    return checked

  @classmethod
  def open(cls, options: Mapping[str, Any], manual_dir: str | None) -> base.Corpus:
    """Opens the folder's two splits; see `CorpusBuilder.open`."""
    checked = cls.check(options, manual_dir)
    builder = cls._builder(checked, manual_dir)
    wanted = dict(
      zip(documents.SPLITS, (checked.train, checked.validation), strict=True)
    )
    sources = {
      split: _external.TextRecords(builder.as_data_source(part), checked.field)
      for split, part in wanted.items()
    }
    files = sorted(p for p in pathlib.Path(manual_dir).iterdir() if p.is_file())
    return _external.open_in_place(
      "tfds_directory", sources, files, checked, f"tfds {builder.info.full_name}"
    )

  @classmethod
  def _builder(
    cls, options: Options, manual_dir: str | None
  ) -> tfds.core.DatasetBuilder:
    if (
      manual_dir is None or not pathlib.Path(manual_dir, "dataset_info.json").is_file()
    ):
      raise errors.InputError(
        "corpus 'tfds_directory': set data.manual_dir to a folder that holds "
        f"dataset_info.json, got {manual_dir}"
      )
    builder = tfds.builder_from_directory(manual_dir)
    info = builder.info
    if info.file_format is not tfds.core.FileFormat.ARRAY_RECORD:
      raise errors.InputError(
        f"{manual_dir} holds {info.file_format.value} files; only array_record can be "
        "read at random: prepare it again with file_format='array_record'"
      )
    if options.field not in info.features:
      raise errors.unknown(f"feature of {manual_dir}:", options.field, info.features)
    for part in (options.train, options.validation):
      if part.split("[")[0] not in info.splits:
        raise errors.unknown(f"split of {manual_dir}:", part, info.splits)
    return builder


TECHNIQUE = TfdsDirectory
