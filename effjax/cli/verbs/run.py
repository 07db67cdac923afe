"""Runs a recipe: trains, compresses, measures each stage and writes the report.

The same command again resumes at the stage and step where it stopped, also after
kill -9. A config file is Python code and runs with your rights: run only files you
trust.

Examples:
  effjax run --config configs/quickstart.py:smoke
  effjax run --config configs/quickstart.py --workdir runs/seed-1 --config.seed=1
  effjax run --config configs/quickstart.py --config.stages[3].options.bits=3 --fresh
"""

import argparse
import pathlib


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """Declares the arguments of the verb."""
  parser.add_argument(
    "--config", required=True, metavar="FILE[:ARG]", help="the recipe"
  )
  parser.add_argument(
    "--workdir",
    type=pathlib.Path,
    metavar="DIR",
    help="run folder; default: runs/<config>[-<arg>]",
  )
  parser.add_argument(
    "--fresh", action="store_true", help="delete an earlier run in that folder first"
  )
  parser.add_argument(
    "--profile",
    action="store_true",
    help="trace a few steps of each training into DIR/profile",
  )
  parser.add_argument("--json", action="store_true", help="print result.json")


def main(args: argparse.Namespace) -> None:
  """Runs the verb."""
  from effjax.cli import tables
  from effjax.recipe import runner

  root = runner.run(
    args.config,
    args.overrides,
    workdir=args.workdir,
    fresh=args.fresh,
    profile=args.profile,
  )
  tables.show([root], as_json=args.json)
