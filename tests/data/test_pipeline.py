import dataclasses
import json

import grain
import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from effjax.core import errors
from effjax.data import config, packing, pipeline


def take(iterator, count):
  return [next(iterator) for _ in range(count)]


def assert_equal(first, second):
  for a, b in zip(first, second, strict=True):
    assert a.keys() == b.keys()
    for name in a:
      np.testing.assert_array_equal(a[name], b[name])


def test_batches_are_of_the_promised_form(tiny):
  for batch in take(tiny.train_iterator(), 5):
    assert sorted(batch) == ["inputs", "positions", "segments", "targets", "weights"]
    assert {values.shape for values in batch.values()} == {(8, 24)}
    assert batch["weights"].dtype == np.float32
    assert {v.dtype for k, v in batch.items() if k != "weights"} == {np.dtype("int32")}
    assert (batch["weights"][batch["segments"] == 0] == 0).all()
    assert (batch["inputs"] < tiny.tokenizer.vocab_size).all()
    starts = (batch["positions"] == 0) & (batch["segments"] > 1)
    assert (batch["inputs"][starts] == tiny.tokenizer.bos_id).all()


def test_an_epoch_reads_every_token_once(tiny):
  rows = len(packing.PackedRows(tiny.arrays["train"], 24, tiny.config.seed))
  batches = take(tiny.train_iterator(), -(-rows // 8))
  inputs = np.concatenate([b["inputs"] for b in batches])[:rows]
  used = np.concatenate([b["segments"] for b in batches])[:rows] > 0
  weights = np.concatenate([b["weights"] for b in batches])[:rows]
  expected = np.sort(np.asarray(tiny.arrays["train"].ids_T))
  np.testing.assert_array_equal(np.sort(inputs[used]), expected)
  num_targets = tiny.tokens_per_epoch - tiny.arrays["train"].num_documents
  assert weights.sum() == num_targets


def test_same_seed_same_batches(tiny, tiny_config):
  again = pipeline.open_data(tiny_config)
  assert_equal(take(tiny.train_iterator(), 6), take(again.train_iterator(), 6))
  other = take(tiny.train_iterator(seed=9), 1)[0]
  assert not np.array_equal(
    other["inputs"], take(tiny.train_iterator(), 1)[0]["inputs"]
  )


@pytest.mark.parametrize("step", [0, 1, 7, 150])
def test_resumes_exactly_from_a_state_in_json(tiny, step):
  iterator = tiny.train_iterator()
  take(iterator, step)
  state = json.loads(json.dumps(iterator.get_state()))
  expected = take(iterator, 4)
  resumed = tiny.train_iterator()
  resumed.set_state(state)
  assert_equal(take(resumed, 4), expected)
  # An iterator that has run on goes back as well.
  iterator.set_state(state)
  assert_equal(take(iterator, 4), expected)


def test_resumes_through_an_orbax_checkpoint(tiny, tmp_path):
  iterator = tiny.train_iterator()
  take(iterator, 3)
  with ocp.CheckpointManager(tmp_path) as manager:
    save = grain.checkpoint.CheckpointSave(iterator)
    manager.save(3, args=ocp.args.Composite(data=save))
    manager.wait_until_finished()
    expected = take(iterator, 3)
    resumed = tiny.train_iterator()
    restore = grain.checkpoint.CheckpointRestore(resumed)
    manager.restore(3, args=ocp.args.Composite(data=restore))
  assert_equal(take(resumed, 3), expected)


@pytest.mark.parametrize("count", [2, 4, 8])
def test_processes_together_read_what_one_reads_alone(tiny, tiny_config, count):
  whole = take(tiny.train_iterator(), 5)
  parts = []
  for index in range(count):
    share = pipeline.open_data(tiny_config, index, count)
    iterator = share.train_iterator()
    parts.append(take(iterator, 5))
    state = iterator.get_state()
  joined = [
    jax.tree.map(lambda *xs: np.concatenate(xs), *batches)
    for batches in zip(*parts, strict=True)
  ]
  assert_equal(joined, whole)
  # The state of one of several processes resumes a run of one process.
  alone = tiny.train_iterator()
  alone.set_state(state)
  reference = tiny.train_iterator()
  assert_equal(take(alone, 2), take(reference, 7)[5:])


def test_eval_batches_score_the_text_that_is_returned(tiny):
  batches = list(tiny.eval_batches(4))
  assert {batch["inputs"].shape for batch in batches} == {(4, 24)}
  counted = sum(batch["weights"].sum() for batch in batches)
  assert counted == tiny.eval_set.num_tokens == tiny.facts["eval"]["num_tokens"]
  assert 0 < tiny.eval_set.num_bytes <= tiny.config.eval_bytes
  validation = "".join(tiny.corpus.texts("validation")).encode()
  for document in tiny.eval_set.documents:
    assert document.encode() in validation


def test_train_text_is_the_raw_training_split(tiny):
  text = tiny.train_text()
  assert len(text) == tiny.corpus.facts["bytes"]["train"]
  assert text.decode() == "".join(tiny.corpus.texts("train"))
  assert tiny.train_text(max_bytes=100) == text[:100]


def test_facts_are_plain_and_consistent(tiny):
  facts = json.loads(json.dumps(tiny.facts))
  assert facts["name"] == "synthetic"
  assert len(facts["hash"]) == 64
  for split, size in facts["bytes"].items():
    num = facts["tokens"][split] - facts["documents"][split]
    assert facts["bytes_per_token"][split] == pytest.approx(size / num)


def test_byte_tokens(tiny_config):
  plain = dataclasses.replace(tiny_config, tokenizer="bytes", vocab_size=257)
  data = pipeline.open_data(plain)
  assert data.facts["bytes_per_token"]["train"] == 1.0
  assert data.eval_set.num_tokens == data.eval_set.num_bytes


@pytest.mark.parametrize(
  ("values", "processes", "message"),
  [
    ({"sequence_length": 10**6}, (0, 1), "use shorter sequences or more text"),
    ({}, (0, 3), "multiple of the 3 processes"),
    ({}, (2, 2), "process_index must be from 0 to 1"),
    ({"options": {"document": 3}}, (0, 1), "did you mean 'documents'"),
    ({"options": {"documents": 1}}, (0, 1), "at least 2"),
    ({"options": {"duplicates": "non"}}, (0, 1), "unknown value of duplicates"),
    ({"options": {"validation_fraction": 1.5}}, (0, 1), "between 0 and 1"),
    ({"manual_dir": "/missing"}, (0, 1), "/missing is not a folder"),
  ],
)
def test_bad_input(tiny_config, values, processes, message):
  with pytest.raises(errors.InputError) as info:
    pipeline.open_data(dataclasses.replace(tiny_config, **values), *processes)
  assert message in str(info.value)
  assert "\n" not in str(info.value)


def test_eval_batch_must_be_shared_evenly(tiny_config):
  data = pipeline.open_data(tiny_config, 0, 2)
  with pytest.raises(errors.InputError, match="multiple of the 2 processes"):
    data.eval_batches(3)


def test_check_writes_nothing(fresh_cache, tmp_path):
  pipeline.check(config.DataConfig(corpus="stdlib"))
  with pytest.raises(errors.InputError):
    pipeline.check(config.DataConfig(corpus="text_files", options={"paths": ["none"]}))
  assert not fresh_cache.exists()
