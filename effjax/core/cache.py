"""The folder where what can be made again stays between runs."""

import os
import pathlib


def folder() -> pathlib.Path:
  """`$EFFJAX_CACHE`, else `$XDG_CACHE_HOME/effjax`, else `~/.cache/effjax`."""
  chosen = os.environ.get("EFFJAX_CACHE")
  if chosen:
    return pathlib.Path(chosen).expanduser()
  base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
  return pathlib.Path(base).expanduser() / "effjax"
