"""Benchmarks side by side on this machine: effjax bench SUITE.

A timing is never asserted in a test; it is measured here, with what a reader needs to
judge it printed below the table.

Examples:
  effjax bench decode            one model in effjax, llama.cpp and others
  effjax bench loop --json       the training loop's cost outside the compiled step
  effjax bench quantize          error and time of quantizing, beside qwix
  effjax bench mixers --plot mixers.png   every mixer by length, with its curves
  effjax bench decode --quick    tiny shapes: does it run? (the numbers mean nothing)
"""

import argparse
import dataclasses
import json
import pathlib

from effjax.cli import catalog
from effjax.core import errors, registry


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """Declares the arguments of the verb."""
  suites = catalog.entries("benches")
  listed = "; ".join(f"{name}: {summary}" for name, summary in suites.items())
  parser.add_argument("suite", help=listed)
  parser.add_argument("--quick", action="store_true", help="tiny shapes, no meaning")
  parser.add_argument("--plot", metavar="PNG", help="draw the curves of a suite")
  parser.add_argument("--json", action="store_true", help="print JSON")


def main(args: argparse.Namespace) -> None:
  """Runs the verb."""
  suites = registry.names(catalog.BENCHES)
  if args.suite not in suites:
    raise errors.unknown("suite", args.suite, suites)
  bench = registry.find(catalog.BENCHES, args.suite)
  if args.plot and not hasattr(bench, "curves"):
    raise errors.InputError(f"--plot: suite {args.suite!r} has no curves to draw")
  if args.plot and not pathlib.Path(args.plot).parent.is_dir():
    raise errors.InputError(f"--plot {args.plot}: its folder does not exist")
  made = bench(quick=args.quick)
  tables = made if isinstance(made, list) else [made]
  if args.plot:
    tables[0].draw(bench.curves, args.plot)
  if not args.json:
    print("\n\n".join(table.markdown() for table in tables))
    return
  plain = [dataclasses.asdict(table) for table in tables]
  print(json.dumps(plain if isinstance(made, list) else plain[0], indent=2))
