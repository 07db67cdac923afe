"""`--config.a.b=value`: what a command line changes in a config.

A config is nested dicts and tuples here; `stages[2].options.bits` names one place in
it. A value is read by the type of what stands there, else as a Python literal, else as
a string; the dataclasses the config becomes check the rest.
"""

import ast
import re
from collections.abc import Sequence
from typing import Any

from effjax.core import errors

_PATH = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*|\[\d+\])*")
# "none" is a value of its own where a field takes words, such as model.remat.
_WORDS = {"true": True, "false": False}


def apply(config: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
  """A copy of `config` with each `a.b[0].c=value` of `overrides` applied in turn.

  Args:
    config: plain nested config (dicts, tuples or lists, scalars); not changed.
    overrides: assignments, with or without the leading `--config.`.

  Raises:
    InputError: not an assignment, not a path, an index out of range, or a path through
      a plain value. A name that no field bears is left to `core.config.build`, which
      knows the fields.
  """
  for override in overrides:
    path, equals, text = (
      override.removeprefix("--").removeprefix("config.").partition("=")
    )
    if not equals:
      raise errors.InputError(
        f"override {override!r} has no value; write --config.{path}=VALUE"
      )
    config = _assign(config, parse_path(path), text, "config")
  return config


def parse_path(path: str) -> tuple[str | int, ...]:
  """`"stages[2].options.bits"` as `("stages", 2, "options", "bits")`."""
  if not _PATH.fullmatch(path):
    raise errors.InputError(
      f"--config.{path} does not name a field; write like "
      "--config.stages[2].options.bits=3"
    )
  steps = re.findall(r"\w+", path)
  return tuple(int(step) if step.isdigit() else step for step in steps)


def parse_value(text: str, old: Any = None) -> Any:
  """The value a text stands for, given the value it replaces (None if unknown)."""
  if isinstance(old, str) and text != "None":
    return text
  if text.lower() in _WORDS:
    return _WORDS[text.lower()]
  try:
    return ast.literal_eval(text)
  except (ValueError, SyntaxError, MemoryError, RecursionError):
    return text


def _assign(node: Any, steps: Sequence[str | int], text: str, path: str) -> Any:
  """`node` with the value at `steps` replaced; new dicts are made where none stand."""
  if not steps:
    return parse_value(text, node)
  step, rest = steps[0], steps[1:]
  if isinstance(step, int):
    return _assign_item(node, step, rest, text, path)
  if node is None:
    node = {}
  if not isinstance(node, dict):
    raise errors.InputError(
      f"{path} is {node!r}: it has no field {step!r}"
      + (f"; write {path}[0].{step}" if isinstance(node, list | tuple) else "")
    )
  return {**node, step: _assign(node.get(step), rest, text, f"{path}.{step}")}


def _assign_item(
  node: Any, index: int, rest: Sequence[str | int], text: str, path: str
) -> Any:
  if not isinstance(node, list | tuple):
    raise errors.InputError(f"{path} is not a list: it has no item [{index}]")
  if index >= len(node):
    raise errors.InputError(
      f"{path} has {len(node)} items: [{index}] is out of range, the last is "
      f"[{len(node) - 1}]"
    )
  items = list(node)
  items[index] = _assign(items[index], rest, text, f"{path}[{index}]")
  return type(node)(items)
