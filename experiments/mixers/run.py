"""Runs one comparison of sequence mixers, all of them one after another.

    python experiments/mixers/run.py recall --jobs 2
    python experiments/mixers/run.py listops --jobs 2
    python experiments/mixers/run.py language --jobs 2

Each mixer is a run of `configs/mixers/<task>.py:<mixer>` in a folder of its own, so the
same command goes on where it stopped. Models this small do not keep two cores busy: on
a CPU `--jobs` runs that share its cores finish about 1.5 times as many steps. The table
is printed after the last run, and `effjax report` of the folders makes the plots. Of
`language` every mixer runs with one seed, then the best five with two more.
"""

import argparse
import itertools
import json
import os
import pathlib
import statistics
import subprocess
import sys
from collections.abc import Iterable
from concurrent import futures

TASKS = ("recall", "listops", "language")
MIXERS = (
  "attention",
  "mla",
  "longformer",
  "bigbird",
  "linear_attention",
  "performer",
  "retnet",
  "gla",
  "deltanet",
  "gated_deltanet",
  "s4d",
  "mamba1",
  "mamba2",
  "hybrid",
)
NUM_BEST, SEEDS = 5, (0, 1, 2)
SOLVED = 0.99


def main() -> None:
  """Runs the task named on the command line."""
  parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
  parser.add_argument("task", choices=TASKS)
  parser.add_argument("--mixers", nargs="+", choices=MIXERS, default=MIXERS)
  parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("runs/mixers"))
  parser.add_argument("--jobs", type=int, default=1, help="runs at a time, on a CPU")
  args = parser.parse_args()
  if args.jobs < 1:
    parser.error(f"--jobs must be at least 1, got {args.jobs}")
  found = {mixer: [] for mixer in args.mixers}
  run_all(args, found, args.mixers, SEEDS[:1])
  if args.task == "language":
    best = sorted(found, key=lambda mixer: bits_per_byte(found[mixer][0][0]))
    run_all(args, found, best[:NUM_BEST], SEEDS[1:])
  print("\n".join(TABLES[args.task](found)))


def run_all(
  args: argparse.Namespace,
  found: dict[str, list[list[dict]]],
  mixers: Iterable[str],
  seeds: Iterable[int],
) -> None:
  """Adds the rows of every mixer with every seed, `--jobs` runs at a time."""
  places = list(itertools.product(mixers, seeds))
  with futures.ThreadPoolExecutor(args.jobs) as pool:
    made = [pool.submit(run, args, *place) for place in places]
    try:
      for (mixer, _), rows in zip(places, made, strict=True):
        found[mixer].append(rows.result())
    except subprocess.CalledProcessError as error:
      # The verb has said on stderr what is wrong; the same command goes on from here.
      pool.shutdown(cancel_futures=True)
      sys.exit(error.returncode)


def run(args: argparse.Namespace, mixer: str, seed: int) -> list[dict]:
  """The rows of a run, made now unless they were before."""
  task = args.task
  folder = args.out / f"{task}-{mixer}-{seed}"
  command = [sys.executable, "-m", "effjax", "run", "--json"]
  command += ["--config", f"configs/mixers/{task}.py:{mixer}", "--workdir", str(folder)]
  command += [f"--config.seed={seed}", f"--config.data.seed={seed}"]
  print(f"{task} {mixer} seed {seed}", file=sys.stderr, flush=True)
  # XLA's CPU backend takes as many threads as NPROC says.
  threads = max(1, (os.cpu_count() or 1) // args.jobs)
  env = os.environ | ({"NPROC": str(threads)} if args.jobs > 1 else {})
  made = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=env)
  return json.loads(made.stdout)["stages"]


def recall_table(found: dict[str, list[list[dict]]]) -> list[str]:
  """Accuracy at each learning rate, and whether the best is a solution."""
  (first, *_) = next(iter(found.values()))
  rates = [row["stage"] for row in first]
  lines = [f"| mixer | parameters | {' | '.join(rates)} | solved | minutes |"]
  lines.append("|---" * (4 + len(rates)) + "|")
  for mixer, ((*rows,),) in found.items():
    right = [accuracy(row) for row in rows]
    cells = [mixer, f"{rows[0]['num_params']:,}", *(f"{100 * x:.1f} %" for x in right)]
    cells += ["yes" if max(right) >= SOLVED else "no", f"{minutes(rows):.1f}"]
    lines.append(f"| {' | '.join(cells)} |")
  return lines


def listops_table(found: dict[str, list[list[dict]]]) -> list[str]:
  """Accuracy, best first."""
  lines = ["| mixer | parameters | accuracy | minutes |", "|---" * 4 + "|"]
  order = sorted(found, key=lambda mixer: -accuracy(found[mixer][0][0]))
  for mixer in order:
    (row,) = found[mixer][0]
    right = f"{100 * accuracy(row):.1f} %"
    lines.append(
      f"| {mixer} | {row['num_params']:,} | {right} | {minutes([row]):.1f} |"
    )
  return lines


def language_table(found: dict[str, list[list[dict]]]) -> list[str]:
  """Bits per byte, best first, with the spread over seeds where there are several."""
  lines = [
    "| mixer | parameters | bits/byte, seed 0 | mean of seeds | lowest to highest "
    "| minutes |",
    "|---" * 6 + "|",
  ]
  order = sorted(found, key=lambda mixer: bits_per_byte(found[mixer][0][0]))
  for mixer in order:
    rows = [row for (row,) in found[mixer]]
    bits = [bits_per_byte(row) for row in rows]
    cells = [mixer, f"{rows[0]['num_params']:,}", f"{bits[0]:.4f}"]
    if len(bits) > 1:
      cells += [f"{statistics.mean(bits):.4f}", f"{min(bits):.4f} to {max(bits):.4f}"]
    else:
      cells += ["", ""]
    lines.append(f"| {' | '.join(cells)} | {minutes(rows) / len(rows):.1f} |")
  return lines


def accuracy(row: dict) -> float:
  """Share of right answers; 0 where the model is not finite."""
  return row["quality"]["accuracy"] or 0.0


def bits_per_byte(row: dict) -> float:
  """Bits per byte; infinite where the model is not finite."""
  found = row["quality"]["bits_per_byte"]
  return float("inf") if found is None else found


def minutes(rows: list[dict]) -> float:
  """Time the stages took, without measuring."""
  return sum(row["stage_secs"] for row in rows) / 60


TABLES = {"recall": recall_table, "listops": listops_table, "language": language_table}

if __name__ == "__main__":
  main()
