"""What a config comes to: every field, parameters, FLOPs, bytes and sharding.

Nothing is computed, compiled or written; the whole recipe is checked.

Examples:
  effjax show --config configs/quickstart.py
  effjax show --config configs/quickstart.py --config.mesh.preset=fsdp
  effjax show --config configs/quickstart.py --json
"""

import argparse
import json
from collections.abc import Iterator
from typing import Any


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """Declares the arguments of the verb."""
  parser.add_argument(
    "--config", required=True, metavar="FILE[:ARG]", help="the recipe"
  )
  parser.add_argument("--json", action="store_true", help="print JSON")


def main(args: argparse.Namespace) -> None:
  """Runs the verb."""
  from effjax.recipe import config as recipe_config
  from effjax.recipe import overview, plan

  found = overview.describe(plan.make(recipe_config.load(args.config, args.overrides)))
  if args.json:
    print(json.dumps(found, indent=2))
    return
  print("config")
  for name, value in _flat(found["config"]):
    print(f"  {name} = {json.dumps(value)}")
  print("\nparameters")
  _print_table(found["parameters"])
  print(f"\nstages, on a mesh of {found['mesh']}")
  for line in found["notes"]:
    print(f"  {line}")
  _print_table(found["stages"])
  if found["attention"]:
    print("\nattention in training, on the device at hand")
    _print_table(found["attention"])
  if found["experts"]:
    print("\nexperts in training, on the device at hand")
    _print_table(found["experts"])
  print(f"\nparameters in all    {found['num_params']:,}")
  print(f"forward FLOPs/token  {found['flops_per_token']:,.0f}")
  print(f"training FLOPs/token {found['train_flops_per_token']:,.0f}")


def _flat(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
  """Every leaf of a plain config, named the way an override names it."""
  if isinstance(value, dict) and value:
    for key, inner in value.items():
      yield from _flat(inner, f"{name}.{key}" if name else key)
  elif isinstance(value, list) and any(isinstance(v, dict) for v in value):
    for i, inner in enumerate(value):
      yield from _flat(inner, f"{name}[{i}]")
  else:
    yield name, value


def _print_table(rows: list[dict[str, Any]]) -> None:
  cells = [[*rows[0]], *([_show(v) for v in row.values()] for row in rows)]
  widths = [max(len(line[i]) for line in cells) for i in range(len(cells[0]))]
  for line in cells:
    print("  " + "  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)))


def _show(value: Any) -> str:
  if value is None:
    return "-"
  if isinstance(value, float):
    return f"{value:.3f}"
  if isinstance(value, list):
    return " x ".join(map(str, value))
  return f"{value:,}" if isinstance(value, int) else str(value)
