"""Plans of steps on slices of TPUs, as text and as a page."""

import html
import string
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any

_GB = 1e9
_MB = 1e6
# Order and names of what memory is for.
_MEMORY = {
  "params": "parameters",
  "optimizer": "optimizer",
  "cache": "caches",
  "batch": "batch",
  "activations": "activations",
  "gradients": "gradients",
  "temporary": "temporary",
  "other": "other",
}
_HINT = (
  "hint",
  "--search finds a layout that fits, or the smallest slice that could hold the model",
)
Made = Mapping[str, Any]


def facts(name: str, made: Made) -> list[tuple[str, str]]:
  """What a plan says, as pairs of a label and a value.

  Args:
    name: "train", "prefill" or "decode".
    made: fields of planned.Planned.
  """
  used, limit = made["hbm_bytes"] / _GB, made["hbm_limit_bytes"] / _GB
  verdict = "yes" if made["fits"] else "NO"
  lines = [
    (name, f"on {made['topology']}, {made['num_chips']} chips"),
    ("fits", f"{verdict}: {used:.2f} of {limit:.2f} GB a chip"),
    ("memory", ", ".join(f"{label} {gb:.2f}" for label, gb in memory(made)) + " GB"),
  ]
  if not made["fits"]:
    lines.append(_HINT)
  if made["step_secs"] is None:
    return [*lines, ("time", "not known: the compiler stops where memory ends")]
  low, high = made["step_range_secs"]
  lines += [
    ("step", f"{_secs(made['step_secs'])} ({_secs(low)} to {_secs(high)})"),
    (
      "roofline",
      f"compute {_secs(made['compute_secs'])}, HBM {_secs(made['hbm_secs'])}, "
      f"ICI {_secs(made['ici_secs'])}; all hidden {_secs(made['best_secs'])}",
    ),
  ]
  if made["mfu"] is not None:
    low, high = (100 * mfu for mfu in made["mfu_range"])
    lines.append(("MFU", f"{100 * made['mfu']:.1f} % ({low:.1f} to {high:.1f})"))
  lines += [
    ("FLOPs a chip", f"{made['flops'] / 1e12:,.2f} T"),
    ("HBM traffic", f"{made['hbm_traffic_bytes'] / _GB:,.2f} GB a chip"),
    ("sent", f"{made['collective_bytes'] / _GB:,.3f} GB a chip"),
  ]
  for kind, row in made["collectives"].items():
    lines.append(
      (
        f"  {kind}",
        f"{row['count']:,.0f} times, {row['wire_bytes'] / _MB:,.1f} MB, "
        f"{_secs(row['secs'])}",
      )
    )
  if made["unknown_kernels"]:
    names = ", ".join(made["unknown_kernels"])
    lines.append(("not counted", f"FLOPs of the kernels {names}"))
  lines.append(
    ("compiled in", f"{made['compile_secs']:.0f} s, {made['program_bytes']:,} bytes")
  )
  return lines


def memory(made: Made) -> list[tuple[str, float]]:
  """GB of a chip by what they are for; what is nothing is left out."""
  found = made["memory"]
  return [
    (label, found[key] / _GB)
    for key, label in _MEMORY.items()
    if abs(found.get(key, 0)) >= 0.005 * _GB
  ]


def text(plans: Mapping[str, Made], notes: Sequence[str]) -> str:
  """Plans for a terminal, and how their numbers were made."""
  blocks = []
  for name, made in plans.items():
    lines = facts(name, made)
    width = max(len(label) for label, _ in lines)
    blocks.append("\n".join(f"{label:<{width}}  {value}" for label, value in lines))
  blocks.append("\n".join(f"- {note}" for note in notes))
  return "\n\n".join(blocks)


def page(title: str, plans: Mapping[str, Made], notes: Sequence[str]) -> str:
  """Plans as one HTML file that asks nothing of any network.

  Args:
    title: of the page.
    plans: fields of planned.Planned by what was compiled.
    notes: how the numbers were made.
  """
  folder = resources.files("effjax.report") / "assets"
  read = lambda name: (folder / name).read_text("utf-8")
  return string.Template(read("pods.html")).substitute(
    title=html.escape(title),
    style=read("style.css"),
    plans="\n".join(_section(name, made) for name, made in plans.items()),
    notes="\n".join(f"<li>{html.escape(note)}</li>" for note in notes),
  )


def _section(name: str, made: Made) -> str:
  rows = "\n".join(
    f"<tr><th scope='row'>{html.escape(label)}</th><td>{html.escape(value)}</td></tr>"
    for label, value in facts(name, made)[1:]
  )
  return (
    f"<section><h2>{html.escape(name)} on {html.escape(made['topology'])}</h2>\n"
    f"{_bar(made)}\n<div class='scroll'><table class='facts'>{rows}</table></div>\n"
    "</section>"
  )


def _bar(made: Made) -> str:
  """Memory of a chip as parts of a bar, the whole of which is what there is."""
  whole = max(made["hbm_limit_bytes"], made["hbm_bytes"]) / _GB
  parts = "".join(
    f"<span class='part part-{i}' style='width:{100 * gb / whole:.2f}%' "
    f"title='{label} {gb:.2f} GB'></span>"
    for i, (label, gb) in enumerate(memory(made))
    if gb > 0
  )
  legend = " ".join(
    f"<span class='key part-{i}'></span>{label} {gb:.2f} GB"
    for i, (label, gb) in enumerate(memory(made))
  )
  return f"<div class='memory'>{parts}</div><p class='hint'>{legend}</p>"


def _secs(secs: float) -> str:
  if secs >= 1:
    return f"{secs:.2f} s"
  return f"{1e3 * secs:.2f} ms" if secs >= 1e-3 else f"{1e6 * secs:.1f} us"
