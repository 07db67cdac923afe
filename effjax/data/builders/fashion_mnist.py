"""Fashion-MNIST: 60,000 + 10,000 grey images of clothes, 28 x 28, ten classes.

Source: Xiao et al. 2017, arXiv:1708.07747, as the Debian package
`dataset-fashion-mnist` carries it (IDX files, MIT licence).
Records: `image` uint8 [28, 28], `label` int64 (0 to 9).
"""

import dataclasses
import gzip
import hashlib
import io
import pathlib
import tarfile
from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from effjax.core import errors
from effjax.data import documents, fetch
from effjax.data.builders import _archives, base

ARTEFACT = fetch.Artefact(
  client="apt-get",
  package="dataset-fashion-mnist",
  version="0.0~git20200523.55506a9-1",
  file_name="dataset-fashion-mnist_0.0~git20200523.55506a9-1_all.deb",
  sha256="39e172fe32dd318ebb3e512220c3beea2fa47d7e20bab348fb4e0922d6beefc0",
)
CLASSES = (
  "t-shirt",
  "trouser",
  "pullover",
  "dress",
  "coat",
  "sandal",
  "shirt",
  "sneaker",
  "bag",
  "ankle boot",
)
_PREFIXES = {"train": "train", "validation": "t10k"}
_PARTS = {"images": ("images-idx3-ubyte.gz", 3), "labels": ("labels-idx1-ubyte.gz", 1)}
_SIDE = 28


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
  """Fashion-MNIST has no options: its splits are the published ones."""


class FashionMnist(base.CorpusBuilder):
  """Images and labels; `manual_dir` holds the .deb or the four IDX .gz files."""

  KEY = "fashion_mnist"
  KIND = "image"
  ORIGIN = f"Debian {ARTEFACT.package} {ARTEFACT.version}"
  LICENCE = "MIT"
  Options = Options

  @classmethod
  def check_files(cls, options: Any, manual_dir: str | None) -> None:
    if manual_dir is None:
      fetch.check_client(ARTEFACT, cls.KEY)
    elif not (pathlib.Path(manual_dir) / ARTEFACT.file_name).is_file():
      _unpacked(manual_dir)

  @classmethod
  def fingerprint(cls, options: Any, manual_dir: str | None) -> Any:
    if manual_dir is None or (pathlib.Path(manual_dir) / ARTEFACT.file_name).is_file():
      return ARTEFACT.sha256
    return base.listing(_unpacked(manual_dir).values())

  def features(self) -> dict[str, Any]:
    return {
      "image": tfds.features.Tensor(shape=(_SIDE, _SIDE), dtype=np.uint8),
      "label": tfds.features.ClassLabel(names=CLASSES),
    }

  def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[Any]]:
    del dl_manager
    files = self._idx_files()
    arrays = {
      split: {
        part: _read_idx(files[f"{prefix}-{suffix}"], f"{prefix}-{suffix}", rank)
        for part, (suffix, rank) in _PARTS.items()
      }
      for split, prefix in _PREFIXES.items()
    }
    digests: dict[str, list[bytes]] = {}
    for split, parts in arrays.items():
      images, labels = parts["images"], parts["labels"]
      if images.shape != (len(labels), _SIDE, _SIDE):
        raise errors.InputError(
          f"corpus 'fashion_mnist': {split} images have shape {images.shape}, expected "
          f"({len(labels)}, {_SIDE}, {_SIDE}) for {len(labels)} labels"
        )
      digests[split] = [hashlib.sha256(a).digest() for a in (images, labels)]
    self._record_facts(
      hash=documents.corpus_digest(digests),
      documents={split: len(parts["labels"]) for split, parts in arrays.items()},
      bytes={split: parts["images"].nbytes for split, parts in arrays.items()},
      classes={
        split: np.bincount(parts["labels"], minlength=len(CLASSES)).tolist()
        for split, parts in arrays.items()
      },
    )
    return {split: self._generate_examples(parts) for split, parts in arrays.items()}

  def _generate_examples(
    self, parts: dict[str, np.ndarray]
  ) -> Iterator[tuple[int, dict[str, Any]]]:
    pairs = zip(parts["images"], parts["labels"], strict=True)
    for index, (image, label) in enumerate(pairs):
      yield index, {"image": image, "label": int(label)}

  def _idx_files(self) -> dict[str, bytes]:
    """The four compressed IDX files by name."""
    manual_dir = self.builder_config.manual_dir
    if manual_dir and not (pathlib.Path(manual_dir) / ARTEFACT.file_name).is_file():
      return {name: p.read_bytes() for name, p in _unpacked(manual_dir).items()}
    deb = fetch.fetch(ARTEFACT, self.KEY, manual_dir)
    data = _archives.ar_member(deb, "data.tar")
    found = {}
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
      for member in archive.getmembers():
        if member.isfile() and member.name.endswith("-ubyte.gz"):
          file = archive.extractfile(member)
          found[pathlib.PurePosixPath(member.name).name] = file.read()
    return found


def _unpacked(manual_dir: str) -> dict[str, pathlib.Path]:
  found = {p.name: p for p in sorted(pathlib.Path(manual_dir).rglob("*-ubyte.gz"))}
  wanted = [f"{a}-{b}" for a in _PREFIXES.values() for b, _ in _PARTS.values()]
  for name in wanted:
    if name not in found:
      raise errors.InputError(
        f"corpus 'fashion_mnist': {manual_dir} holds neither {ARTEFACT.file_name} nor "
        f"{name}"
      )
  return {name: found[name] for name in wanted}


def _read_idx(data: bytes, name: str, rank: int) -> np.ndarray:
  """An IDX file of unsigned bytes: magic 0x08 and rank, big-endian sizes, values."""
  try:
    data = gzip.decompress(data)
  except (OSError, EOFError) as error:
    raise errors.InputError(f"{name} is not a complete gzip file: {error}") from None
  header = 4 + 4 * rank
  shape = np.frombuffer(data[4:header], ">u4").tolist()
  complete = len(shape) == rank and len(data) == header + int(np.prod(shape))
  if data[:4] != bytes((0, 0, 8, rank)) or not complete:
    raise errors.InputError(f"{name} is not an IDX file of rank {rank}")
  return np.frombuffer(data, np.uint8, offset=header).reshape(shape)


TECHNIQUE = FashionMnist
