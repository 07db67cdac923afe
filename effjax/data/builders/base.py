"""What every corpus shares: options, one-time building through tfds, opening.

A corpus is a `tfds` builder that writes ArrayRecord files (random access, and no
TensorFlow) once into the cache. Its config name is a fingerprint of everything that
decides the content, so a changed option, file or Python makes a new data set and an
unchanged one is opened in milliseconds.
"""

import abc
import contextlib
import dataclasses
import hashlib
import io
import json
import logging
import pathlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

import absl.logging
import numpy as np
import tensorflow_datasets as tfds

from effjax.core import config, errors
from effjax.data import cache, documents

log = logging.getLogger(__name__)

DUPLICATES = ("keep", "exact", "near")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Corpus:
  """An opened corpus.

  Attributes:
    name: registry key.
    kind: "text" (records {"name", "text"}), "tokens" (records {"tokens", "scored"}) or
      "image" (records {"image", "label"}).
    sources: random-access records of each split.
    facts: plain values for the report: hash (SHA-256 of the content), origin, licence,
      documents and bytes of each split, and what else the corpus knows of itself.
    symbols: what each id stands for, of kind "tokens".
  """

  name: str
  kind: str
  sources: Mapping[str, Sequence[Mapping[str, Any]]]
  facts: Mapping[str, Any]
  symbols: tuple[str, ...] = ()

  def texts(self, split: str) -> Iterator[str]:
    """The texts of a split, in the order stored."""
    source = self.sources[split]
    for index in range(len(source)):
      yield source[index]["text"].decode("utf-8")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextOptions:
  """Options of every corpus that splits its own documents.

  Attributes:
    validation_fraction: expected share of the documents, chosen by hash of the name.
    duplicates: "keep", "exact" (drop equal texts), "near" (also similar ones).
    similarity: estimated Jaccard similarity from which "near" drops a document.
  """

  validation_fraction: float = 0.05
  duplicates: str = "exact"
  similarity: float = 0.3

  def __post_init__(self):
    config.require(
      0 < self.validation_fraction < 1,
      f"validation_fraction must be between 0 and 1, got {self.validation_fraction}",
    )
    config.require(
      0 < self.similarity <= 1,
      f"similarity must be above 0 and at most 1, got {self.similarity}",
    )
    if self.duplicates not in DUPLICATES:
      raise errors.unknown("value of duplicates", self.duplicates, DUPLICATES)


@dataclasses.dataclass(eq=False, kw_only=True)
class SourceConfig(tfds.core.BuilderConfig):
  """A tfds config that carries a corpus's own options."""

  options: Any = None
  manual_dir: str | None = None


class _LocalInfo(tfds.core.DatasetInfo):
  def initialize_from_bucket(self) -> None:
    """Does nothing: these data sets are not in tfds's own bucket."""


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
  """Keeps tfds from printing: standard output is for results."""
  verbosity = absl.logging.get_verbosity()
  absl.logging.set_verbosity(absl.logging.ERROR)
  tfds.disable_progress_bar()
  try:
    with contextlib.redirect_stdout(io.StringIO()):
      yield
  finally:
    absl.logging.set_verbosity(verbosity)


class CorpusBuilder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
  """Base of the builders; a subclass is one file of this package.

  Class attributes:
    KEY: registry key, equal to the file name.
    KIND: "text", "tokens" or "image".
    ORIGIN, LICENCE: one line each, for the report.
    Options: frozen dataclass of the corpus's options.
  """

  VERSION = tfds.core.Version("1.0.0")
  code_path = None  # tfds would look beside the code for download checksums.
  KEY: ClassVar[str]
  KIND: ClassVar[str] = "text"
  ORIGIN: ClassVar[str]
  LICENCE: ClassVar[str]
  Options: ClassVar[type] = TextOptions

  def __init_subclass__(cls, **kwargs: Any):
    # tfds has data sets of its own with some of these names.
    super().__init_subclass__(skip_registration=True, **kwargs)

  @classmethod
  def check(cls, options: Mapping[str, Any], manual_dir: str | None) -> Any:
    """Checks options and files without reading any content; returns the options.

    Raises:
      InputError: unknown or mistyped option, missing file or package client.
    """
    if manual_dir is not None and not pathlib.Path(manual_dir).is_dir():
      raise errors.InputError(f"data.manual_dir: {manual_dir} is not a folder")
    checked = config.build(cls.Options, options, "config.data.options")
    cls.check_files(checked, manual_dir)
    return checked

  @classmethod
  def open(cls, options: Mapping[str, Any], manual_dir: str | None) -> Corpus:
    """Opens the corpus, after fetching and building it the first time."""
    checked = cls.check(options, manual_dir)
    identity = {
      "corpus": cls.KEY,
      "options": config.to_dict(checked),
      "content": cls.fingerprint(checked, manual_dir),
    }
    text = json.dumps(identity, sort_keys=True)
    name = hashlib.sha256(text.encode()).hexdigest()[:16]
    data_dir = cache.folder() / "corpora"
    with cache.locked(data_dir / f"{cls.KEY}-{name}"), _quiet():
      builder = cls(
        data_dir=data_dir,
        config=SourceConfig(name=name, options=checked, manual_dir=manual_dir),
        file_format="array_record",
      )
      if not builder.data_path.exists():
        log.info("building corpus %s in %s", cls.KEY, builder.data_path)
        builder.download_and_prepare()
    sources = {split: builder.as_data_source(split) for split in builder.info.splits}
    return Corpus(
      name=cls.KEY,
      kind=cls.KIND,
      sources=sources,
      facts=dict(builder.info.metadata),
      symbols=cls.symbols(checked),
    )

  @classmethod
  def symbols(cls, options: Any) -> tuple[str, ...]:
    """What each token id stands for, the start first; none unless of kind "tokens"."""
    del options
    return ()

  @classmethod
  def check_files(cls, options: Any, manual_dir: str | None) -> None:
    """Raises InputError if a file or a package client is missing; reads nothing."""

  @classmethod
  @abc.abstractmethod
  def fingerprint(cls, options: Any, manual_dir: str | None) -> Any:
    """Plain values that change whenever the content would, cheap to compute."""

  def features(self) -> dict[str, Any]:
    """The tfds features of a record."""
    return {"name": tfds.features.Text(), "text": tfds.features.Text()}

  def _info(self) -> tfds.core.DatasetInfo:
    return _LocalInfo(
      builder=self,
      features=tfds.features.FeaturesDict(self.features()),
      disable_shuffling=True,
      metadata=tfds.core.MetadataDict(),
    )

  def _record_facts(self, **facts: Any) -> None:
    """Stores what `Corpus.facts` will hold beside the data."""
    common = {"origin": self.ORIGIN, "licence": self.LICENCE}
    self.info.metadata.update(common | facts)


