"""Runs a recipe: stage by stage, each measured, saved by one rename, and resumable.

A stage is finished when its folder exists; the folder holds the stage's row of the
table too (`row.json`), so a run that was killed anywhere goes on at the stage, and in a
training at the step, where it stopped.
"""

import contextlib
import pathlib
import signal
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax

from effjax.core import config as core_config
from effjax.core import errors
from effjax.data import pipeline
from effjax.measure import baselines, memory, rows
from effjax.parallel import hosts
from effjax.recipe import (
  committing,
  environment,
  export_stage,
  files,
  folder,
  import_stage,
  rewind_stage,
  sharing,
  train_stage,
  transform_stage,
)
from effjax.recipe import config as config_lib
from effjax.recipe import plan as plan_lib
from effjax.recipe import session as session_lib
from effjax.report import folder as report
from effjax.train import signals

# A compiled program takes tens of memory maps, of which Linux gives a process 65,530: a
# recipe of a hundred stages fills them. What is compiled stays on disk.
_STAGES_A_JIT_CACHE = 25


def run(
  reference: str,
  changes: Sequence[str] = (),
  *,
  workdir: pathlib.Path | None = None,
  fresh: bool = False,
  until: str | None = None,
  profile: bool = False,
) -> pathlib.Path:
  """Runs a recipe, or resumes it, and returns its run folder.

  Several processes (see parallel.launch) make this same call; process 0 writes.

  Args:
    reference: config file and argument, such as "configs/quickstart.py:smoke".
    changes: overrides such as "--config.stages[2].options.bits=3".
    workdir: run folder; `runs/<config>[-<arg>]` if None.
    fresh: deletes an earlier run in that folder first.
    until: name of the last stage to run; None for all, and the report.
    profile: traces some steps of every training into `profile/`.

  Raises:
    InputError: anything wrong with the input, before the run folder is touched.
    DivergedError: a loss stopped being finite.
    StoppedError: SIGTERM or SIGINT came; the same call resumes.
    OSError: the disk is full (ENOSPC); what was saved before is whole.
    LostError: another process did not come to a point where all must be.
  """
  config = config_lib.load(reference, changes)
  plan = plan_lib.make(config)
  last = _last(config, until)
  root = workdir or files.default_workdir(reference)
  plain = core_config.to_dict(config)
  sharing.check(plan)
  hosts.told("look at the run folder", lambda: folder.check(root, plain, fresh))
  sharing.check_transforms(plan, root, last)
  environment.keep_compiled()
  tokenizer = config.source.tokenizer if config.imported else None
  data = pipeline.open_data(config.data, *plan.spread.share(), tokenizer)
  questions = session_lib.questions_of(config, data.tokenizer)
  if questions is not None:
    questions.examples()  # What cannot be fetched shows now.
  if hosts.several():
    session_lib.say(sharing.describe(plan))
  for line in sharing.notes(plan):
    session_lib.say(line)
  with folder.opened(root, plain, changes, fresh), _stoppable():
    session = session_lib.Session(plan=plan, data=data, root=root, profile=profile)
    _note_environment(session)
    table = [_stage(session, i) for i in range(last + 1)]
    if last + 1 == len(config.stages):
      hosts.told("write the report", lambda: _report(session, table))
  return root


def _last(config: config_lib.Config, until: str | None) -> int:
  """Number of the last stage to run."""
  names = [stage.name for stage in config.stages]
  if until is None:
    return len(names) - 1
  if until not in names:
    raise errors.unknown("stage of --until", until, names)
  return names.index(until)


