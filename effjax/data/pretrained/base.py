"""What every packaged model says of itself, and how its files get into the cache."""

import dataclasses
import pathlib
import shutil
import zipfile

from effjax.core import registry
from effjax.data import cache, fetch

PRETRAINED = "effjax.data.pretrained"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Packaged:
  """A model inside a Python wheel.

  Attributes:
    name: registry key, equal to the file name.
    artefact: the wheel.
    member: the file or folder (ending in "/") of the wheel that is the model.
    origin: where it comes from.
    licence: of model and packaging.
  """

  name: str
  artefact: fetch.Artefact
  member: str
  origin: str
  licence: str

  def path(self, manual_dir: str | None = None) -> pathlib.Path:
    """The model's file or folder on disk, fetched and unpacked the first time.

    Args:
      manual_dir: a folder that holds the wheel already; then nothing is downloaded.

    Raises:
      InputError: it cannot be fetched, or is not the recorded file.
    """
    key = f"{self.name}-{self.artefact.sha256[:16]}"
    folder = cache.folder() / "pretrained" / key
    with cache.locked(folder):
      if not folder.exists():
        wheel = fetch.fetch(self.artefact, self.name, manual_dir, "model")
        with cache.replacing(folder) as made:
          self._unpack(wheel, made)
    return folder / pathlib.PurePosixPath(self.member).name

  def _unpack(self, wheel: pathlib.Path, into: pathlib.Path) -> None:
    root = pathlib.PurePosixPath(self.member)
    with zipfile.ZipFile(wheel) as archive:
      for info in archive.infolist():
        inside = pathlib.PurePosixPath(info.filename)
        if info.is_dir() or not (inside == root or root in inside.parents):
          continue
        target = into / inside.relative_to(root.parent)
        target.parent.mkdir(parents=True, exist_ok=True)
        with archive.open(info) as source, open(target, "wb") as out:
          shutil.copyfileobj(source, out)

  @property
  def record(self) -> dict[str, str]:
    """Origin and licence, for the record of a run."""
    return {
      "name": self.name,
      **self.artefact.record,
      "origin": self.origin,
      "licence": self.licence,
    }


def names() -> tuple[str, ...]:
  """Every packaged model."""
  return registry.names(PRETRAINED)


def find(name: str) -> Packaged:
  """A packaged model by name.

  Raises:
    InputError: there is none of that name.
  """
  return registry.find(PRETRAINED, name, "pretrained model")
