"""What a config feeds a model: sizes, hash, tokens and a few decoded samples.

Examples:
  effjax data --config configs/quickstart.py
  effjax data --config configs/quickstart.py --samples 10
  effjax data --config configs/quickstart.py --config.data.corpus=sotu --json
"""

import argparse
import json


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """Declares the arguments of the verb."""
  parser.add_argument(
    "--config", required=True, metavar="FILE[:ARG]", help="the recipe"
  )
  parser.add_argument(
    "--samples", type=int, default=3, metavar="N", help="rows to decode (default 3)"
  )
  parser.add_argument("--json", action="store_true", help="print JSON")


def main(args: argparse.Namespace) -> None:
  """Runs the verb."""
  from effjax.core import config as config_lib
  from effjax.data import describe
  from effjax.recipe import config as recipe_config

  config_lib.require(args.samples >= 0, f"--samples={args.samples} is negative")
  config = recipe_config.load(args.config, args.overrides)
  found = describe.describe(config.data, args.samples)
  print(json.dumps(found, indent=2) if args.json else describe.render(found))
