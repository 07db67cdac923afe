"""What there is, read off the files: keys are file names, summaries are docstrings.

Docstrings are parsed, not imported, so that listing stays light.
"""

import ast
import importlib
import pathlib
import pkgutil
from collections.abc import Mapping

from effjax.core import errors, registry
from effjax.parallel import rules

VERBS = "effjax.cli.verbs"
BENCHES = "effjax.cli.benches"
# What `effjax list TOPIC` looks through: packages whose files are techniques. A package
# ending in ".*" stands for its subpackages.
TOPICS: Mapping[str, str] = {
  "mixers": "effjax.nn.mixers",
  "mlps": "effjax.nn.mlps",
  "caches": "effjax.nn.caches",
  "leaves": "effjax.weights.leaves",
  "formats": "effjax.weights.formats",
  "transforms": "effjax.compress.*",
  "optimizers": "effjax.optim.optimizers",
  "schedules": "effjax.optim.schedules",
  "sparsifiers": "effjax.optim.sparsifiers",
  "corpora": "effjax.data.builders",
  "tasks": "effjax.data.tasks",
  "pretrained": "effjax.data.pretrained",
  "architectures": "effjax.interop.hf.architectures",
  "benches": BENCHES,
  "verbs": VERBS,
}


def topics() -> tuple[str, ...]:
  """The words `effjax list` knows."""
  return ("configs", *TOPICS, "presets")


def entries(topic: str) -> dict[str, str]:
  """Name to one-line summary of everything under a topic.

  Raises:
    InputError: unknown topic; the message names the nearest one.
  """
  if topic == "configs":
    return {str(p): docstring_summary(p) for p in config_files()}
  if topic == "presets":
    return {name: preset.summary for name, preset in rules.PRESETS.items()}
  if topic not in TOPICS:
    raise errors.unknown("topic", topic, topics())
  package = TOPICS[topic]
  packages = [package]
  if package.endswith(".*"):
    packages = subpackages(package.removesuffix(".*"))
  return {name: summary(p, name) for p in packages for name in registry.names(p)}


def markdown() -> str:
  """Every technique as one Markdown table, as it stands in the README."""
  rows = ["| kind | name | what it is |", "| --- | --- | --- |"]
  for topic in topics():
    if topic not in ("configs", "benches", "verbs"):
      names = entries(topic).items()
      rows += [f"| {topic} | `{name}` | {summary} |" for name, summary in names]
  return "\n".join(rows)


def config_files() -> list[pathlib.Path]:
  """The recipes under `configs/` of the current folder."""
  return sorted(
    path
    for path in pathlib.Path("configs").glob("**/*.py")
    if not path.name.startswith("_")
  )


def subpackages(package: str) -> list[str]:
  """The packages right under a package, dotted."""
  module = importlib.import_module(package)
  return [
    f"{package}.{info.name}"
    for info in pkgutil.iter_modules(module.__path__)
    if info.ispkg and not info.name.startswith("_")
  ]


def summary(package: str, name: str) -> str:
  """The first line of the docstring of `name` in `package`, without importing it."""
  folder = pathlib.Path(importlib.import_module(package).__path__[0])
  path = folder / f"{name}.py"
  return docstring_summary(path if path.exists() else folder / name / "__init__.py")


def docstring_summary(path: pathlib.Path) -> str:
  """The first line of the docstring of a Python file, without the full stop.

  Raises:
    InputError: the file is not Python.
  """
  try:
    doc = ast.get_docstring(ast.parse(path.read_text("utf-8"))) or ""
  except (SyntaxError, UnicodeDecodeError) as error:
    raise errors.InputError(f"{path} is not a Python file: {error}") from None
  return doc.split("\n", 1)[0].removesuffix(".")
