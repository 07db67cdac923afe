"""How a finished stage gets into the run folder: whole, by one rename."""

import pathlib
import shutil
from typing import Any

from effjax.parallel import hosts
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
    row: of the results table; that of process 0 counts.

  Raises:
    InputError: another process does not see what process 0 wrote.
  """
  partial = target.with_name(f".{target.name}.new")

  def finish() -> None:
    folder.write_json(partial / folder.ROW, row)
    partial.rename(target)

  remove = lambda: shutil.rmtree(partial, ignore_errors=True)
  hosts.told(f"make room for stage {target.name}", remove)
  stages.save_stage(partial, made.model, made.params, made.specs, tokenizer)
  hosts.told(f"write stage {target.name}", finish)
  hosts.see(target)