def _stage(session: session_lib.Session, index: int) -> dict[str, Any]:
  """Runs, measures and saves a stage, unless that was done; returns its row.

  Of several processes the row of process 0 is the one that is saved and shown.
  """
  signals.check()
  config = session.config
  stage, target = config.stages[index], session.folder(index)
  title = f"[{index + 1}/{len(config.stages)}] {stage.name}"
  if hosts.told(f"look for stage {stage.name}", target.exists):
    session_lib.say(f"{title}: done before")
    hosts.see(target)
    return folder.read_json(target / folder.ROW)
  parent = config.parent(index)
  after = None if parent is None else config.stages[parent].name
  if stage.technique == config_lib.IMPORT:
    start = f"of {config.imported.source}"
  else:
    start = f"after {after}" if after else "from a fresh model"
  session_lib.say(f"{title}: {stage.technique} {start}")
  peak = memory.Peak()
  kinds = {
    config_lib.TRAIN: train_stage,
    config_lib.IMPORT: import_stage,
    config_lib.EXPORT: export_stage,
    config_lib.REWIND: rewind_stage,
  }
  made = kinds.get(stage.technique, transform_stage).run(session, index)
  about = rows.Stage(
    name=stage.name,
    technique=stage.technique,
    after=after,
    num_weights=session.plan.num_params,
    seed=config.seed,
    corpus=session.corpus,
    stage_secs=made.secs,
    peak_memory_bytes=peak.read(),
  )
  row = rows.measure_stage(
    made.model,
    made.params,
    session.data.eval_set,
    config.measure,
    about,
    session.questions,
    session.plan.spread,
    signals.check,
  )
  if made.bytes_on_disk is not None:
    row |= {"bytes_on_disk": made.bytes_on_disk}
  committing.commit(target, made, session.data.tokenizer, row)
  session_lib.say(f"{title}: {_summary(row)}")
  if (index + 1) % _STAGES_A_JIT_CACHE == 0:
    jax.clear_caches()
  return row


def _report(session: session_lib.Session, table: Sequence[dict[str, Any]]) -> None:
  """Writes the reports and, last, result.json, unless that was done."""
  if (session.root / folder.RESULT).exists():
    return
  session_lib.say("report: compressors on the same text if there is any, tables, plots")
  data, lines = session.data, []
  if any(row["quality"].get("num_bytes") is not None for row in table):
    lines = baselines.measure(
      data.eval_set.text, data.train_text(), session.config.measure.xz_preset
    )
  report.write(session.root, table, lines, data.facts)


def _summary(row: dict[str, Any]) -> str:
  decode_ms = row["decode_ms_p50"]
  parts = [
    *_scores(row["quality"]),
    f"{row['bits_per_weight']:.2f} bits/weight",
    f"{row['bytes_held'] / 1e6:.2f} MB",
  ]
  if decode_ms is not None:
    parts.append(f"{decode_ms:.2f} ms/token")
  return ", ".join(parts)


def _scores(quality: Mapping[str, Any]) -> Iterator[str]:
  """What was scored, in words."""
  for name, words in (
    ("bits_per_byte", "{:.4f} bits/byte"),
    ("accuracy", "{:.2%} right"),
  ):
    answers_only = name == "bits_per_byte" and quality.get("num_bytes") is None
    if name in quality and not answers_only:
      value = quality[name]
      yield "not finite" if value is None else words.format(value)


def _note_environment(session: session_lib.Session) -> None:
  """Writes env.json; a resumed run must read the same text as before.

  Raises:
    InputError: the corpus is not the one the run began with, or not the same in every
      process.
  """
  corpus = session.data.facts["hash"]
  fix = "give every host the same files, Python and effjax"
  hosts.agree("the hash of the corpus", corpus, fix)
  hosts.told("write env.json", lambda: _write_environment(session))


def _write_environment(session: session_lib.Session) -> None:
  path = session.root / "env.json"
  now = environment.describe() | {"corpus": session.data.facts}
  if session.config.imported:
    now |= session.config.source.origin
  if session.questions is not None:
    now["task"] = session.questions.record
  if path.exists():
    before = folder.read_json(path)
    if before == now:
      return
    old, new = before["corpus"]["hash"], now["corpus"]["hash"]
    if old != new:
      raise errors.InputError(
        f"{session.root} was begun on corpus {old[:12]}, now {new[:12]} (other "
        "files or Python); choose another --workdir, or --fresh to start over"
      )
    for line in core_config.differences(before, now, "env"):
      session_lib.say(f"resuming in another environment: {line}")
  folder.write_json(path, now)


@contextlib.contextmanager
def _stoppable() -> Iterator[None]:
  """Between trainings a signal ends the run at once: finished stages are saved.

  In a training the loop's own handlers take over, and save. Several processes stop
  together: before a stage, or while its quality is measured.
  """

  def stop(number: signal.Signals) -> None:
    # Not an Exception: no library between here and the runner may catch it.
    raise signals.Interrupted(number.name)

  try:
    with signals.caught(stop):
      yield
  except signals.Interrupted as interrupted:
    raise errors.StoppedError(
      f"stopped by {interrupted}; finished stages are saved: the same command resumes"
    ) from None
