"""One's own files: which they are, in what order, and when they changed."""

import dataclasses
import glob
import pathlib
from collections.abc import Iterator
from typing import Any

from effjax.core import errors
from effjax.data.builders import base


@dataclasses.dataclass(frozen=True, kw_only=True)
class FileOptions(base.TextOptions):
  """Which files to read.

  Attributes:
    paths: files, folders (searched below for the corpus's suffixes) or glob patterns;
      relative ones start at `manual_dir` if given. Empty: `manual_dir` itself.
    validation_paths: the same for validation text; empty: split by hash.
  """

  paths: tuple[str, ...] = ()
  validation_paths: tuple[str, ...] = ()


class FileBuilder(base.TextBuilder):
  """A corpus read from the user's own files.

  Class attribute:
    SUFFIXES: of the files a folder is searched for.
  """

  SUFFIXES: tuple[str, ...]
  ORIGIN = "your own files"
  LICENCE = "as you hold it"
  Options = FileOptions

  @classmethod
  def check_files(cls, options: Any, manual_dir: str | None) -> None:
    cls.files(options, manual_dir)

  @classmethod
  def fingerprint(cls, options: Any, manual_dir: str | None) -> Any:
    found = cls.files(options, manual_dir)
    return {split: base.listing(paths.values()) for split, paths in found.items()}

  @classmethod
  def files(
    cls, options: Any, manual_dir: str | None
  ) -> dict[str, dict[str, pathlib.Path]]:
    """The files by split ("" if split by hash) and by name, sorted.

    Raises:
      InputError: a path matches nothing, or no path is given.
    """
    paths = options.paths or (() if manual_dir is None else (".",))
    if not paths:
      raise errors.InputError(
        f"corpus {cls.KEY!r} needs files: set data.options.paths to files, folders or "
        "glob patterns, or data.manual_dir to a folder"
      )
    if not options.validation_paths:
      return {"": cls._expand(paths, manual_dir)}
    validation = cls._expand(options.validation_paths, manual_dir)
    train = cls._expand(paths, manual_dir)
    taken = set(validation.values())
    train = {name: path for name, path in train.items() if path not in taken}
    return {"train": train, "validation": validation}

  @classmethod
  def _expand(
    cls, patterns: tuple[str, ...], manual_dir: str | None
  ) -> dict[str, pathlib.Path]:
    root = pathlib.Path(manual_dir or ".").resolve()
    found: dict[str, pathlib.Path] = {}
    for pattern in patterns:
      place = root / pathlib.Path(pattern).expanduser()
      if place.is_dir():
        matches = [p for p in place.rglob("*") if p.suffix.lower() in cls.SUFFIXES]
      elif place.is_file():
        matches = [place]
      else:
        matches = [pathlib.Path(p) for p in glob.glob(str(place), recursive=True)]
      matches = [p.resolve() for p in matches if p.is_file()]
      if not matches:
        what = f"{'/'.join(cls.SUFFIXES)} files in" if place.is_dir() else "file at"
        raise errors.InputError(f"corpus {cls.KEY!r}: no {what} {place}")
      for path in matches:
        inside = path.is_relative_to(root)
        found[(path.relative_to(root) if inside else path).as_posix()] = path
    return dict(sorted(found.items()))

  def named_files(self) -> Iterator[tuple[str, str | None, pathlib.Path]]:
    """Name, split (None if by hash) and path of every file, in order."""
    source = self.builder_config
    for split, paths in self.files(source.options, source.manual_dir).items():
      for name, path in paths.items():
        yield name, split or None, path
