"""Sparse training of a small MLP on Fashion-MNIST: when do connections have to move?

Every cell is five seeds in one program. Finished cells are kept, so the same command
goes on where it stopped; the learning rate is the one that is best for dense training
on held-out images. Writes a table and a plot beside the cells.

Command: .venv/bin/python experiments/sparse_training/compare.py
"""

import argparse
import dataclasses
import json
import pathlib
import sys
import time
from collections.abc import Mapping
from typing import Any

import numpy as np

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from experiments.sparse_training import lottery, methods, tables
from experiments.sparse_training import network as network_lib

RATES = (0.05, 0.1, 0.2)
SPARSITIES = (0.8, 0.9, 0.95, 0.98, 0.99)
BUDGETS = ("erk", "uniform")
VARIANTS = ("ticket", "reinitialized", "random")


@dataclasses.dataclass(frozen=True)
class Study:
  """What is run.

  Attributes:
    plan: see network.Plan.
    rates: learning rates to choose from.
    sparsities, budgets: of each method.
    rounds: of the lottery.
    rewind: step that its weights are rewound to.
    more: times the steps, and steps between changes, with which the highest sparsity
      is trained once more.
  """

  plan: network_lib.Plan = network_lib.Plan()
  rates: tuple[float, ...] = RATES
  sparsities: tuple[float, ...] = SPARSITIES
  budgets: tuple[str, ...] = BUDGETS
  rounds: int = lottery.ROUNDS
  rewind: int = lottery.REWIND
  more: tuple[tuple[int, int], ...] = ((1, 400), (3, 100), (3, 400))


