"""What a person sees on stderr: a progress bar on a terminal, elsewhere lines."""

import sys
from collections.abc import Mapping
from typing import Any

import jax
import rich.console
import rich.progress


class Console:
  """Shows the progress of one stage; only process 0 says anything."""

  def __init__(self, stage: str, num_steps: int, step: int = 0):
    self._num_steps = num_steps
    self._quiet = jax.process_index() != 0
    self._bar = None
    if sys.stderr.isatty() and not self._quiet:
      self._bar = rich.progress.Progress(
        rich.progress.TextColumn(stage),
        rich.progress.BarColumn(),
        rich.progress.TextColumn("{task.description}"),
        console=rich.console.Console(stderr=True),
        auto_refresh=False,
      )
      self._task = self._bar.add_task("", total=num_steps, completed=step)
      self._bar.start()

  def show(self, row: Mapping[str, Any], eta_secs: float | None) -> None:
    """Shows a row of training metrics."""
    text = line(row, self._num_steps, eta_secs)
    if self._bar is None:
      self.notice(text)
      return
    self._bar.update(self._task, completed=row["step"], description=text)
    self._bar.refresh()

  def notice(self, text: str) -> None:
    """One line that is not about a step."""
    if self._quiet:
      return
    if self._bar is not None:
      self._bar.console.print(text, markup=False, highlight=False)
      return
    sys.stderr.write(text + "\n")
    sys.stderr.flush()

  def close(self) -> None:
    if self._bar is not None:
      self._bar.stop()


def line(row: Mapping[str, Any], num_steps: int, eta_secs: float | None) -> str:
  """A row of training metrics as one line for people."""
  step, rate, mfu = row["step"], row["tokens_per_sec"], row["mfu"]
  memory = row["memory_bytes"]
  parts = [
    f"step {step}/{num_steps} ({100 * step / num_steps:.1f}%)",
    f"loss {row['loss']:.4f}",
    f"grad {row['grad_norm']:.2f}",
    f"lr {row['lr']:.1e}",
    "n/a tok/s" if rate is None else f"{rate:,.0f} tok/s",
    "mfu n/a" if mfu is None else f"mfu {100 * mfu:.1f}%",
    "mem n/a" if memory is None else f"mem {memory / 2**30:.1f} GiB",
    f"eta {duration(eta_secs)}",
  ]
  return " | ".join(parts)


def duration(secs: float | None) -> str:
  """Seconds, minutes or hours, whichever reads best."""
  if secs is None:
    return "n/a"
  if secs < 60:
    return f"{secs:.0f}s"
  return f"{secs / 60:.1f}m" if secs < 3600 else f"{secs / 3600:.1f}h"
