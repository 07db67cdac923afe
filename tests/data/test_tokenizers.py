import json

import pytest
import tokenizers as hf
from hypothesis import given
from hypothesis import strategies as st

from effjax.core import errors
from effjax.data import tokenizers

CODE = [
  f"def function_{i}(self, value):\n    if value > {i}:\n        return self.name\n\n"
  for i in range(200)
]


@pytest.fixture(scope="module")
def trained() -> tokenizers.Tokenizer:
  return tokenizers.train(CODE, 320)


TEXTS = st.one_of(
  st.text(),
  st.text(alphabet=" \t\n\r_.(0aé\u00a0\u2028\u0085<|>"),
  st.sampled_from(CODE),
)


@given(TEXTS)
def test_any_text_comes_back_exactly(trained, text):
  for tokenizer in (trained, tokenizers.byte_tokenizer()):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode_bytes([tokenizer.bos_id, *ids]) == text.encode()
    assert tokenizer.bos_id not in ids
    assert all(0 <= i < tokenizer.vocab_size for i in ids)


def test_text_cannot_spell_the_document_start(trained):
  for text in (tokenizers.BOS, f"a{tokenizers.BOS}b", "<|unused 300|>"):
    assert trained.bos_id not in trained.encode(text)
    assert trained.decode(trained.encode(text)) == text


def test_byte_alphabet_is_that_of_the_library():
  library = hf.pre_tokenizers.ByteLevel.alphabet()
  assert sorted(tokenizers.byte_alphabet()) == sorted(library)
  level = hf.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
  for char in ("A", " ", "\n", "é", "\u00ad", "😀"):
    ((mapped, _),) = level.pre_tokenize_str(char)
    table = tokenizers.byte_alphabet()
    assert mapped == "".join(table[byte] for byte in char.encode())


def test_bytes_are_ids_in_order():
  tokenizer = tokenizers.byte_tokenizer()
  assert tokenizer.vocab_size == 257 and tokenizer.bos_id == 0
  assert tokenizer.encode("Aé\n") == [66, 0xC3 + 1, 0xA9 + 1, 11]


def test_merges_equal_the_library_trained_by_itself(trained):
  """Reassembling ids and dropping the added tokens must not change a segmentation."""
  plain = hf.Tokenizer(hf.models.BPE())
  plain.pre_tokenizer = tokenizers._pre_tokenizer()
  plain.train_from_iterator(
    CODE,
    hf.trainers.BpeTrainer(
      vocab_size=319,
      show_progress=False,
      initial_alphabet=hf.pre_tokenizers.ByteLevel.alphabet(),
    ),
  )
  table = {char: byte for byte, char in enumerate(tokenizers.byte_alphabet())}
  for text in CODE[::40] + ["unseen words, 12345 + ünïcode"]:
    expected = [bytes(table[c] for c in token) for token in plain.encode(text).tokens]
    assert [trained.decode_bytes([i]) for i in trained.encode(text)] == expected


def test_training_is_deterministic_and_saved_exactly(trained, tmp_path):
  again = tokenizers.train(iter(CODE), 320)
  assert again.to_json() == trained.to_json()
  trained.save(tmp_path / "t.json")
  loaded = tokenizers.load(tmp_path / "t.json")
  assert loaded.to_json() == trained.to_json()
  assert (loaded.vocab_size, loaded.bos_id) == (320, 0)
  assert loaded.encode(CODE[3]) == trained.encode(CODE[3])
  # The file is the library's own format: others can read it.
  other = hf.Tokenizer.from_file(str(tmp_path / "t.json"))
  assert other.encode(CODE[3]).ids == trained.encode(CODE[3])
  assert other.decode(trained.encode(CODE[3])) == CODE[3]


def test_line_break_and_indentation_are_one_token():
  tokenizer = tokenizers.train(CODE, 400)
  pieces = [tokenizer.decode([i]) for i in tokenizer.encode(CODE[0])]
  assert ":\n        " in pieces
  assert len(tokenizer.encode(CODE[0])) < len(CODE[0]) / 3


def test_vocab_size_is_as_asked_even_if_the_corpus_is_small():
  small = tokenizers.train(["ab ab"], 400)
  assert small.vocab_size == 400
  assert small.decode_bytes([399]) == b""
  assert tokenizers.train(["ab"], 257).encode("ab") == [98, 99]


def test_batches_encode_as_single_texts_and_long_texts_in_parts(trained, monkeypatch):
  expected = [[trained.bos_id, *trained.encode(text)] for text in ["", *CODE[:5]]]
  batch = trained.encode_documents(["", *CODE[:5]])
  assert [ids.tolist() for ids in batch] == expected
  monkeypatch.setattr(tokenizers, "_PART_CHARS", 60)
  text = "".join(CODE[:4]) + "x" * 200
  assert trained.decode(trained.encode(text)) == text
  (ids,) = trained.encode_documents([text])
  assert ids.tolist() == [trained.bos_id, *trained.encode(text)]
  assert max(map(len, tokenizers._parts(text))) == 60


def test_incomplete_characters_are_replaced(trained):
  ids = tokenizers.byte_tokenizer().encode("é")
  assert tokenizers.byte_tokenizer().decode(ids[:1]) == "\ufffd"


@pytest.mark.parametrize(
  ("content", "message"),
  [
    (None, "is missing"),
    ("{", "is not a tokenizer file"),
    ("[]", "has no"),
    (json.dumps({"model": {"vocab": {"a": 0}}}), "has no"),
  ],
)
def test_bad_files(tmp_path, content, message):
  path = tmp_path / "tokenizer.json"
  if content is not None:
    path.write_text(content)
  with pytest.raises(errors.InputError, match=message):
    tokenizers.load(path)


def test_bad_values(trained):
  with pytest.raises(errors.InputError, match="at least 257"):
    tokenizers.train(CODE, 256)
  for index in (-1, 320):
    with pytest.raises(errors.InputError, match="not in the vocabulary"):
      trained.decode([index])
