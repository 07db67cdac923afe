"""The repository keeps its own rules: sizes, layers, words, docstrings and pins."""

import ast
import importlib
import importlib.metadata
import pathlib
import re
import shutil
import subprocess
import sys
import tokenize
import tomllib

import pytest
from packaging import requirements, utils

from effjax.core import registry

ROOT = pathlib.Path(__file__).resolve().parents[1]
MAX_LINES = 400
MAX_STATEMENTS = 60
SOURCES = sorted(
  path
  for folder in ("effjax", "tests", "configs", "notebooks", "experiments")
  for path in (ROOT / folder).rglob("*.py")
)
PUBLIC = [
  path
  for path in SOURCES
  if path.is_relative_to(ROOT / "effjax") or path.is_relative_to(ROOT / "configs")
]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
# Each pattern holds a class of one letter, so that this file does not match itself.
FORBIDDEN = {
  "a package registry's host": r"pypi[.]org|pythonhosted[.]|npmjs[.]|debian[.]org",
  "a path of one machine": r"(?<![\w.*}])/(?:w[o]rk|r[o]ot|h[o]me)/",
  "unfinished work": "TO[D]O|FIX[M]E|NotImplemented[E]rror",
  "a silenced check": "no[q]a|type: [i]gnore|pragma: no [c]over",
  "a swallowed error": r"except [E]xception\b|except[:]",
  "a number of the tracker": r"\bissue [#\d]",
}


def _name(path):
  return str(path.relative_to(ROOT))


def _tree(path):
  return ast.parse(path.read_text(), filename=str(path))


def _num_statements(function):
  inner = (node for node in ast.walk(function) if isinstance(node, ast.stmt))
  return sum(1 for _ in inner) - 1  # the function itself


def _texts():
  """Every text file that is part of the repository."""
  names = ("Makefile", "README.md", ".gitignore", ".ci/run", "pyproject.toml")
  tops = [ROOT / name for name in names] + sorted(ROOT.glob("requirements*.txt"))
  suffixes = (".md", ".ipynb", ".html", ".css", ".js", ".cc", ".h", ".sh")
  folders = ("effjax", "tests", "configs", "notebooks", "experiments", "docs")
  more = [
    path
    for folder in folders
    for path in (ROOT / folder).rglob("*")
    if path.suffix in suffixes and ".ipynb_checkpoints" not in path.parts
  ]
  return [path for path in tops + SOURCES + more if path.is_file()]


def test_there_are_sources():
  assert len(PUBLIC) > 20
  assert pathlib.Path(__file__) in SOURCES


def test_files_are_short():
  long = {_name(p): len(p.read_text().splitlines()) for p in SOURCES}
  assert not {name: n for name, n in long.items() if n >= MAX_LINES}


def test_functions_are_short():
  kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
  long = [
    f"{_name(path)}:{node.lineno} {node.name}: {_num_statements(node)}"
    for path in SOURCES
    for node in ast.walk(_tree(path))
    if isinstance(node, kinds) and _num_statements(node) > MAX_STATEMENTS
  ]
  assert not long


def test_statements_are_counted():
  function = ast.parse("def f(x):\n  if x:\n    y = 1\n  else:\n    y = 2\n  return y")
  assert _num_statements(function.body[0]) == 4


def test_indentation_is_two_spaces():
  wrong = []
  for path in SOURCES:
    with tokenize.open(path) as file:
      depth = 0
      for token in tokenize.generate_tokens(file.readline):
        if token.type == tokenize.INDENT:
          depth += 1
          if token.string != "  " * depth:
            wrong.append(f"{_name(path)}:{token.start[0]}")
        elif token.type == tokenize.DEDENT:
          depth -= 1
  assert not wrong


def test_modules_say_what_they_are():
  assert not [_name(p) for p in PUBLIC if not ast.get_docstring(_tree(p))]


def test_modules_have_names_that_say_something():
  vague = {"utils", "util", "helpers", "helper", "misc", "common", "manager"}
  assert not [_name(p) for p in SOURCES if p.stem in vague or p.parent.name in vague]


@pytest.mark.parametrize("meaning", FORBIDDEN)
def test_nothing_forbidden_is_written(meaning):
  pattern = re.compile(FORBIDDEN[meaning])
  found = [
    f"{_name(path)}:{number}: {line.strip()[:100]}"
    for path in _texts()
    for number, line in enumerate(path.read_text().splitlines(), 1)
    if pattern.search(line)
  ]
  assert not found, f"{meaning}: {found}"


def _lint_imports(folder):
  code = "import sys; from importlinter import cli; sys.exit(cli.lint_imports())"
  return subprocess.run(
    [sys.executable, "-c", code], cwd=folder, capture_output=True, text=True
  )


