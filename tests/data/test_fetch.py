import hashlib
import os
import stat
import sys

import pytest

from effjax.core import errors
from effjax.data import fetch

CONTENT = b"the original file"


def artefact(client: str, content: bytes = CONTENT) -> fetch.Artefact:
  return fetch.Artefact(
    client=client,
    package="some-corpus",
    version="1.2.3",
    file_name="some-corpus-1.2.3.tgz",
    sha256=hashlib.sha256(content).hexdigest(),
  )


@pytest.fixture
def fake_client(tmp_path, monkeypatch, fresh_cache):
  """Puts scripts called npm and apt-get, and a fake Python for pip, on the way."""
  folder = tmp_path / "bin"
  folder.mkdir()
  log = tmp_path / "log"

  def install(body: str) -> None:
    for name in ("npm", "apt-get", "python"):
      script = folder / name
      script.write_text(f'#!/bin/sh\necho "{name} $*" >> {log}\n{body}\n')
      script.chmod(script.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(sys, "executable", str(folder / "python"))

  return install, log


@pytest.mark.parametrize(
  ("client", "command"),
  [
    ("npm", "npm pack --loglevel=error some-corpus@1.2.3"),
    ("apt-get", "apt-get download -q some-corpus"),
    (
      "pip",
      "python -m pip download --quiet --no-deps -d . some-corpus==1.2.3",
    ),
  ],
)
def test_fetches_once_with_the_client(fake_client, fresh_cache, client, command):
  install, log = fake_client
  install(f"printf '%s' '{CONTENT.decode()}' > some-corpus-1.2.3.tgz")
  for _ in range(2):
    path = fetch.fetch(artefact(client), "some", None)
    assert path == fresh_cache / "downloads" / "some-corpus-1.2.3.tgz"
    assert path.read_bytes() == CONTENT
  assert log.read_text() == command + "\n"
  left = [p.name for p in path.parent.iterdir() if not p.name.endswith(".lock")]
  assert left == [path.name]


def test_pip_takes_the_source_when_only_it_has_the_data():
  whole = fetch.Artefact(**{**vars(artefact("pip")), "source_only": True})
  assert whole.command()[-5:] == [
    "--no-binary",
    ":all:",
    "-d",
    ".",
    "some-corpus==1.2.3",
  ]


@pytest.mark.parametrize(
  ("body", "message"),
  [
    (
      "(echo WARN old; echo code 7; echo no route) >&2; exit 1",
      "could not fetch some-corpus 1.2.3: code 7; no route; or put",
    ),
    ("exit 3", "exit code 3"),
    ("touch other.tgz", "it brought other.tgz"),
    ("true", "it brought nothing"),
    ("echo wrong > some-corpus-1.2.3.tgz", "it brought another file (sha256 "),
  ],
)
def test_a_failed_fetch_says_why_and_leaves_nothing(
  fake_client, fresh_cache, body, message
):
  install, _ = fake_client
  install(body)
  with pytest.raises(errors.InputError) as info:
    fetch.fetch(artefact("npm"), "some", None)
  assert message in str(info.value)
  assert "\n" not in str(info.value)
  kept = [p for p in (fresh_cache / "downloads").iterdir() if p.suffix != ".lock"]
  assert kept == []


@pytest.mark.parametrize("client", ["npm", "apt-get"])
def test_a_missing_client_is_named_with_the_way_around(
  monkeypatch, tmp_path, fresh_cache, client
):
  monkeypatch.setenv("PATH", str(tmp_path))
  with pytest.raises(errors.InputError) as info:
    fetch.fetch(artefact(client), "some", None)
  message = str(info.value)
  assert f"fetched with {client}, which is not installed" in message
  assert "put some-corpus-1.2.3.tgz" in message
  assert "data.manual_dir" in message


def test_manual_dir_needs_no_client(monkeypatch, tmp_path, fresh_cache):
  monkeypatch.setenv("PATH", "")
  with pytest.raises(errors.InputError, match="is missing"):
    fetch.fetch(artefact("npm"), "some", str(tmp_path))
  (tmp_path / "some-corpus-1.2.3.tgz").write_bytes(CONTENT)
  path = fetch.fetch(artefact("npm"), "some", str(tmp_path))
  assert path.parent == tmp_path
  path.write_bytes(b"changed")
  with pytest.raises(errors.InputError, match="is not the recorded file"):
    fetch.fetch(artefact("npm"), "some", str(tmp_path))
  assert not fresh_cache.exists()
