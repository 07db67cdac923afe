"""The table, the Pareto plot and the HTML page of finished runs, one or several.

Writes report.md, report.html and pareto.png: for one run into its folder, for several,
side by side, into another.

Examples:
  effjax report runs/quickstart
  effjax report runs/quickstart runs/seed-1 --out runs/compared
  effjax report runs/quickstart --json
"""

import argparse
import pathlib
import sys


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """Declares the arguments of the verb."""
  parser.add_argument(
    "folders", nargs="+", type=pathlib.Path, metavar="DIR", help="run folders"
  )
  parser.add_argument(
    "--out",
    type=pathlib.Path,
    metavar="DIR",
    help="where to write; default: the run's folder, or runs/report for several",
  )
  parser.add_argument("--json", action="store_true", help="print the rows as JSON")


def main(args: argparse.Namespace) -> None:
  """Runs the verb."""
  from effjax.cli import tables
  from effjax.report import compare, folder

  results = compare.read(args.folders)
  several = pathlib.Path("runs/report")
  out = args.out or (args.folders[0] if len(results) == 1 else several)
  for path in folder.render(results, out):
    print(f"wrote {path}", file=sys.stderr)
  tables.show(args.folders, as_json=args.json)
