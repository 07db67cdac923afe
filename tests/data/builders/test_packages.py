"""The corpora that come out of packages; only the slow tests use a network."""

import hashlib
import io
import tarfile

import numpy as np
import pytest

from effjax.core import errors
from effjax.data import fetch
from effjax.data.builders import fashion_mnist, sotu

ADDRESSES = {
  f"{year}_first_last_p.txt": f"Fellow citizens of {year}, é.\n"
  for year in (1790, 1850, 2009, 2010, 2021)
}


def write_archive(path, members) -> None:
  with tarfile.open(path, "w:gz") as archive:
    for name, text in members.items():
      data = text.encode()
      info = tarfile.TarInfo(name)
      info.size = len(data)
      archive.addfile(info, io.BytesIO(data))


def pin(monkeypatch, module, path) -> None:
  """Records another file as the right one."""
  values = vars(module.ARTEFACT) | {
    "sha256": hashlib.sha256(path.read_bytes()).hexdigest()
  }
  monkeypatch.setattr(module, "ARTEFACT", fetch.Artefact(**values))


def read(corpus, split):
  return {r["name"].decode(): r["text"].decode() for r in corpus.sources[split]}


@pytest.fixture(params=["unpacked", "archive", "client"])
def sotu_dir(request, tmp_path, monkeypatch, fresh_cache):
  """The original files in a folder, or a client that brings them."""
  folder = tmp_path / "original"
  (folder / "data").mkdir(parents=True)
  if request.param == "unpacked":
    for name, text in ADDRESSES.items():
      (folder / "data" / name).write_text(text)
    (folder / "LICENSE.txt").write_text("not an address")
    return str(folder)
  members = {f"package/data/{name}": text for name, text in ADDRESSES.items()}
  archive = folder / sotu.ARTEFACT.file_name
  write_archive(archive, members | {"package/README.md": "not an address"})
  pin(monkeypatch, sotu, archive)
  if request.param == "archive":
    return str(folder)
  client = tmp_path / "bin" / "npm"
  client.parent.mkdir()
  client.write_text(f"#!/bin/sh\ncp '{archive}' .\n")
  client.chmod(0o755)
  monkeypatch.setenv("PATH", f"{client.parent}:/usr/bin:/bin")
  return None


def test_sotu_is_split_by_year(sotu_dir):
  corpus = sotu.TECHNIQUE.open({}, sotu_dir)
  assert sorted(read(corpus, "train")) == sorted(ADDRESSES)[:3]
  assert sorted(read(corpus, "validation")) == sorted(ADDRESSES)[3:]
  assert read(corpus, "train") | read(corpus, "validation") == ADDRESSES
  later = sotu.TECHNIQUE.open({"validation_from": 2015}, sotu_dir)
  assert sorted(read(later, "validation")) == sorted(ADDRESSES)[4:]
  assert later.facts["hash"] != corpus.facts["hash"]


def test_sotu_needs_files_or_a_client(tmp_path, monkeypatch, fresh_cache):
  with pytest.raises(errors.InputError, match=r"neither stdlib-.*tgz nor files"):
    sotu.TECHNIQUE.check({}, str(tmp_path))
  monkeypatch.setenv("PATH", "")
  with pytest.raises(errors.InputError, match="npm, which is not installed"):
    sotu.TECHNIQUE.check({}, None)
  with pytest.raises(errors.InputError, match="a year from 1791 to 2021"):
    sotu.TECHNIQUE.check({"validation_from": 1700}, str(tmp_path))


def ar_archive(members: dict[str, bytes]) -> bytes:
  out = b"!<arch>\n"
  for name, data in members.items():
    header = f"{name:<16}{0:<12}{0:<6}{0:<6}{'100644':<8}{len(data):<10}`\n"
    out += header.encode() + data + b"\n" * (len(data) % 2)
  return out


def test_fashion_mnist_from_files_and_from_a_package(
  fashion_mnist_dir, tmp_path, monkeypatch, fresh_cache
):
  original = fashion_mnist.TECHNIQUE.open({}, str(fashion_mnist_dir))
  names = sorted(fashion_mnist_dir.glob("*.gz"))
  buffer = io.BytesIO()
  with tarfile.open(fileobj=buffer, mode="w:xz") as archive:
    for path in names:
      archive.add(path, f"./usr/share/datasets/fashion-mnist/{path.name}")
  package = tmp_path / "deb" / fashion_mnist.ARTEFACT.file_name
  package.parent.mkdir()
  package.write_bytes(
    ar_archive({"debian-binary": b"2.0", "data.tar.xz": buffer.getvalue()})
  )
  pin(monkeypatch, fashion_mnist, package)
  packaged = fashion_mnist.TECHNIQUE.open({}, str(package.parent))
  assert packaged.facts["hash"] == original.facts["hash"]
  rng = np.random.default_rng(0)
  images = rng.integers(0, 256, (20, 28, 28), np.uint8)
  labels = rng.integers(0, 10, 20, np.uint8)
  for corpus in (original, packaged):
    records = [corpus.sources["train"][i] for i in range(20)]
    np.testing.assert_array_equal([r["image"] for r in records], images)
    np.testing.assert_array_equal([r["label"] for r in records], labels)
    assert (
      corpus.facts["classes"]["train"] == np.bincount(labels, minlength=10).tolist()
    )
    assert len(corpus.sources["validation"]) == 10


def test_fashion_mnist_bad_files(fashion_mnist_dir, fresh_cache):
  labels = fashion_mnist_dir / "t10k-labels-idx1-ubyte.gz"
  content = labels.read_bytes()
  labels.write_bytes(content[:-9])
  with pytest.raises(errors.InputError, match="is not a complete gzip file"):
    fashion_mnist.TECHNIQUE.open({}, str(fashion_mnist_dir))
  images = fashion_mnist_dir / "t10k-images-idx3-ubyte.gz"
  labels.write_bytes(images.read_bytes())
  with pytest.raises(errors.InputError, match="is not an IDX file of rank 1"):
    fashion_mnist.TECHNIQUE.open({}, str(fashion_mnist_dir))
  train = fashion_mnist_dir / "train-labels-idx1-ubyte.gz"
  labels.write_bytes(train.read_bytes())
  with pytest.raises(errors.InputError, match="images have shape"):
    fashion_mnist.TECHNIQUE.open({}, str(fashion_mnist_dir))
  labels.unlink()
  with pytest.raises(errors.InputError, match="nor t10k-labels"):
    fashion_mnist.TECHNIQUE.check({}, str(fashion_mnist_dir))


@pytest.mark.slow
def test_sotu_from_its_registry(fresh_cache):
  corpus = sotu.TECHNIQUE.open({}, None)
  assert corpus.facts["bytes"] == {"train": 10_310_328, "validation": 451_085}
  digest = "0da548e691d1f5ad01bb3d6373b644bba1056403d231e5246916f1b9e45b69d3"
  assert corpus.facts["hash"] == digest


@pytest.mark.slow
def test_fashion_mnist_from_its_registry(fresh_cache):
  corpus = fashion_mnist.TECHNIQUE.open({}, None)
  assert corpus.facts["classes"] == {"train": [6000] * 10, "validation": [1000] * 10}
  first = [int(corpus.sources["train"][i]["label"]) for i in range(8)]
  assert first == [9, 0, 0, 3, 0, 2, 7, 2]
