import statistics

import numpy as np
import pytest

from effjax.core import errors
from effjax.data import config, pipeline, tokenizers
from effjax.data.builders import listops

SIZES = {"num_examples": 400, "num_validation": 100}


def open_data(**options):
  return pipeline.open_data(
    config.DataConfig(
      corpus="listops",
      tokenizer="ids",
      vocab_size=16,
      options=SIZES | options,
      sequence_length=64,
      batch_size=4,
    )
  )


@pytest.fixture(scope="module")
def data(cache_folder):
  return open_data()


def examples(data, split):
  """Words of each expression, and its answer."""
  array = data.arrays[split]
  ids = np.split(np.asarray(array.ids_T), array.offsets_D1[1:-1])
  scored = np.split(np.asarray(array.scored_T), array.offsets_D1[1:-1])
  for one, marks in zip(ids, scored, strict=True):
    assert one[0] == 0 and marks.tolist() == [False] * (len(one) - 1) + [True]
    words = data.tokenizer.decode(one.tolist()).split()
    assert len(words) == len(one) - 1
    yield words[:-1], int(words[-1])


def value_of(words):
  """Python's own parser and evaluator, on the expression written as calls."""
  functions = {
    "MIN": lambda *xs: sorted(xs)[0],
    "MAX": lambda *xs: sorted(xs)[-1],
    "MED": lambda *xs: int(statistics.median(xs)),
    "SM": lambda *xs: int(str(sum(xs))[-1]),
  }
  calls = [f"{w[1:]}(" if w[0] == "[" else w + ("," if w != "]" else "") for w in words]
  return eval("".join(calls).replace("]", "),").rstrip(","), functions)


def depth_of(words):
  depth = deepest = 0
  for word in words:
    depth += (word[0] == "[") - (word == "]")
    deepest = max(deepest, depth)
  assert depth == 0
  return deepest


@pytest.mark.parametrize("split", ["train", "validation"])
def test_answers_are_right_and_sizes_as_asked(data, split):
  found = list(examples(data, split))
  assert (
    len(found)
    == SIZES[{"train": "num_examples", "validation": "num_validation"}[split]]
  )
  depths, operators = set(), set()
  for words, answer in found:
    assert value_of(words) == answer
    assert 16 <= len(words) <= 64
    depths.add(depth_of(words))
    operators |= {word for word in words if word[0] == "["}
    # An operator has 2 to 5 arguments.
    counts = []
    for word in words:
      if word == "]":
        assert 2 <= counts.pop() <= 5
      elif counts:
        counts[-1] += 1
      if word[0] == "[":
        counts.append(0)
  assert depths == {2, 3} and operators == {"[MIN", "[MAX", "[MED", "[SM"}


def test_median_of_an_even_number_is_rounded_down():
  assert listops.OPERATORS["[MED"]([1, 4, 2, 9]) == 3
  assert listops.OPERATORS["[MED"]([2, 5]) == 3
  assert value_of("[MED 2 5 ]".split()) == 3


def test_no_expression_twice_and_none_in_both_splits(data):
  train = {tuple(words) for words, _ in examples(data, "train")}
  validation = {tuple(words) for words, _ in examples(data, "validation")}
  assert len(train) == 400 and len(validation) == 100
  assert not train & validation


def test_few_expressions_are_shared_out_or_refused(tmp_path, monkeypatch):
  monkeypatch.setenv("EFFJAX_CACHE", str(tmp_path))
  # Four operators and a hundred pairs of digits are 400 expressions in all.
  few = {"min_length": 4, "max_length": 4, "max_depth": 1, "max_args": 2}
  small = open_data(**few, num_examples=250, num_validation=100)
  both = [words for s in ("train", "validation") for words, _ in examples(small, s)]
  assert len({tuple(words) for words in both}) == 350
  with pytest.raises(errors.InputError, match="known already") as info:
    open_data(**few, num_examples=301, num_validation=100)
  assert "\n" not in str(info.value)


def test_the_same_again_and_another_seed(data, tmp_path, monkeypatch):
  monkeypatch.setenv("EFFJAX_CACHE", str(tmp_path))
  assert open_data().corpus.facts["hash"] == data.corpus.facts["hash"]
  # The validation split does not depend on how much there is to train on.
  fewer = open_data(num_examples=10)
  assert list(examples(fewer, "validation")) == list(examples(data, "validation"))
  assert open_data(seed=1).corpus.facts["hash"] != data.corpus.facts["hash"]


def test_majority_is_that_of_the_answers(data):
  answers = [answer for _, answer in examples(data, "validation")]
  most = max(answers.count(digit) for digit in range(10))
  assert data.facts["majority"]["validation"] == most / 100


def test_text_and_tokenizer_files(data, tmp_path):
  ids = data.tokenizer.encode("[MAX 2 9 [MIN 4 7 ] 0 ] 9")
  assert data.tokenizer.decode([0, *ids]) == "[MAX 2 9 [MIN 4 7 ] 0 ] 9"
  data.tokenizer.save(tmp_path / "tokenizer.json")
  loaded = tokenizers.load(tmp_path / "tokenizer.json")
  assert loaded.names == data.tokenizer.names
  assert loaded.encode_documents(["9 ]"])[0].tolist() == [0, 15, 5]
  with pytest.raises(errors.InputError, match="unknown symbol '\\[MAXX'"):
    loaded.encode("[MAXX 1 2 ]")
  with pytest.raises(errors.InputError, match="0 to 15"):
    loaded.decode([16])


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"max_args": 1}, "max_args must be at least 2"),
    ({"min_length": 70}, "from 4 to max_length=64"),
    ({"operator_probability": 0.0}, "operator_probability must be above 0"),
    ({"max_depth": 0}, "max_depth must be at least 1"),
  ],
)
def test_bad_options(changes, message):
  with pytest.raises(errors.InputError) as info:
    listops.Options(**changes)
  assert message in str(info.value)
