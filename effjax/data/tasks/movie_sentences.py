"""Whether a sentence of a film review is positive or negative: 10,072 sentences.

Sentences of Rotten Tomatoes, each with the mean of 20 people's ratings from -4 to 4, as
the source distribution of vaderSentiment 3.3.2 carries them (an archive within the
archive). Positive is a rating above 0; the 533 sentences rated within 0.5 of it, on
which people hardly agreed, are left out.
"""

import io
import pathlib
import tarfile
from collections.abc import Iterator

from effjax.data import documents, fetch
from effjax.data.tasks import base

_INNER = "additional_resources/hutto_ICWSM_2014.tar.gz"
_MEMBER = "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt"
_MIN_RATING = 0.5


def _read(path: pathlib.Path) -> Iterator[base.Example]:
  with tarfile.open(path) as archive:
    (inner,) = (name for name in archive.getnames() if name.endswith(f"/{_INNER}"))
    data = archive.extractfile(inner).read()
  with tarfile.open(fileobj=io.BytesIO(data)) as archive:
    text = documents.decode(archive.extractfile(_MEMBER).read(), _MEMBER)
  # Not splitlines: a line ends where the file's authors ended it and nowhere else.
  for line in filter(None, text.split("\r\n")):
    _, rating, sentence = line.split("\t")
    if abs(float(rating)) >= _MIN_RATING:
      yield base.Example(sentence.strip(), int(float(rating) > 0))


TECHNIQUE = base.Task(
  name="movie_sentences",
  artefact=fetch.Artefact(
    client="pip",
    package="vaderSentiment",
    version="3.3.2",
    file_name="vaderSentiment-3.3.2.tar.gz",
    sha256="5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
    source_only=True,
  ),
  origin="sentences of rottentomatoes.com, rated by people: Hutto and Gilbert 2014, "
  "VADER, ICWSM-14",
  licence="MIT, with the request to cite the paper",
  split="all, but for ratings within 0.5 of 0",
  template="Review: {text}\nSentiment:",
  answers=("negative", "positive"),
  read=_read,
)
