"""Your own Parquet files, one document a row, in a column you name."""

import dataclasses
import pathlib
from collections.abc import Iterator

import pyarrow as pa
import pyarrow.parquet as pq

from effjax.core import errors
from effjax.data import documents
from effjax.data.builders import _user_files


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(_user_files.FileOptions):
  """Files and the column to read.

  Attributes:
    field: name of the string column that holds the text.
  """

  field: str = "text"


class Parquet(_user_files.FileBuilder):
  """Parquet files; rows without text are passed over."""

  KEY = "parquet"
  SUFFIXES = (".parquet",)
  Options = Options

  def read_documents(self) -> Iterator[documents.Document]:
    for name, split, path in self.named_files():
      for row, text in enumerate(self._column(path)):
        if text is not None:
          yield documents.Document(name=f"{name}#{row}", text=text, split=split)

  def _column(self, path: pathlib.Path) -> Iterator[str | None]:
    field = self.builder_config.options.field
    try:
      with pq.ParquetFile(path) as file:
        schema = file.schema_arrow
        if field not in schema.names:
          raise errors.unknown(f"column of {path}:", field, schema.names)
        kind = schema.field(field).type
        if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
          raise errors.InputError(
            f"{path}: column {field!r} must hold strings, got {kind}"
          )
        for batch in file.iter_batches(batch_size=1024, columns=[field]):
          # Through binary: Arrow does not check that strings are UTF-8.
          binary = pa.large_binary() if pa.types.is_large_string(kind) else pa.binary()
          for value in batch.column(0).cast(binary).to_pylist():
            where = f"{path}, column {field!r}"
            yield None if value is None else documents.decode(value, where)
    except pa.ArrowInvalid as error:
      reason = str(error).splitlines()[0]
      raise errors.InputError(f"{path} is not a Parquet file: {reason}") from None


TECHNIQUE = Parquet
