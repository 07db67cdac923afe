"""Asks a loaded run the questions of a task."""

from typing import Any

from effjax.measure import tasks
from effjax.recipe import api


def score_task(
  run: api.Run,
  name: str,
  limit: int | None = None,
  seed: int = 0,
  manual_dir: str | None = None,
) -> dict[str, Any]:
  """How often a run gives the right answer to a task's examples.

  Args:
    run: a loaded stage.
    name: key of effjax.data.tasks.
    limit: how many examples, of all in the order of the seed; None for all.
    seed: of that order.
    manual_dir: a folder that holds the task's archive already.

  Returns:
    See `measure.tasks.Questions.ask`.

  Raises:
    InputError: no such task, a run without a tokenizer of text, or an archive that
      cannot be had.
  """
  questions = tasks.Questions(
    task=name, tokenizer=run.tokenizer, limit=limit, seed=seed, manual_dir=manual_dir
  )
  return questions.ask(run.model, run.params, run.config.measure.eval_batch_size)
