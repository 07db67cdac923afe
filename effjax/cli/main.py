"""The entry point: picks a verb, parses its arguments, turns errors into exit codes.

A verb is a file in `effjax/cli/verbs` with a docstring (its first line is the summary,
the whole of it the help), `add_arguments(parser)` and `main(args)`. Nothing heavier
than argparse is imported before a verb runs, so help and mistakes answer at once.
"""

import argparse
import errno
import importlib
import os
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import NoReturn

from effjax.cli import catalog
from effjax.core import allocator, errors, registry

_ORDER = (
  "run",
  "sweep",
  "list",
  "show",
  "data",
  "report",
  "import",
  "export",
  "generate",
  "score",
  "plan",
  "bench",
)
_EXIT_CODES = """exit codes:
  0  done
  1  crash (a full disk too: the previous checkpoint is intact)
  2  bad usage, config or input: one line says what to do; nothing was written
  3  the loss stopped being finite
  4  stopped by a signal and saved: the same command resumes
"""


class Parser(argparse.ArgumentParser):
  """An argument parser whose mistakes are InputErrors of one line."""

  def __init__(self, **kwargs):
    super().__init__(
      allow_abbrev=False,
      formatter_class=argparse.RawDescriptionHelpFormatter,
      **kwargs,
    )

  @property
  def flags(self) -> list[str]:
    """Every long flag."""
    return [name for name in self._option_string_actions if name.startswith("--")]

  def error(self, message: str) -> NoReturn:
    raise errors.InputError(f"{message}; see {self.prog} --help")


def main(argv: Sequence[str] | None = None) -> int:
  """Runs `effjax VERB ...` and returns the exit code.

  Args:
    argv: arguments without the program's name; the process's own by default.
  """
  if argv is None:  # a process of our own, not a caller's
    allocator.keep_freed_memory()
    argv = sys.argv[1:]
  argv = list(argv)
  try:
    return _dispatch(argv) or 0
  except errors.EffjaxError as error:
    return _fail(str(error), error.exit_code)
  except KeyboardInterrupt:
    return _fail("interrupted; the same command resumes", 130)
  except BrokenPipeError:
    # Whoever read our output has gone; leave nothing for the interpreter to flush.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0
  except OSError as error:
    if error.errno != errno.ENOSPC:
      raise
    return _fail(
      f"no space left on device ({error.filename or 'while writing'}); what was "
      "saved before is intact: free some space, then the same command resumes",
      1,
    )


def _dispatch(argv: list[str]) -> int | None:
  if not argv or argv[0] in ("-h", "--help", "help"):
    print(_overview())
    return 0 if argv else 2
  if argv[0] == "--version":
    print(f"effjax {_version()}")
    return 0
  try:
    module, args = parse(argv)
  except SystemExit as exit_:  # --help
    return int(exit_.code or 0)
  return module.main(args)


def parse(argv: Sequence[str]) -> tuple[ModuleType, argparse.Namespace]:
  """The module of a verb, and its arguments; `--config.a.b=v` are `args.overrides`.

  Args:
    argv: the verb and what follows it.

  Raises:
    InputError: unknown verb or flag, stray or missing argument.
    SystemExit: help was asked for, and printed.
  """
  verb, *rest = argv
  verbs = registry.names(catalog.VERBS)
  if verb not in verbs:
    raise errors.unknown("flag" if verb.startswith("-") else "verb", verb, verbs)
  module = importlib.import_module(f"{catalog.VERBS}.{verb}")
  parser = Parser(prog=f"effjax {verb}", description=(module.__doc__ or "").strip())
  module.add_arguments(parser)
  takes_config = "--config" in parser.flags
  overrides = [a for a in rest if takes_config and a.startswith("--config.")]
  args, left = parser.parse_known_args([a for a in rest if a not in overrides])
  if left and left[0].startswith("-"):
    raise errors.unknown(f"flag of {parser.prog}", left[0].split("=")[0], parser.flags)
  if left:
    raise errors.InputError(
      f"stray argument {left[0]!r} after {parser.prog}; see {parser.prog} --help"
    )
  args.overrides = overrides
  return module, args


def _overview() -> str:
  verbs = registry.names(catalog.VERBS)
  ordered = sorted(verbs, key=lambda v: (_ORDER.index(v) if v in _ORDER else 99, v))
  lines = [
    "usage: effjax VERB [arguments]        (or: python -m effjax VERB)",
    "",
    "What does making a model cheaper cost you?",
    "",
    "verbs (effjax VERB --help tells more):",
    *(f"  {verb:<10}{catalog.summary(catalog.VERBS, verb)}" for verb in ordered),
    "",
    "start here:",
    "  effjax run --config configs/quickstart.py:smoke",
    "",
    _EXIT_CODES,
  ]
  return "\n".join(lines).rstrip()


def _version() -> str:
  from importlib import metadata

  return metadata.version("effjax")


def _fail(message: str, code: int) -> int:
  print(f"effjax: error: {' '.join(message.split())}", file=sys.stderr)
  return code
