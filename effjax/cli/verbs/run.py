"""Runs a recipe: trains, compresses, measures each stage and writes the report.

The same command again resumes at the stage and step where it stopped, also after
kill -9. A config file is Python code and runs with your rights: run only files you
trust.

On several hosts the same command runs on each (experiments/launch has scripts), in a
run folder that all of them share.

Examples:
  effjax run --config configs/quickstart.py:smoke
  effjax run --config configs/quickstart.py --workdir runs/seed-1 --config.seed=1
  effjax run --config configs/quickstart.py --config.stages[3].options.bits=3 --fresh
"""

import argparse
import os
import pathlib
import sys


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
    "--until",
    metavar="STAGE",
    help="stop after this stage; the same command without it goes on from there",
  )
  parser.add_argument(
    "--profile",
    action="store_true",
    help="trace a few steps of each training into DIR/profile",
  )
  parser.add_argument("--json", action="store_true", help="print result.json")
  several = parser.add_argument_group("several processes, such as one a host")
  several.add_argument(
    "--dist",
    metavar="auto|on|off",
    help="join the processes of a cluster: if there are several (auto, the default), "
    "or else fail (on), or never (off)",
  )
  several.add_argument(
    "--cluster",
    metavar="NAME",
    help="take this cluster, and look for no other: ompi, slurm, gcetpu, gketpu, k8s, "
    "or mpi4py, which is taken only by name",
  )
  several.add_argument(
    "--coordinator",
    metavar="HOST:PORT",
    help="where process 0 is, any free port; also EFFJAX_COORDINATOR",
  )
  several.add_argument(
    "--num-processes", type=int, metavar="N", help="also EFFJAX_NUM_PROCESSES"
  )
  several.add_argument(
    "--process-id", type=int, metavar="I", help="from 0; also EFFJAX_PROCESS_ID"
  )
  several.add_argument(
    "--dist-timeout",
    type=float,
    metavar="SECS",
    help="how long processes wait for each other (default 1800)",
  )


def main(args: argparse.Namespace) -> None:
  """Runs the verb."""
  from effjax.parallel import hosts, launch

  wanted = launch.request(
    os.environ,
    mode=args.dist,
    method=args.cluster,
    coordinator=args.coordinator,
    num_processes=args.num_processes,
    process_id=args.process_id,
    timeout_secs=args.dist_timeout,
  )
  # Before anything else is imported that might ask JAX for its devices.
  with launch.joined(wanted):
    from effjax.cli import tables
    from effjax.recipe import folder, runner

    root = runner.run(
      args.config,
      args.overrides,
      workdir=args.workdir,
      fresh=args.fresh,
      until=args.until,
      profile=args.profile,
    )
    is_first = hosts.first()
  if not is_first:
    return
  if args.until is not None and not (root / folder.RESULT).exists():
    print(
      f"{root}: run up to {args.until}; without --until it goes on", file=sys.stderr
    )
    return
  tables.show([root], as_json=args.json)
