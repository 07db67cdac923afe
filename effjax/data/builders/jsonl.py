"""Your own JSON Lines files, one document a line, in a field you name."""

import dataclasses
import json
from collections.abc import Iterator
from typing import Any

from effjax.core import errors
from effjax.data import documents
from effjax.data.builders import _user_files


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(_user_files.FileOptions):
  """Files and the field to read.

  Attributes:
    field: key of each line's object that holds the text.
  """

  field: str = "text"


class Jsonl(_user_files.FileBuilder):
  """Files of one JSON object a line; blank lines are passed over."""

  KEY = "jsonl"
  SUFFIXES = (".jsonl", ".ndjson")
  Options = Options

  def read_documents(self) -> Iterator[documents.Document]:
    for name, split, path in self.named_files():
      offset = 0
      with open(path, "rb") as file:
        for number, data in enumerate(file, start=1):
          line = documents.decode(data, str(path), offset)
          offset += len(data)
          if line.strip():
            text = self._text(line, f"{path}, line {number}")
            yield documents.Document(name=f"{name}#{number}", text=text, split=split)

  def _text(self, line: str, where: str) -> str:
    field = self.builder_config.options.field
    try:
      value: Any = json.loads(line)
    except json.JSONDecodeError as error:
      raise errors.InputError(f"{where} is not JSON: {error.msg}") from None
    if not isinstance(value, dict):
      raise errors.InputError(f"{where} is not a JSON object")
    if field not in value:
      raise errors.unknown(f"field of {where}:", field, value)
    if not isinstance(value[field], str):
      kind = type(value[field]).__name__
      raise errors.InputError(f"{where}: field {field!r} must be a string, got {kind}")
    return value[field]


TECHNIQUE = Jsonl
