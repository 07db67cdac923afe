"""Tables and a plot of the study: means, standard deviations and paired intervals."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import scipy.stats
from matplotlib import pyplot as plt

Results = Mapping[str, Mapping[str, Any]]
_NAMES = {"static": "static", "set": "SET", "rigl": "RigL", "gradual": "GMP"}
_PAIRS = (("set", "static"), ("rigl", "set"), ("gradual", "rigl"))


def score(results: Results, name: str) -> np.ndarray:
  """Test accuracy of a cell by seed, in percent."""
  return 100 * np.asarray(results[name]["test"])


def paired(a: np.ndarray, b: np.ndarray) -> tuple[float, float]:
  """The mean of a - b over the seeds and half of its 95 % interval, by Student's t."""
  gap = a - b
  half = scipy.stats.t.ppf(0.975, len(gap) - 1) * scipy.stats.sem(gap)
  return float(gap.mean()), float(half)


def markdown(study: Any, results: Results) -> str:
  """All tables."""
  parts = [_rates(study, results), *_methods(study, results)]
  if len(study.budgets) > 1:
    parts.append(_budgets(study, results))
  parts += [_more(study, results), _lottery(study, results)]
  minutes = sum(cell["secs"] for cell in results.values()) / 60
  parts.append(f"{len(results)} cells, {minutes:.0f} minutes in all.")
  return "\n\n".join(parts) + "\n"


def _rates(study: Any, results: Results) -> str:
  rows = []
  for rate in study.rates:
    held_out = 100 * np.asarray(results[f"rate-{rate}"]["validation"])
    rows.append([f"{rate:g}", _mean(held_out)])
  return _table(["dense, learning rate", "held-out accuracy, %"], rows)


def _methods(study: Any, results: Results) -> list[str]:
  made = []
  for budget in study.budgets:
    heads = [f"{budget}, sparsity", *_NAMES.values()]
    heads += [f"{_NAMES[a]} - {_NAMES[b]}" for a, b in _PAIRS]
    rows = [["dense", _mean(score(results, "dense"))] + [""] * (len(heads) - 2)]
    for sparsity in study.sparsities:
      at = {m: score(results, f"{m}-{sparsity:g}-{budget}") for m in _NAMES}
      gaps = [_gap(at[a], at[b]) for a, b in _PAIRS]
      rows.append([f"{100 * sparsity:g} %", *map(_mean, at.values()), *gaps])
    made.append(_table(heads, rows))
  return made


def _budgets(study: Any, results: Results) -> str:
  rows = []
  for sparsity in study.sparsities:
    at = lambda m, budget, s=sparsity: score(results, f"{m}-{s:g}-{budget}")
    gaps = [_gap(at(m, "erk"), at(m, "uniform")) for m in _NAMES]
    rows.append([f"{100 * sparsity:g} %", *gaps])
  return _table(["ERK - uniform, sparsity", *_NAMES.values()], rows)


def _more(study: Any, results: Results) -> str:
  """The highest sparsity with other numbers of steps."""
  sparsity, usual = max(study.sparsities), study.plan.every
  rows = []
  for budget in study.budgets:
    for longer, every in ((1, usual), *study.more):
      at = {}
      for method in ("static", "set", "rigl"):
        start = f"x{longer}-every-{usual if method == 'static' else every}-"
        start = "" if longer == 1 and (method == "static" or every == usual) else start
        at[method] = score(results, f"{start}{method}-{sparsity:g}-{budget}")
      gaps = [_gap(at[a], at[b]) for a, b in (*_PAIRS[:2], ("rigl", "static"))]
      steps = f"{longer * study.plan.num_steps:,}"
      rows.append([budget, steps, str(every), *map(_mean, at.values()), *gaps])
  heads = [f"{100 * sparsity:g} %", "steps", "between changes", "static", "SET", "RigL"]
  return _table([*heads, "SET - static", "RigL - SET", "RigL - static"], rows)


def _lottery(study: Any, results: Results) -> str:
  rows = []
  dense = score(results, "dense")
  for round_ in range(1, study.rounds + 1):
    at = {
      v: score(results, f"lottery-{round_}-{v}")
      for v in ("ticket", "reinitialized", "random")
    }
    left = _left(results, round_)
    rows.append(
      [
        f"{100 * left:.2f} %",
        *map(_mean, at.values()),
        _gap(at["ticket"], dense),
        _gap(at["ticket"], at["reinitialized"]),
        _gap(at["ticket"], at["random"]),
      ]
    )
  heads = ["weights left", "ticket", "other weights", "random mask"]
  heads += ["ticket - dense", "ticket - other weights", "ticket - random mask"]
  return _table(heads, rows)


def _left(results: Results, round_: int) -> float:
  kept, whole = results[f"lottery-{round_}-ticket"]["kept"], results["dense"]["kept"]
  return sum(kept.values()) / sum(whole.values())


def plot(study: Any, results: Results, path: pathlib.Path) -> None:
  """Accuracy by sparsity and by round, with standard deviations."""
  figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), sharey=True)
  dense = score(results, "dense").mean()
  for axes in (left, right):
    axes.axhline(dense, color="black", lw=1, label="dense")
  for i, (method, name) in enumerate(_NAMES.items()):
    for budget, line in zip(study.budgets, ("-", "--"), strict=False):
      at = [score(results, f"{method}-{s:g}-{budget}") for s in study.sparsities]
      x = [1 - s for s in study.sparsities]
      _line(left, x, at, f"C{i}", line, f"{name}, {budget}")
  for i, variant in enumerate(("ticket", "reinitialized", "random")):
    rounds = range(1, study.rounds + 1)
    at = [score(results, f"lottery-{r}-{variant}") for r in rounds]
    x = [_left(results, r) for r in rounds]
    _line(right, x, at, f"C{4 + i}", "-", variant)
  left.set_title("sparse from the start (GMP: at the end)")
  right.set_title("lottery: pruned in rounds and rewound")
  left.set_ylabel("test accuracy at the last step, %")
  shown = (
    (left, [1 - s for s in study.sparsities]),
    (right, [_left(results, r) for r in range(1, study.rounds + 1)]),
  )
  for axes, x in shown:
    axes.set_xscale("log")
    axes.invert_xaxis()
    axes.set_xticks(x, [f"{100 * share:.3g}" for share in x])
    axes.minorticks_off()
    axes.set_xlabel("hidden weights that are there, %")
    axes.legend(fontsize=7)
    axes.grid(alpha=0.3)
  figure.tight_layout()
  figure.savefig(path, dpi=120)
  plt.close(figure)


def _line(
  axes: Any, x: Sequence[float], at: list, color: str, line: str, label: str
) -> None:
  mean, spread = [a.mean() for a in at], [a.std(ddof=1) for a in at]
  axes.errorbar(
    x, mean, spread, color=color, ls=line, marker="o", ms=3, capsize=2, label=label
  )


def _mean(values: np.ndarray) -> str:
  return f"{values.mean():.2f} ± {values.std(ddof=1):.2f}"


def _gap(a: np.ndarray, b: np.ndarray) -> str:
  """A paired difference; bold where its interval does not hold 0."""
  mean, half = paired(a, b)
  text = f"{mean:+.2f} ± {half:.2f}"
  return f"**{text}**" if abs(mean) > half else text


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
  lines = ["| " + " | ".join(heads) + " |"]
  lines.append("| --- |" + " ---: |" * (len(heads) - 1))
  lines += ["| " + " | ".join(row) + " |" for row in rows]
  return "\n".join(lines)
