import numpy as np
import pytest

from effjax.core import errors
from effjax.data import config, pipeline
from effjax.data.builders import mqar

SPARSE = {"num_pairs": 4, "length": 64, "vocab_size": 40}
DENSE = {"num_pairs": 6, "length": 24, "vocab_size": 16}
SIZES = {"num_examples": 300, "num_validation": 20}


def open_data(task, **changes):
  values = {
    "corpus": "mqar",
    "tokenizer": "ids",
    "vocab_size": task["vocab_size"],
    "options": SIZES | task,
    "sequence_length": task["length"],
    "batch_size": 4,
  }
  return pipeline.open_data(config.DataConfig(**(values | changes)))


@pytest.fixture(scope="module", params=[SPARSE, DENSE], ids=["sparse", "dense"])
def opened(cache_folder, request):
  return request.param, open_data(request.param)


def rows(array):
  ids = [np.asarray(a) for a in np.split(array.ids_T, array.offsets_D1[1:-1])]
  scored = [np.asarray(a) for a in np.split(array.scored_T, array.offsets_D1[1:-1])]
  return list(zip(ids, scored, strict=True))


def test_every_answer_is_the_value_its_key_came_with(opened):
  task, data = opened
  half = task["vocab_size"] // 2
  for ids, scored in rows(data.arrays["train"]) + rows(data.arrays["validation"]):
    assert len(ids) == task["length"] + 1
    assert ids[0] == 0 and (ids[1:] > 0).all() and (ids < task["vocab_size"]).all()
    memory, asked = {}, []
    for t in range(1, 2 * task["num_pairs"], 2):
      assert ids[t] < half <= ids[t + 1]
      memory[int(ids[t])] = int(ids[t + 1])
    assert len(memory) == len(set(memory.values())) == task["num_pairs"]
    for t in np.flatnonzero(scored):
      assert t > 2 * task["num_pairs"] + 1
      assert memory[int(ids[t - 1])] == ids[t]
      asked.append(int(ids[t - 1]))
    assert sorted(asked) == sorted(memory)


def test_splits_are_different_and_the_same_options_give_the_same(
  opened, tmp_path, monkeypatch
):
  task, data = opened
  train, validation = (data.arrays[name] for name in ("train", "validation"))
  assert not np.array_equal(train.ids_T[: len(validation.ids_T)], validation.ids_T)
  monkeypatch.setenv("EFFJAX_CACHE", str(tmp_path))
  again = open_data(task)
  assert again.corpus.facts["hash"] == data.corpus.facts["hash"]
  np.testing.assert_array_equal(again.arrays["train"].ids_T, train.ids_T)
  # Fewer sequences are the first ones; another seed is another corpus.
  fewer = open_data(task, options=task | SIZES | {"num_examples": 50})
  num = len(fewer.arrays["train"].ids_T)
  np.testing.assert_array_equal(fewer.arrays["train"].ids_T, train.ids_T[:num])
  other = open_data(task, options=task | SIZES | {"seed": 1})
  assert other.corpus.facts["hash"] != data.corpus.facts["hash"]


def test_training_may_mix_in_fewer_pairs(cache_folder):
  options = DENSE | {"train_pairs": (2, 6), "num_examples": 2048}
  data = open_data(DENSE, options=SIZES | options)
  answers = [scored.sum() for _, scored in rows(data.arrays["train"])]
  assert answers == [2] * 1024 + [6] * 1024
  plain = open_data(DENSE)
  np.testing.assert_array_equal(
    data.arrays["validation"].ids_T, plain.arrays["validation"].ids_T
  )


def first_places(alpha):
  options = mqar.Options(
    num_pairs=1, length=42, vocab_size=8, num_examples=4096, alpha=alpha
  )
  scored = np.concatenate([mqar._block(options, 1, stream)[1] for stream in range(4)])
  places = np.argmax(scored, axis=1)
  assert (scored.sum(axis=1) == 1).all()
  return (places - 4) // 2


@pytest.mark.parametrize("alpha", [0.01, 1.0])
def test_places_follow_the_power_law(alpha):
  places = first_places(alpha)
  law = np.arange(1, 21) ** (alpha - 1)
  expected = 4096 * law / law.sum()
  counts = np.bincount(places, minlength=20)
  # Chi-squared with 19 degrees of freedom: 43.8 is exceeded once in a thousand.
  assert ((counts - expected) ** 2 / expected).sum() < 43.8


def test_keys_and_values_are_uniform():
  options = mqar.Options(num_pairs=1, length=4, vocab_size=12)
  ids = np.concatenate([mqar._block(options, 1, stream)[0] for stream in range(4)])
  for column, low, high in ((1, 1, 6), (2, 6, 12)):
    counts = np.bincount(ids[:, column], minlength=12)[low:high]
    assert counts.sum() == 4096
    expected = 4096 / (high - low)
    # Five degrees of freedom at most: 20.5 is exceeded once in a thousand.
    assert ((counts - expected) ** 2 / expected).sum() < 20.5


def test_facts_name_the_majority(opened):
  _, data = opened
  array = data.arrays["validation"]
  answers = np.asarray(array.ids_T)[np.asarray(array.scored_T)]
  counts = np.unique(answers, return_counts=True)[1]
  facts = data.facts
  assert facts["scored"]["validation"] == len(answers) == data.eval_set.num_tokens
  assert facts["majority"]["validation"] == counts.max() / counts.sum()
  assert facts["eval"]["num_bytes"] is None and "bytes_per_token" not in facts


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"length": 12}, "at least 4 * num_pairs = 16"),
    ({"length": 17}, "length must be even"),
    ({"vocab_size": 9}, "from 2 * num_pairs + 2 = 10"),
    ({"alpha": 0.0}, "alpha must be above 0"),
    (
      {"train_pairs": (4, 5)},
      "train_pairs must be from 1 to num_pairs = 4, got (4, 5)",
    ),
    ({"num_validation": 0}, "num_validation must be at least 1"),
  ],
)
def test_bad_options(changes, message):
  with pytest.raises(errors.InputError) as info:
    mqar.Options(**({"num_pairs": 4, "length": 16, "vocab_size": 10} | changes))
  assert message in str(info.value)