def test_imports_go_one_way():
  done = _lint_imports(ROOT)
  assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
  ("module", "line"),
  [
    ("core", "from effjax.cli import main"),
    ("train", "import torch"),
    ("ops", "from flax import linen"),
    ("report", "from effjax import measure"),
    ("a_new_package", "import jax"),
  ],
)
def test_import_contracts_catch(module, line, tmp_path):
  """Imports against the layers, between siblings, banned ones; an unknown layer."""
  settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"][
    "importlinter"
  ]
  layers = re.findall(r"\w+", " ".join(settings["contracts"][0]["layers"]))
  for name in {*layers, module}:
    (tmp_path / "effjax" / name).mkdir(parents=True)
    (tmp_path / "effjax" / name / "__init__.py").touch()
  (tmp_path / "effjax" / "__init__.py").touch()
  (tmp_path / "effjax" / "cli" / "main.py").touch()
  shutil.copy(ROOT / "pyproject.toml", tmp_path)
  assert _lint_imports(tmp_path).returncode == (module not in layers)
  (tmp_path / "effjax" / module / "__init__.py").write_text(line + "\n")
  done = _lint_imports(tmp_path)
  assert done.returncode == 1, done.stdout + done.stderr
  assert "2 kept, 1 broken" in done.stdout


def _technique_packages():
  """Packages that are registries: those with a file that defines TECHNIQUE."""
  holds = re.compile(r"^TECHNIQUE\b", re.MULTILINE)
  files = [p for p in PUBLIC if holds.search(p.read_text())]
  return sorted({".".join(p.relative_to(ROOT).parent.parts) for p in files})


def test_techniques_have_a_summary():
  packages = _technique_packages()
  assert "effjax.nn.mixers" in packages
  for package in packages:
    for name in registry.names(package):
      module = importlib.import_module(f"{package}.{name}")
      assert hasattr(module, "TECHNIQUE"), f"{package}.{name} has no TECHNIQUE"
      summary = registry.summary(package, name)
      assert 10 <= len(summary) <= 88, f"{package}.{name}: {summary!r}"


def _pins(name):
  lines = (ROOT / name).read_text().splitlines()
  parsed = [requirements.Requirement(x) for x in lines if x and x[0] not in "#-"]
  return {utils.canonicalize_name(r.name): r for r in parsed}


def _version(pin):
  (specifier,) = pin.specifier
  assert specifier.operator == "==", f"{pin} is not exact"
  return specifier.version


FILES = {
  "requirements.txt": (),
  "requirements-dev.txt": ("dev",),
  "requirements-oracle.txt": ("oracle", "bench"),
}


@pytest.mark.parametrize("name", FILES)
def test_pins_are_exact_and_in_range(name):
  pins = _pins("requirements.txt") | _pins(name)
  extras = [PROJECT["optional-dependencies"][extra] for extra in FILES[name]]
  ranges = sum(extras, list(PROJECT["dependencies"]))
  for wanted in map(requirements.Requirement, ranges):
    pin = pins[utils.canonicalize_name(wanted.name)]
    assert wanted.specifier.contains(_version(pin)), f"{pin} is outside {wanted}"
  assert all(map(_version, pins.values()))


@pytest.mark.parametrize("name", FILES)
def test_no_package_is_pinned_twice(name):
  if name != "requirements.txt":
    assert not set(_pins(name)) & set(_pins("requirements.txt"))
  if name == "requirements-oracle.txt":
    assert not set(_pins(name)) & set(_pins("requirements-dev.txt"))
  assert len(_pins(name)) > 15


def _needed(names):
  """Every package that these need, as installed here."""
  todo, found = [(name, ()) for name in names], set()
  while todo:
    name, extras = todo.pop()
    if (name, extras) in found:
      continue
    found.add((name, extras))
    for text in importlib.metadata.requires(name) or ():
      needed = requirements.Requirement(text)
      chosen = [{"extra": extra} for extra in ("", *extras)]
      if needed.marker is None or any(map(needed.marker.evaluate, chosen)):
        more = (utils.canonicalize_name(needed.name), tuple(sorted(needed.extras)))
        todo.append(more)
  return {name for name, _ in found}


def test_pins_leave_nothing_out():
  runtime = _pins("requirements.txt")
  development = _pins("requirements-dev.txt")
  assert _needed(runtime) == set(runtime)
  assert _needed(development) <= set(runtime) | set(development)


def test_versions_are_those_of_the_pins():
  """The environment the tests run in is the one a newcomer gets."""
  pins = _pins("requirements.txt")
  for name, pin in pins.items():
    assert importlib.metadata.version(name) == _version(pin), f"installed: not {pin}"
