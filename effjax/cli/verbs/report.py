"""The table, the Pareto plot and the HTML page of finished runs, one or several.

Writes report.md, report.html and pareto.png: for one run or sweep into its folder, for
several, side by side, into another. Trials of a sweep that differ in the seed only are
one row, with means and standard deviations; --by groups runs by any config fields.

Examples:
  effjax report runs/quickstart
  effjax report runs/quickstart runs/seed-1 --out runs/compared
  effjax report runs/quickstart --json
  effjax report runs/sweeps/parameters
  effjax report runs/a runs/b runs/c --by model.embed_dim
"""

import argparse
import pathlib
import sys


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """Declares the arguments of the verb."""
  parser.add_argument(
    "folders", nargs="+", type=pathlib.Path, metavar="DIR", help="of runs or sweeps"
  )
  parser.add_argument(
    "--out",
    type=pathlib.Path,
    metavar="DIR",
    help="where to write; default: the run's folder, or runs/report for several",
  )
  parser.add_argument(
    "--by",
    action="append",
    default=[],
    metavar="FIELD",
    help="config field to group by, instead of all that a sweep varies; repeatable",
  )
  parser.add_argument("--json", action="store_true", help="print the rows as JSON")


def main(args: argparse.Namespace) -> None:
  """Runs the verb."""
  from effjax.cli import tables
  from effjax.report import compare, folder, sweep

  results = compare.read(args.folders, args.by)
  for path in filter(sweep.is_sweep, args.folders):
    _, missing = sweep.read(path)
    if missing:
      print(f"{path}: {missing} trials have no result yet", file=sys.stderr)
  several = pathlib.Path("runs/report")
  out = args.out or (args.folders[0] if len(args.folders) == 1 else several)
  for path in folder.render(results, out):
    print(f"wrote {path}", file=sys.stderr)
  tables.show(args.folders, as_json=args.json, by=args.by)
