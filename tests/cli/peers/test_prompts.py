"""The tokens that lanes read."""

import numpy as np

from effjax.cli.peers import prompts
from effjax.data import tokenizers


def test_rows_are_the_text_from_different_places():
  tokenizer = tokenizers.byte_tokenizer()
  whole = tokenizer.encode(prompts.TEXT)
  found = prompts.tokens(tokenizer, 257, 8, 200)
  assert found.shape == (8, 200) and found.dtype == np.int32
  assert found[0].tolist() == list(whole[:200])
  assert len({tuple(row) for row in found}) == 8


def test_a_row_goes_around_the_text():
  tokenizer = tokenizers.byte_tokenizer()
  size = len(tokenizer.encode(prompts.TEXT))
  found = prompts.tokens(tokenizer, 257, 1, size + 5)
  assert found[0, size:].tolist() == found[0, :5].tolist()


def test_without_a_tokenizer_ids_are_random_and_the_same():
  found = prompts.tokens(None, 7, 2, 100)
  assert set(found.ravel()) == set(range(7))
  np.testing.assert_array_equal(found, prompts.tokens(None, 7, 2, 100))
