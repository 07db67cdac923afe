"""Scores text, ids or a task with a run: loss, bits per byte, logits, or accuracy.

A text file is cut into the windows the run itself is scored with, so it may be of any
length; ids are scored row by row as they stand, each from an empty context.

Every token but the first is predicted once, after at least context - stride others
(all that there are, at the start); a stride equal to the context cuts the text into
pieces that do not overlap, as many published perplexities do.

A task (effjax list tasks) is labelled text and a question with a few answers. A
language model sees no example before; its answer is the one of the highest
log-likelihood. Of an encoder, a linear probe on its embeddings is fitted on four fifths
of the texts and scored on the others. Compare the accuracy with the majority: what
always giving the most frequent answer would get.

Examples:
  effjax score --workdir runs/quickstart --file README.md
  effjax score --workdir runs/quickstart --stage int4 --file README.md --json
  effjax score --workdir runs/smollm2 --file wiki.txt --context 1024 --stride 1024
  effjax score --workdir runs/quickstart --tokens ids.npy --logits logits.npy
  effjax score --workdir runs/smollm2 --task movie_sentences --limit 200
"""

import argparse
import json
import pathlib
from typing import Any

# What belongs to one kind of source alone.
_ONLY = {
  "context": ("file",),
  "stride": ("file",),
  "logits": ("file", "tokens"),
  "limit": ("task",),
  "manual_dir": ("task",),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """Declares the arguments of the verb."""
  parser.add_argument(
    "--workdir", type=pathlib.Path, required=True, metavar="DIR", help="the run folder"
  )
  parser.add_argument("--stage", metavar="NAME", help="default: the last finished one")
  source = parser.add_mutually_exclusive_group(required=True)
  source.add_argument("--file", type=pathlib.Path, metavar="TEXT", help="UTF-8 text")
  source.add_argument(
    "--tokens",
    type=pathlib.Path,
    metavar="IDS.npy",
    help="integer ids, [B, L] or [L]; the first of a row is context only",
  )
  source.add_argument("--task", metavar="NAME", help="one of: effjax list tasks")
  parser.add_argument(
    "--context",
    type=int,
    metavar="N",
    help="of --file: tokens the model sees at once; default: as the run was scored",
  )
  parser.add_argument(
    "--stride",
    type=int,
    metavar="N",
    help="of --file: tokens a window moves on; default: half of the context",
  )
  parser.add_argument(
    "--logits",
    type=pathlib.Path,
    metavar="OUT.npy",
    help="also write logits [B, L, V], float32 (one row for a text)",
  )
  parser.add_argument(
    "--limit",
    type=int,
    metavar="N",
    help="of --task: the first N examples of an order that never changes; default: all",
  )
  parser.add_argument(
    "--manual-dir",
    metavar="DIR",
    help="of --task: holds the task's package already; nothing is fetched",
  )
  parser.add_argument("--json", action="store_true", help="print JSON")


def main(args: argparse.Namespace) -> None:
  """Runs the verb."""
  from effjax.data.tasks import base
  from effjax.recipe import api, scoring, tasks

  _check_options(args)
  if args.file is not None:
    text = scoring.read_text(args.file)
    run = api.load(args.workdir, args.stage)
    found = scoring.score_text(run, text, args.logits, args.context, args.stride)
  elif args.tokens is not None:
    ids_BL = scoring.read_tokens(args.tokens)
    run = api.load(args.workdir, args.stage)
    found = scoring.score_tokens(run, ids_BL, args.logits)
  else:
    base.find(args.task)  # A wrong name should not wait for the weights.
    run = api.load(args.workdir, args.stage)
    found = tasks.score_task(
      run, args.task, limit=args.limit, manual_dir=args.manual_dir
    )
  found = {"stage": run.stage, **found}
  if args.json:
    print(json.dumps(found, indent=2))
    return
  found.pop("about", None)
  for name, value in found.items():
    print(f"{name:<14} {_show(value)}")


def _check_options(args: argparse.Namespace) -> None:
  """Raises InputError if an option does not belong to what is scored."""
  from effjax.core import errors

  source = next(s for s in ("file", "tokens", "task") if getattr(args, s) is not None)
  for option, sources in _ONLY.items():
    if getattr(args, option) is not None and source not in sources:
      flags = " or ".join(f"--{name}" for name in sources)
      raise errors.InputError(
        f"--{option.replace('_', '-')} goes with {flags}, not with --{source}"
      )


def _show(value: Any) -> str:
  if isinstance(value, dict):
    return ", ".join(f"{name} {_show(inner)}" for name, inner in value.items())
  return f"{value:.6g}" if isinstance(value, float) else f"{value}"
