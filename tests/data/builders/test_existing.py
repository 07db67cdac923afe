"""Data sets that exist already: tfds folders and plain ArrayRecord files."""

import array_record.python.array_record_module as array_record_module
import pytest

from effjax.core import errors
from effjax.data import config, pipeline
from effjax.data.builders import array_record, synthetic, tfds_directory


@pytest.fixture(scope="module")
def prepared(cache_folder):
  """A folder that tfds prepared."""
  synthetic.TECHNIQUE.open({"documents": 40}, None)
  folders = sorted(cache_folder.glob("corpora/synthetic/*/1.0.0"))
  return next(f for f in folders if _documents(f) == 40)


def _documents(folder) -> int:
  corpus = tfds_directory.TECHNIQUE.open({}, str(folder))
  return sum(corpus.facts["documents"].values())


def test_tfds_folder_equals_the_corpus_it_was_made_from(prepared):
  original = synthetic.TECHNIQUE.open({"documents": 40}, None)
  corpus = tfds_directory.TECHNIQUE.open({}, str(prepared))
  for split in ("train", "validation"):
    assert list(corpus.texts(split)) == list(original.texts(split))
  for fact in ("hash", "documents", "bytes"):
    assert corpus.facts[fact] == original.facts[fact]
  part = {"train": "train[:50%]", "validation": "train[50%:]"}
  halves = tfds_directory.TECHNIQUE.open(part, str(prepared))
  joined = [*halves.texts("train"), *halves.texts("validation")]
  assert joined == list(original.texts("train"))


def test_bad_tfds_folders(prepared, tmp_path):
  def refused(options, folder):
    with pytest.raises(errors.InputError) as info:
      tfds_directory.TECHNIQUE.check(options, folder)
    return str(info.value)

  assert "that holds dataset_info.json" in refused({}, None)
  assert "that holds dataset_info.json" in refused({}, str(tmp_path))
  assert "did you mean 'text'" in refused({"field": "txt"}, str(prepared))
  assert "available: train, validation" in refused({"train": "tests"}, str(prepared))


@pytest.fixture
def record_folder(tmp_path, fresh_cache):
  for split, count in (("train-0", 30), ("train-1", 30), ("validation", 5)):
    path = tmp_path / f"{split}.array_record"
    writer = array_record_module.ArrayRecordWriter(str(path), "group_size:1")
    for i in range(count):
      writer.write(f"{split} text {i} é".encode())
    writer.close()
  return tmp_path


def test_array_record_files_feed_training(record_folder):
  data = pipeline.open_data(
    config.DataConfig(
      corpus="array_record",
      manual_dir=str(record_folder),
      tokenizer="bytes",
      vocab_size=257,
      sequence_length=16,
      batch_size=2,
    )
  )
  assert data.corpus.facts["documents"] == {"train": 60, "validation": 5}
  assert next(data.corpus.texts("train")) == "train-0 text 0 é"
  assert next(data.train_iterator())["inputs"].shape == (2, 16)
  assert data.eval_set.num_bytes == data.corpus.facts["bytes"]["validation"]


def test_bad_array_record_files(record_folder):
  with pytest.raises(errors.InputError, match=r"no file matches 'test\*'"):
    array_record.TECHNIQUE.check({"validation": "test*"}, str(record_folder))
  with pytest.raises(errors.InputError, match="set data.manual_dir to a folder"):
    array_record.TECHNIQUE.check({}, None)
  path = record_folder / "validation.array_record"
  writer = array_record_module.ArrayRecordWriter(str(path), "group_size:1")
  writer.write(b"ok \xff")
  writer.close()
  with pytest.raises(
    errors.InputError, match="validation record 0 is not UTF-8.*set 3"
  ):
    array_record.TECHNIQUE.open({}, str(record_folder))
