"""Corpora of examples in which only the answers are scored: rows, windows, resuming."""

import dataclasses
import json

import numpy as np
import pytest

from effjax.core import errors
from effjax.data import config, describe, evaluation, packing, pipeline, tokens

CONFIG = config.DataConfig(
  corpus="listops",
  tokenizer="ids",
  vocab_size=16,
  options={"num_examples": 50, "num_validation": 21},
  sequence_length=64,
  batch_size=8,
  seed=3,
)


@pytest.fixture(scope="module")
def data(cache_folder):
  return pipeline.open_data(CONFIG)


def take(iterator, count):
  return [next(iterator) for _ in range(count)]


def assert_equal(first, second):
  for a, b in zip(first, second, strict=True):
    assert a.keys() == b.keys()
    for name in a:
      np.testing.assert_array_equal(a[name], b[name])


def examples(array):
  ids = np.split(np.asarray(array.ids_T), array.offsets_D1[1:-1])
  return [tuple(one.tolist()) for one in ids]


def unpacked(batch):
  """The examples of a batch, put together from what the model reads and predicts."""
  for b in range(len(batch["inputs"])):
    used = batch["segments"][b] > 0
    num = used.sum()
    assert used[:num].all()
    inputs, targets = batch["inputs"][b][used], batch["targets"][b][used]
    np.testing.assert_array_equal(inputs[1:], targets[:-1])
    np.testing.assert_array_equal(batch["positions"][b][used], np.arange(num))
    # The answer alone counts, and padding is nothing.
    assert np.flatnonzero(batch["weights"][b]).tolist() == [num - 1]
    assert batch["weights"][b][num - 1] == 1
    for name in batch:
      assert not batch[name][b][~used].any()
    yield (*inputs.tolist(), int(targets[-1]))


def test_a_row_is_an_example_and_an_epoch_all_of_them(data):
  rows = packing.ExampleRows(data.arrays["train"], 64, seed=3)
  assert len(rows) == data.rows_per_epoch == 50
  found = {}
  for epoch in (0, 1):
    batch = [rows[epoch * 50 + i] for i in range(50)]
    stacked = {name: np.stack([row[name] for row in batch]) for name in batch[0]}
    assert {v.dtype.name for v in stacked.values()} == {"int32", "float32"}
    assert stacked["weights"].dtype == np.float32
    found[epoch] = list(unpacked(stacked))
    assert sorted(found[epoch]) == sorted(examples(data.arrays["train"]))
  assert found[0] != found[1]
  other = packing.ExampleRows(data.arrays["train"], 64, seed=4)
  assert not np.array_equal(other[0]["inputs"], rows[0]["inputs"])


@pytest.mark.parametrize("step", [0, 3, 20])
def test_resumes_exactly_from_a_state_in_json(data, step):
  iterator = data.train_iterator()
  take(iterator, step)
  state = json.loads(json.dumps(iterator.get_state()))
  expected = take(iterator, 9)
  resumed = data.train_iterator()
  resumed.set_state(state)
  assert_equal(take(resumed, 9), expected)


def test_processes_together_read_what_one_reads_alone(data):
  whole = take(data.train_iterator(), 3)
  parts = [
    take(pipeline.open_data(CONFIG, index, 2).train_iterator(), 3) for index in (0, 1)
  ]
  joined = [
    {name: np.concatenate([a[name], b[name]]) for name in a}
    for a, b in zip(*parts, strict=True)
  ]
  assert_equal(joined, whole)


def test_evaluation_scores_every_validation_answer_once(data):
  batches = list(data.eval_batches(8))
  assert {batch["inputs"].shape for batch in batches} == {(8, 64)}
  last = batches[-1]
  assert not last["weights"][5:].any() and not last["segments"][5:].any()
  filled = [*batches[:-1], {name: rows[:5] for name, rows in last.items()}]
  found = [example for batch in filled for example in unpacked(batch)]
  assert found == examples(data.arrays["validation"])
  assert data.eval_set.num_tokens == data.eval_set.num_windows == 21
  assert data.eval_set.num_bytes is None


def test_several_answers_and_a_length_that_is_just_enough():
  array = tokens.TokenArray(
    ids_T=np.array([0, 5, 6, 7, 0, 8], np.uint16),
    offsets_D1=np.array([0, 4, 6]),
    scored_T=np.array([0, 1, 0, 1, 0, 1], bool),
  )
  assert array.num_targets == 3
  found = evaluation.examples(array, 3)
  assert found.num_tokens == 3
  first, second = found.windows()
  assert first["inputs"].tolist() == [0, 5, 6]
  assert first["targets"].tolist() == [5, 6, 7]
  assert first["weights"].tolist() == [1, 0, 1]
  assert second["segments"].tolist() == [1, 0, 0]
  assert second["weights"].tolist() == [1, 0, 0]
  with pytest.raises(errors.InputError, match="eval_context is 2, but the longest"):
    evaluation.examples(array, 2)
  with pytest.raises(errors.InputError, match="sequence_length is 2, but the longest"):
    packing.ExampleRows(array, 2, 0)


def test_says_what_a_config_feeds(data):
  found = describe.describe(CONFIG, num_samples=2)
  json.dumps(found)
  assert found["batch"]["rows_per_epoch"] == 50
  known = {data.tokenizer.decode(one) for one in examples(data.arrays["train"])}
  assert all(len(sample) == 1 and sample[0] in known for sample in found["samples"])
  text = describe.render(found)
  assert "50 answers" in text and "21 answers of 21 documents" in text
  assert "bytes" not in text


@pytest.mark.parametrize(
  ("values", "message"),
  [
    ({"tokenizer": "bpe", "vocab_size": 300}, "set data.tokenizer to 'ids'"),
    ({"vocab_size": 15}, "corpus 'listops' has 16 ids: set data.vocab_size to 16"),
    ({"corpus": "synthetic", "options": {}}, "'synthetic' is none"),
    ({"sequence_length": 20}, "the longest example needs"),
    ({"eval_context": 20}, "the longest example needs"),
    ({"options": {"num_pairs": 1}}, "unknown field of config.data.options"),
  ],
)
def test_bad_input(data, values, message):
  with pytest.raises(errors.InputError) as info:
    pipeline.open_data(dataclasses.replace(CONFIG, **values))
  assert message in str(info.value)
  assert "\n" not in str(info.value)