class Run:
  """A study under way in a folder."""

  def __init__(
    self, study: Study, data: Mapping[str, network_lib.Split], workdir: pathlib.Path
  ):
    self.study, self.data, self.workdir = study, data, workdir
    self._networks: dict[Any, network_lib.Network] = {}
    workdir.mkdir(parents=True, exist_ok=True)
    settings = json.loads(json.dumps(dataclasses.asdict(study)))
    path = workdir / "study.json"
    if path.exists() and json.loads(path.read_text()) != settings:
      raise SystemExit(f"{path} is of another study; choose another --workdir")
    _write(path, settings)

  def all(self) -> dict[str, dict[str, Any]]:
    """Every cell's results, run or read back."""
    for rate in self.study.rates:
      self._cell(f"rate-{rate}", rate, "dense", 0.0, "uniform")
    rate = self.best_rate()
    self._dense(rate)
    for sparsity in self.study.sparsities:
      for budget in self.study.budgets:
        for method in methods.METHODS:
          name = cell_name(method, sparsity, budget)
          self._cell(name, rate, method, sparsity, budget)
    for round_ in range(1, self.study.rounds + 1):
      for variant in VARIANTS:
        self._lottery(rate, round_, variant)
    for longer, every in self.study.more:
      self.train_more(rate, longer, every)
    return self.results()

  def train_more(self, rate: float, longer: int, every: int) -> None:
    """The highest sparsity with other numbers of steps, and between changes."""
    sparsity = max(self.study.sparsities)
    for budget in self.study.budgets:
      for method in ("static", "set", "rigl"):
        name = more_name(method, sparsity, budget, longer, every)
        if method == "static" and every != self.study.plan.every:
          continue
        self._cell(name, rate, method, sparsity, budget, longer, every)

  def results(self) -> dict[str, dict[str, Any]]:
    """What is finished."""
    found = {}
    for path in sorted((self.workdir / "cells").glob("*.json")):
      found[path.stem] = json.loads(path.read_text())
    return found

  def best_rate(self) -> float:
    """The rate at which dense training is best on held-out images."""
    found = self.results()
    score = lambda rate: np.mean(found[f"rate-{rate}"]["validation"])
    return max(self.study.rates, key=score)

  def _network(
    self, rate: float, longer: int = 1, every: int | None = None
  ) -> network_lib.Network:
    plan = self.study.plan
    num_steps, every = longer * plan.num_steps, every or plan.every
    plan = dataclasses.replace(plan, num_steps=num_steps, every=every)
    if (rate, plan) not in self._networks:
      self._networks[rate, plan] = network_lib.Network(plan, self.data, rate)
    return self._networks[rate, plan]

  def _done(self, name: str) -> bool:
    return (self.workdir / "cells" / f"{name}.json").exists()

  def _cell(
    self,
    name: str,
    rate: float,
    method: str,
    sparsity: float,
    budget: str,
    longer: int = 1,
    every: int | None = None,
  ) -> None:
    if self._done(name):
      return
    start = time.perf_counter()
    network = self._network(rate, longer, every)
    params, masks = methods.train(network, method, sparsity, budget)
    self._keep(name, rate, params, masks, start)

  def _dense(self, rate: float) -> None:
    """The dense training once more, for its largest weights."""
    if self._done("dense"):
      return
    start = time.perf_counter()
    network = self._network(rate)
    params, masks = methods.train(network, "dense", 0.0, "uniform")
    self._keep_masks(lottery.next_masks(network, params, 1), 1)
    self._keep("dense", rate, params, masks, start)

  def _lottery(self, rate: float, round_: int, variant: str) -> None:
    name = f"lottery-{round_}-{variant}"
    if self._done(name):
      return
    start = time.perf_counter()
    network = self._network(rate)
    with np.load(self._masks_path(round_)) as file:
      masks = dict(file.items())
    params = lottery.train(network, variant, masks, self.study.rewind)
    if variant == "ticket" and round_ < self.study.rounds:
      self._keep_masks(lottery.next_masks(network, params, round_ + 1), round_ + 1)
    self._keep(name, rate, params, masks, start)

  def _masks_path(self, round_: int) -> pathlib.Path:
    return self.workdir / f"masks-{round_}.npz"

  def _keep_masks(self, masks: Mapping[str, Any], round_: int) -> None:
    partial = self.workdir / "partial.npz"
    np.savez_compressed(partial, **{path: np.asarray(m) for path, m in masks.items()})
    partial.rename(self._masks_path(round_))

  def _keep(
    self,
    name: str,
    rate: float,
    params: Mapping[str, Any],
    masks: Mapping[str, Any],
    start: float,
  ) -> None:
    network = self._network(rate)
    found = {
      "learning_rate": rate,
      "test": network.accuracy(params, "test").tolist(),
      "validation": network.accuracy(params, "validation").tolist(),
      "kept": {path: int(np.sum(mask[0])) for path, mask in masks.items()},
      "secs": time.perf_counter() - start,
    }
    _write(self.workdir / "cells" / f"{name}.json", found)
    mean = 100 * np.mean(found["test"])
    print(f"{name}: {mean:.2f} % in {found['secs']:.0f} s", file=sys.stderr, flush=True)


def cell_name(method: str, sparsity: float, budget: str) -> str:
  """Name of a cell of sparse training."""
  return f"{method}-{sparsity:g}-{budget}"


def more_name(
  method: str, sparsity: float, budget: str, longer: int, every: int
) -> str:
  """Name of a cell with other numbers of steps."""
  return f"x{longer}-every-{every}-{cell_name(method, sparsity, budget)}"


def main() -> None:
  """Runs everything, prints the tables and draws the plot."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--workdir", type=pathlib.Path, default="runs/sparse_training")
  args = parser.parse_args()
  study = Study()
  run = Run(study, network_lib.fashion(), args.workdir)
  report(study, run.all(), args.workdir)


def report(
  study: Study, results: Mapping[str, Mapping[str, Any]], workdir: pathlib.Path
) -> None:
  """Prints and writes the tables, and draws the plot."""
  text = tables.markdown(study, results)
  (workdir / "tables.md").write_text(text)
  tables.plot(study, results, workdir / "accuracy.png")
  print(text)


def _write(path: pathlib.Path, values: Mapping[str, Any]) -> None:
  """Writes JSON by one rename."""
  path.parent.mkdir(parents=True, exist_ok=True)
  partial = path.with_name(path.name + ".partial")
  partial.write_text(json.dumps(values, indent=1) + "\n")
  partial.rename(path)


if __name__ == "__main__":
  main()
