import dataclasses

import numpy as np

from effjax.data import cache, pipeline, tokenizers, tokens


def test_arrays_hold_every_document_after_its_start(tiny):
  for split, array in tiny.arrays.items():
    texts = list(tiny.corpus.texts(split))
    assert array.num_documents == len(texts)
    for index, text in enumerate(texts):
      ids = array.ids_T[array.offsets_D1[index] : array.offsets_D1[index + 1]]
      assert ids[0] == tiny.tokenizer.bos_id
      assert tiny.tokenizer.decode(ids.tolist()) == text
    assert array.offsets_D1[-1] == len(array.ids_T)
    assert array.ids_T.dtype == np.uint16
    assert isinstance(array.ids_T, np.memmap)


def test_many_blocks_equal_one(tiny, fresh_cache, monkeypatch):
  monkeypatch.setattr(tokens, "_BLOCK_CHARS", 100)
  again = tokens.tokenize(tiny.corpus, tiny.tokenizer)
  for split, array in tiny.arrays.items():
    np.testing.assert_array_equal(again[split].ids_T, array.ids_T)
    np.testing.assert_array_equal(again[split].offsets_D1, array.offsets_D1)


def test_large_vocabularies_need_wider_ids(tiny, fresh_cache):
  wide = tokenizers.train(["ab"], (1 << 16) + 1)
  array = tokens.tokenize(tiny.corpus, wide)["validation"]
  assert array.ids_T.dtype == np.uint32


def test_the_tokenizer_sees_the_training_split_only(tiny, fresh_cache):
  split = {"train": tiny.corpus.sources["train"], "validation": []}
  alone = dataclasses.replace(tiny.corpus, sources=split)
  trained = tokens.tokenizer_for(alone, "bpe", tiny.config.vocab_size)
  assert trained.to_json() == tiny.tokenizer.to_json()


def test_opening_again_reads_the_cache(tiny, tiny_config, monkeypatch):
  def refuse(*args):
    raise AssertionError("made again")

  monkeypatch.setattr(cache, "replacing", refuse)
  again = pipeline.open_data(tiny_config)
  assert again.tokenizer.to_json() == tiny.tokenizer.to_json()