def listing(paths: Iterable[pathlib.Path]) -> list[Any]:
  """Path, size and time of change of files: a fingerprint that reads no content."""
  stats = [(path.resolve(), path.stat()) for path in paths]
  return [(str(path), stat.st_size, stat.st_mtime_ns) for path, stat in stats]


class TextBuilder(CorpusBuilder):
  """A corpus given as documents; subclasses say where they come from."""

  @abc.abstractmethod
  def read_documents(self) -> Iterator[documents.Document]:
    """Every document, in a fixed order; called once to survey, once for each split."""

  def extra_facts(self) -> dict[str, Any]:
    """Facts of this corpus alone."""
    return {}

  def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[Any]]:
    del dl_manager
    options = self.builder_config.options
    found = documents.survey(
      self.read_documents(),
      corpus=self.KEY,
      duplicates=options.duplicates,
      similarity=options.similarity,
      validation_fraction=options.validation_fraction,
    )
    self._record_facts(
      hash=found.digest,
      documents={split: len(entries) for split, entries in found.splits.items()},
      bytes=found.num_bytes,
      dropped=found.dropped,
      **self.extra_facts(),
    )
    return {
      split: self._generate_examples(entries) for split, entries in found.splits.items()
    }

  def _generate_examples(
    self, entries: tuple[documents.Entry, ...]
  ) -> Iterator[tuple[int, dict[str, str]]]:
    wanted = {entry.index: entry for entry in entries}
    for index, document in enumerate(self.read_documents()):
      if index in wanted:
        entry = wanted[index]
        text = document.text[entry.start : entry.stop]
        yield index, {"name": document.name, "text": text}


class ExampleBuilder(CorpusBuilder):
  """A corpus of examples of token ids, in which only some tokens are scored.

  An example begins with id 0. Its facts say what always giving the most frequent
  answer of a split gets: `majority`, the share of that answer.
  """

  KIND = "tokens"
  ORIGIN = "generated"
  LICENCE = "none needed"

  @classmethod
  def fingerprint(cls, options: Any, manual_dir: str | None) -> Any:
    return []

  @abc.abstractmethod
  def make_examples(self, split: str) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Ids (integers) and whether each is an answer to be predicted (bool), `[T]`."""

  def features(self) -> dict[str, Any]:
    return {
      "tokens": tfds.features.Tensor(shape=(None,), dtype=np.uint16),
      "scored": tfds.features.Tensor(shape=(None,), dtype=np.bool_),
    }

  def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[Any]]:
    del dl_manager
    made = {split: list(self.make_examples(split)) for split in documents.SPLITS}
    digests = {
      split: [
        hashlib.sha256(ids.astype("<u2").tobytes() + scored.tobytes()).digest()
        for ids, scored in examples
      ]
      for split, examples in made.items()
    }
    answers = {
      split: np.bincount(np.concatenate([ids[scored] for ids, scored in examples]))
      for split, examples in made.items()
    }
    self._record_facts(
      hash=documents.corpus_digest(digests),
      documents={split: len(examples) for split, examples in made.items()},
      scored={split: int(counts.sum()) for split, counts in answers.items()},
      majority={
        split: float(counts.max() / counts.sum()) for split, counts in answers.items()
      },
    )
    return {
      split: self._generate_examples(examples) for split, examples in made.items()
    }

  def _generate_examples(
    self, examples: Iterable[tuple[np.ndarray, np.ndarray]]
  ) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
    for index, (ids, scored) in enumerate(examples):
      yield index, {"tokens": ids.astype(np.uint16), "scored": scored}
