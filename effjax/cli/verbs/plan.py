r"""What a step would take on a slice of TPUs that is not there: memory, time, network.

The real training step is compiled by XLA's TPU compiler (the extra `plan`), in a
process of its own; nothing runs, and no TPU is needed. A program is compiled once and
kept in the cache folder.

Examples:
  effjax plan --config configs/lm_7b.py --topology v5e:16x16
  effjax plan --config configs/lm_7b.py --topology v5p:4x4x4 --config.mesh.preset=zero1
  effjax plan --config configs/lm_7b.py --config.mesh.preset=tp --topology v5e:2x4 \
    --stage int8 --decode 8x2048
  effjax plan --config configs/lm_7b.py --topology v6e:8x8 --json --html plan.html
  effjax plan --config configs/lm_7b.py --topology v5e:16x16 --search

  effjax plan --config configs/lm_7b.py --config.data.batch_size=64 \
    --topology v5p:2x2x4 --scale v5p:4x4x4 v5p:4x8x8 v5p:8x8x16 --plot scaling.png

With --search every layout (mesh, preset, recomputation, micro-batches) is tried in
closed form, the best ones are compiled, and the best of them is printed as overrides.
With --scale the batch grows with the slice (weak scaling), in closed form.
"""

import argparse
import json
import pathlib
import re
import sys

from effjax.core import errors


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """Declares the arguments of the verb."""
  parser.add_argument(
    "--config", required=True, metavar="FILE[:ARG]", help="the recipe"
  )
  parser.add_argument(
    "--topology", required=True, metavar="NAME", help="such as v5e:16x16 or v5p:4x4x8"
  )
  parser.add_argument(
    "--stage",
    metavar="NAME",
    help="the stage that trains (default: the first), or whose model decodes",
  )
  parser.add_argument(
    "--decode",
    metavar="ROWSxTOKENS",
    help="plan a prefill and a decoding step of so many rows instead of training",
  )
  parser.add_argument(
    "--search", action="store_true", help="look for the layout with the fastest step"
  )
  parser.add_argument(
    "--compile",
    type=int,
    default=6,
    metavar="N",
    help="layouts of a search that are compiled, the best first (default: 6)",
  )
  parser.add_argument(
    "--scale", nargs="+", metavar="NAME", help="weak scaling to these larger slices"
  )
  parser.add_argument("--plot", metavar="PNG", help="draw the curves of --scale")
  parser.add_argument("--html", metavar="FILE", help="also write a page")
  parser.add_argument("--json", action="store_true", help="print JSON")


def main(args: argparse.Namespace) -> None:
  """Runs the verb."""
  from effjax.cli import layouts, planning
  from effjax.measure.pods import chips, planned
  from effjax.report import pods

  decode = _decode(args.decode)
  _check_together(args)
  chips.parse(args.topology)
  request = planning.Request(
    config=args.config,
    overrides=tuple(args.overrides),
    topology=args.topology,
    stage=args.stage,
    decode=decode,
  )
  if args.scale:
    table = layouts.scale(request, args.scale, args.plot)
    print(json.dumps(table.rows, indent=2) if args.json else table.markdown())
    return
  if args.search:
    found = layouts.search(request, args.compile)
    print(json.dumps(found.plain(), indent=2) if args.json else found.text())
    return
  print(
    f"plan: checking the recipe, then compiling it for {args.topology}: a minute or "
    "more, unless the same program was compiled before",
    file=sys.stderr,
  )
  made = planning.run(request)
  if args.html:
    title = f"{pathlib.Path(args.config).stem} on {args.topology}"
    pathlib.Path(args.html).write_text(pods.page(title, made, planned.notes()), "utf-8")
  if args.json:
    print(json.dumps(made["train"] if "train" in made else made, indent=2))
  else:
    print(pods.text(made, planned.notes()))


def _check_together(args: argparse.Namespace) -> None:
  """Raises InputError for flags that do not go together, or files without a folder."""
  for name in ("html", "plot"):
    path = getattr(args, name)
    if path and not pathlib.Path(path).parent.is_dir():
      raise errors.InputError(f"--{name} {path}: its folder does not exist")
  alone = [name for name in ("search", "scale", "decode") if getattr(args, name)]
  if len(alone) > 1:
    raise errors.InputError(f"--{alone[0]} and --{alone[1]} exclude each other")
  if args.html and (args.search or args.scale):
    raise errors.InputError("--html is a page of one plan: leave out --" + alone[0])
  if args.plot and not args.scale:
    raise errors.InputError("--plot draws the curves of --scale, which is not given")


def _decode(given: str | None) -> tuple[int, int] | None:
  if given is None:
    return None
  sizes = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", given)
  if sizes is None:
    raise errors.InputError(
      f"--decode {given} is not rows times tokens; give it like 8x2048"
    )
  return int(sizes[1]), int(sizes[2])
