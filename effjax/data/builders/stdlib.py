"""Python's own standard library, as source code: about 10 MB that need no download.

The files are those of the running interpreter, so the corpus differs between Python
versions; its hash is in the report. Left out: tests, installed packages, files a build
generates (they hold the paths of the build machine) and `pydoc_data` (the manual, as
string literals). Near-duplicates are dropped before the files are split, or the
conversion tables in `encodings` alone would carry training text into validation.
"""

import dataclasses
import io
import os
import pathlib
import platform
import sysconfig
import tokenize
from collections.abc import Iterator
from typing import Any

from effjax.core import errors
from effjax.data import documents
from effjax.data.builders import base

_EXCLUDED_FOLDERS = frozenset(
  ("test", "tests", "idle_test", "site-packages", "dist-packages", "pydoc_data")
)
_GENERATED_PREFIXES = ("_sysconfigdata", "_sysconfig_vars", "config-", "__pycache__")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(base.TextOptions):
  """Near-duplicates are dropped unless asked otherwise."""

  duplicates: str = "near"


class Stdlib(base.TextBuilder):
  """Source files of the standard library; `manual_dir` is another `lib/python3.x`."""

  KEY = "stdlib"
  ORIGIN = "the running Python's own standard library"
  LICENCE = "PSF-2.0"
  Options = Options

  @classmethod
  def check_files(cls, options: Any, manual_dir: str | None) -> None:
    if next(_files(_root(manual_dir)), None) is None:
      raise errors.InputError(
        f"corpus 'stdlib': no .py files in {_root(manual_dir)}; set data.manual_dir to "
        "an unpacked standard library (a folder such as lib/python3.12)"
      )

  @classmethod
  def fingerprint(cls, options: Any, manual_dir: str | None) -> Any:
    root = _root(manual_dir)
    return [(p.relative_to(root).as_posix(), p.stat().st_size) for p in _files(root)]

  def extra_facts(self) -> dict[str, Any]:
    given = self.builder_config.manual_dir is not None
    return {"python": "of manual_dir" if given else platform.python_version()}

  def read_documents(self) -> Iterator[documents.Document]:
    root = _root(self.builder_config.manual_dir)
    for path in _files(root):
      name = path.relative_to(root).as_posix()
      yield documents.Document(name=name, text=_read_source(path))


def _root(manual_dir: str | None) -> pathlib.Path:
  return pathlib.Path(manual_dir or sysconfig.get_path("stdlib"))


def _files(root: pathlib.Path) -> Iterator[pathlib.Path]:
  for folder, subfolders, names in os.walk(root):
    subfolders[:] = sorted(
      name
      for name in subfolders
      if name not in _EXCLUDED_FOLDERS and not name.startswith(_GENERATED_PREFIXES)
    )
    for name in sorted(names):
      if name.endswith(".py") and not name.startswith(_GENERATED_PREFIXES):
        yield pathlib.Path(folder, name)


def _read_source(path: pathlib.Path) -> str:
  """The text of a source file, by the encoding its first lines declare."""
  data = path.read_bytes()
  try:
    encoding, _ = tokenize.detect_encoding(io.BytesIO(data).readline)
    return data.decode(encoding)
  except (SyntaxError, UnicodeDecodeError):
    # A file its own interpreter could not read either: say where it breaks.
    return documents.decode(data, str(path))


TECHNIQUE = Stdlib
