"""The results table on stdout, for `run`, `sweep` and `report`."""

import json
import pathlib
from collections.abc import Sequence

from effjax.report import compare, result, table, terminal


def show(
  folders: Sequence[pathlib.Path], *, as_json: bool, by: Sequence[str] = ()
) -> None:
  """Prints the table of finished runs, or of groups of them (see compare.read).

  Args:
    folders: of runs and of sweeps.
    as_json: prints what result.json holds instead; a list of it for several runs, and
      a list of groups with their fields and mean rows for groups.
    by: config fields to group by.
  """
  found = compare.read(folders, by)
  if not as_json:
    terminal.show(table.build(found))
  elif any(group.runs for group in found):
    content = [
      {
        "fields": dict(group.fields),
        "stages": list(group.stages),
        "runs": [list(run.stages) for run in group.runs],
      }
      for group in found
    ]
    print(json.dumps(content, indent=2))
  else:
    texts = [(folder / result.FILE).read_text("utf-8") for folder in folders]
    results = [json.loads(text) for text in texts]
    print(json.dumps(results[0] if len(results) == 1 else results, indent=2))
