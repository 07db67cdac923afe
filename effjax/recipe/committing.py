"""How a finished stage gets into the run folder: whole, by one rename."""

import pathlib
import shutil
from typing import Any

from effjax.recipe import folder
from effjax.recipe import session as session_lib
from effjax.train import stages


def commit(
  target: pathlib.Path, made: session_lib.Made, tokenizer: Any, row: dict[str, Any]
) -> None:
  """Saves model, parameters, tokenizer and row; they appear together.

  Args:
    target: the stage's folder.
    made: what the stage made.
    tokenizer: or None.
    row: of the results table.
  """
  partial = target.with_name(f".{target.name}.new")
  shutil.rmtree(partial, ignore_errors=True)
  stages.save_stage(partial, made.model, made.params, made.specs, tokenizer)
  folder.write_json(partial / folder.ROW, row)
  partial.rename(target)
