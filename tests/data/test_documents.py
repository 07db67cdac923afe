import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from effjax.core import errors
from effjax.data import documents


def texts(values, split=None):
  return [
    documents.Document(name=f"d{i}", text=text, split=split)
    for i, text in enumerate(values)
  ]


def indices(survey, split):
  return [entry.index for entry in survey.splits[split]]


def test_decode_names_file_and_offset():
  with pytest.raises(
    errors.InputError, match=r"a\.txt is not UTF-8.*0xe9 at offset 13"
  ):
    documents.decode(b"caf\xe9", "a.txt", offset=10)


@given(st.sets(st.text(min_size=1), min_size=2, max_size=40), st.floats(0.01, 0.99))
def test_every_document_is_in_exactly_one_split(values, fraction):
  values = sorted(f"x{value}" for value in values)
  found = documents.survey(
    texts(values), corpus="c", duplicates="keep", validation_fraction=fraction
  )
  train, validation = indices(found, "train"), indices(found, "validation")
  assert train and validation
  assert sorted(train + validation) == list(range(len(values)))
  assert train == sorted(train) and validation == sorted(validation)
  for split in documents.SPLITS:
    size = sum(len(values[i].encode()) for i in indices(found, split))
    assert found.num_bytes[split] == size


def test_a_new_document_moves_no_other():
  values = [f"text {i}" for i in range(300)]
  before = documents.survey(texts(values), corpus="c")
  after = documents.survey(texts([*values, "one more"]), corpus="c")
  assert set(indices(before, "validation")) <= set(indices(after, "validation"))
  assert set(indices(before, "train")) <= set(indices(after, "train"))
  assert 5 <= len(indices(before, "validation")) <= 30


@pytest.mark.parametrize(
  ("mode", "dropped"),
  [
    ("keep", {"blank": 1, "exact": 0, "near": 0}),
    ("exact", {"blank": 1, "exact": 1, "near": 0}),
    ("near", {"blank": 1, "exact": 1, "near": 1}),
  ],
)
def test_duplicates(mode, dropped):
  long = " ".join(f"word{i}" for i in range(200))
  values = [long, " \n", long, long + " and more", "something else altogether here"]
  found = documents.survey(texts(values), corpus="c", duplicates=mode)
  assert found.dropped == dropped
  kept = sorted(indices(found, "train") + indices(found, "validation"))
  assert kept == {"keep": [0, 2, 3, 4], "exact": [0, 3, 4], "near": [0, 4]}[mode]


def test_digest_depends_on_content_order_and_split_alone():
  base = documents.survey(texts(["a", "b", "c"], split=None), corpus="c").digest
  renamed = [documents.Document(name=f"d{i}", text=t) for i, t in enumerate("abc")]
  assert documents.survey(renamed, corpus="other").digest == base
  assert documents.survey(texts(["b", "a", "c"]), corpus="c").digest != base
  assert documents.survey(texts(["a", "b", "d"]), corpus="c").digest != base
  one = hashlib.sha256(b"a").digest()
  two = hashlib.sha256(b"b").digest()
  total = hashlib.sha256(b"train 1\n" + one + b"validation 1\n" + two).hexdigest()
  assert documents.corpus_digest({"train": [one], "validation": [two]}) == total


def test_a_corpus_may_assign_its_splits():
  given = texts(["a", "b"], split="train") + texts(["c"], split="validation")
  found = documents.survey(given, corpus="c")
  assert indices(found, "train") == [0, 1] and indices(found, "validation") == [2]
  # Text of the training split is no validation text, wherever it stands.
  leak = texts(["a", "b"], split="train") + texts(["a", "c"], split="validation")
  found = documents.survey(leak, corpus="c")
  assert indices(found, "validation") == [3]
  with pytest.raises(errors.InputError, match="has no validation document"):
    documents.survey(texts(["a", "b"], split="train"), corpus="c")


def test_a_single_document_is_cut_after_a_line():
  text = "".join(f"line {i}\n" for i in range(100))
  found = documents.survey(texts([text]), corpus="c", validation_fraction=0.1)
  (train,), (validation,) = found.splits["train"], found.splits["validation"]
  head, tail = text[train.start : train.stop], text[validation.start : validation.stop]
  assert head + tail == text
  assert head.endswith("\n")
  assert 0.05 < len(tail) / len(text) <= 0.1
  assert found.num_bytes == {"train": len(head), "validation": len(tail)}


@pytest.mark.parametrize(
  ("values", "message"),
  [([], "is empty"), ([" ", "\n"], "is empty"), (["x"], "too short")],
)
def test_too_little_text(values, message):
  with pytest.raises(errors.InputError, match=message):
    documents.survey(texts(values), corpus="c")
