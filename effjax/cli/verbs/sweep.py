r"""Runs a recipe at many points: grids, lists and seeds over any field of its config.

Every trial is an ordinary run folder under DIR/trials. The same command again resumes;
given again elsewhere (another terminal, another machine that sees DIR), it joins as one
more worker. A worker that is killed is noticed within two minutes, and its trial taken
over where it stood. `effjax report DIR` shows what there is so far.

Values are separated by commas; the field `arg` is the ARG of the config. A config may
say what to sweep itself, in get_sweep(); see configs/sweeps. With --search, points are
chosen one after another, for the lowest loss of the last stage.

Examples:
  effjax sweep --config configs/sweeps/parameters.py
  effjax sweep --config configs/quickstart.py:smoke --grid model.embed_dim=32,64
  effjax sweep --config configs/mixers/recall.py --grid arg=mamba2,deltanet
  effjax sweep --config configs/quickstart.py \
    --list model.embed_dim=64,128 --list model.num_layers=8,2 --workdir runs/shapes
  effjax sweep --config configs/quickstart.py:smoke --search tpe --trials 20 \
    --range stages[0].options.optimizer.learning_rate=0.001:0.1:log
"""

import argparse
import pathlib
import sys


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """Declares the arguments of the verb."""
  parser.add_argument(
    "--config", required=True, metavar="FILE[:ARG]", help="the recipe, or a sweep of it"
  )
  parser.add_argument(
    "--grid",
    action="append",
    default=[],
    metavar="FIELD=V,V",
    help="values of a field, combined with all others in every way; repeatable",
  )
  parser.add_argument(
    "--list",
    action="append",
    default=[],
    metavar="FIELD=V,V",
    help="the same, but lists move together: first with first; repeatable",
  )
  parser.add_argument(
    "--seeds", metavar="N|S,S", help="how many seeds, or which; sets seed and data.seed"
  )
  parser.add_argument(
    "--search", metavar="SAMPLER", help="tpe (learns from the losses so far) or random"
  )
  parser.add_argument(
    "--range",
    action="append",
    default=[],
    metavar="FIELD=LOW:HIGH",
    help="numbers to search in, ':log' behind for factors; repeatable",
  )
  parser.add_argument(
    "--trials", type=int, metavar="N", help="points a search tries (20)"
  )
  parser.add_argument(
    "--workdir",
    type=pathlib.Path,
    metavar="DIR",
    help="the sweep's folder; default: runs/sweeps/<config>[-<arg>]",
  )
  parser.add_argument(
    "--store",
    metavar="URL",
    help="database the workers share; default: sqlite:///DIR/sweep.db",
  )
  parser.add_argument(
    "--json", action="store_true", help="print the groups as JSON at the end"
  )


def main(args: argparse.Namespace) -> None:
  """Runs the verb."""
  import jax

  from effjax.cli import tables
  from effjax.core import errors
  from effjax.report import compare, folder
  from effjax.sweep import points, worker

  # The accelerator is for the runs, which are processes of their own.
  jax.config.update("jax_platforms", "cpu")
  if args.search is None:
    if args.range or args.trials is not None:
      raise errors.InputError("--range and --trials need --search tpe or random")
    sweep = points.make(
      args.config, args.overrides, grids=args.grid, lists=args.list, seeds=args.seeds
    )
  else:
    if args.list or args.seeds:
      raise errors.InputError("--search takes --range and --grid, no --list or --seeds")
    sweep = points.searched(
      args.config,
      args.overrides,
      sampler=args.search,
      num_trials=20 if args.trials is None else args.trials,
      ranges=args.range,
      grids=args.grid,
    )
  root = args.workdir or points.default_workdir(args.config)
  outcome = worker.work(sweep, root, args.store)
  if len(outcome.failed) < outcome.num_trials:
    for path in folder.render(compare.read([root]), root):
      print(f"wrote {path}", file=sys.stderr)
    tables.show([root], as_json=args.json)
  if outcome.failed:
    listed = "; ".join(f"trials/{n:04d}: {why}" for n, why in outcome.failed.items())
    raise errors.EffjaxError(
      f"{len(outcome.failed)} of {outcome.num_trials} trials have no result ({listed})"
      "; the same command runs those again that did not diverge"
    )
