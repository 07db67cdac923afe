"""Scores text or ids with a run: loss, perplexity, bits per byte, and logits.

A text file is cut into the windows the run itself is scored with, so it may be of any
length; ids are scored row by row as they stand, each from an empty context.

Examples:
  effjax score --workdir runs/quickstart --file README.md
  effjax score --workdir runs/quickstart --stage int4 --file README.md --json
  effjax score --workdir runs/quickstart --tokens ids.npy --logits logits.npy
"""

import argparse
import json
import pathlib


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
  parser.add_argument(
    "--logits",
    type=pathlib.Path,
    metavar="OUT.npy",
    help="also write logits [B, L, V], float32 (one row for a text)",
  )
  parser.add_argument("--json", action="store_true", help="print JSON")


def main(args: argparse.Namespace) -> None:
  """Runs the verb."""
  from effjax.recipe import api, scoring

  if args.file is not None:
    text = scoring.read_text(args.file)
    run = api.load(args.workdir, args.stage)
    found = scoring.score_text(run, text, args.logits)
  else:
    ids_BL = scoring.read_tokens(args.tokens)
    run = api.load(args.workdir, args.stage)
    found = scoring.score_tokens(run, ids_BL, args.logits)
  found = {"stage": run.stage, **found}
  if args.json:
    print(json.dumps(found, indent=2))
    return
  for name, value in found.items():
    print(
      f"{name:<14} {value:.6g}" if isinstance(value, float) else f"{name:<14} {value}"
    )
