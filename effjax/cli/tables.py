"""The results table on stdout, for `run` and `report`."""

import json
import pathlib
from collections.abc import Sequence

from effjax.report import compare, result, table, terminal


def show(folders: Sequence[pathlib.Path], *, as_json: bool) -> None:
  """Prints the table of finished runs.

  Args:
    folders: run folders.
    as_json: prints what result.json holds instead; a list of it for several runs.
  """
  if not as_json:
    terminal.show(table.build(compare.read(folders)))
    return
  found = [json.loads((folder / result.FILE).read_text("utf-8")) for folder in folders]
  print(json.dumps(found[0] if len(found) == 1 else found, indent=2))
