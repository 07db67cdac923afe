"""The errors a user can cause, each with the exit code the command line returns.

Everything else that escapes is a bug in effjax (exit code 1, with a traceback).
"""

import difflib
from collections.abc import Iterable


class EffjaxError(Exception):
  """Base of every error whose message is meant for the user, without a traceback."""

  exit_code = 1


class InputError(EffjaxError, ValueError):
  """Bad input: config, command line, checkpoint, file, prompt or tree.

  The message is one line: what is wrong, what is allowed, what to do.
  """

  exit_code = 2


class DivergedError(EffjaxError):
  """The loss, a gradient or a parameter stopped being finite."""

  exit_code = 3


class StoppedError(EffjaxError):
  """A signal asked the run to stop, and its state was saved."""

  exit_code = 4


class LostError(EffjaxError):
  """Another process of the run is gone, or did not come in time."""


def nearest(name: str, allowed: Iterable[str]) -> str | None:
  """The allowed word closest to `name`, or None if nothing is close."""
  matches = difflib.get_close_matches(str(name), list(allowed), n=1, cutoff=0.5)
  return matches[0] if matches else None


def unknown(kind: str, name: str, allowed: Iterable[str]) -> InputError:
  """An error for a word that is not one of a known set, with the nearest match.

  Args:
    kind: what the word names, such as "mixer" or "field of config.train".
    name: the word the user gave.
    allowed: the words that would have been right.
  """
  allowed = sorted(str(a) for a in allowed)
  match = nearest(name, allowed)
  hint = f"did you mean {match!r}? " if match else ""
  listed = ", ".join(allowed) if allowed else "none"
  return InputError(f"unknown {kind} {name!r}; {hint}available: {listed}")
