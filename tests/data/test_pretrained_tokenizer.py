"""Pretrained tokenizers against transformers, and where they differ on purpose."""

import functools
import json

import pytest
import tokenizers as hf
from hypothesis import given
from hypothesis import strategies as st

from effjax.core import errors
from effjax.data import pretrained_tokenizer, symbols, tokenizers
from tests.data import families


@pytest.fixture(scope="module", params=families.FAMILIES)
def family(request):
  return request.param


def _made(family, **changes):
  source, facts = families.FAMILIES[family]
  content = json.loads(source())
  return pretrained_tokenizer.Pretrained(content | changes, **facts)


_once = functools.cache(_made)


@pytest.fixture(scope="module")
def byte_level():
  return _made("byte_level")


@pytest.mark.oracle
def test_equals_transformers(family, tmp_path):
  transformers = pytest.importorskip("transformers")
  source, _ = families.FAMILIES[family]
  (tmp_path / "tokenizer.json").write_text(source(), encoding="utf-8")
  oracle = transformers.PreTrainedTokenizerFast(
    tokenizer_file=str(tmp_path / "tokenizer.json")
  )
  made = _made(family)
  assert made.vocab_size == len(oracle)
  for text in families.TEXTS:
    ids = oracle(text, add_special_tokens=False)["input_ids"]
    assert made.encode(text, special=True) == ids
    assert made.decode(ids) == oracle.decode(ids, skip_special_tokens=True)
    assert [made.name(i) for i in ids] == oracle.convert_ids_to_tokens(ids)
    plain = oracle(text, add_special_tokens=False, split_special_tokens=True)
    # Here transformers lets a text spell what its Unigram pieces and its merges reach.
    if not ("<unk>" in text and family == "unigram" or "</s>" in text):
      assert made.encode(text) == plain["input_ids"]
  first = oracle("a")["input_ids"][0]
  assert made.add_bos == (first == made.bos_id)


@pytest.mark.parametrize("name", ["byte_level", "sentencepiece_bpe"])
@given(text=st.one_of(st.text(), st.sampled_from(families.TEXTS)))
def test_any_text_comes_back_exactly(name, text):
  made = _once(name)
  text = text.replace("▁", "_")  # SentencePiece writes a space so.
  ids = made.encode(text)
  assert made.decode(ids) == text
  space = b" " if name == "sentencepiece_bpe" and text else b""
  assert made.decode_bytes(ids) == space + text.encode()
  assert b"".join(made.decode_bytes([i]) for i in ids) == space + text.encode()
  assert not {made.bos_id, *made.eos_ids} & set(ids)


def test_text_cannot_spell_a_special_token(family):
  made = _made(family)
  content = json.loads(made.to_json())["tokenizer"]
  special = [token for token in content["added_tokens"] if token["special"]]
  assert len(special) >= 3
  for token in special:
    assert made.encode(token["content"], special=True) == [token["id"]]
    assert made.decode_bytes([token["id"]]) == b""
    found = made.encode(f"a{token['content']}b {token['content']}")
    unknown = {i for i in found if made.name(i) in ("<unk>", "[UNK]")}
    assert not ({t["id"] for t in special} - unknown) & set(found)


def test_unigram_pieces_are_kept_apart():
  """The library itself finds the piece "<unk>" in "a<unk>b"."""
  made = _made("unigram")
  assert made.name(made.encode("<unk>")[-1]) == ">"
  library = hf.Tokenizer.from_str(families.unigram())
  library.encode_special_tokens = True
  assert library.encode("<unk>", add_special_tokens=False).tokens[-1] == "<unk>"


def test_tokens_that_were_added_as_plain_text(byte_level):
  content = json.loads(families.byte_level())["added_tokens"]
  spaces, word = (t["id"] for t in content if not t["special"])
  assert byte_level.encode("x    über") == [*byte_level.encode("x"), spaces, word]
  assert byte_level.decode([spaces, word]) == "    über"


def test_documents_and_facts(family):
  made = _made(family)
  _, facts = families.FAMILIES[family]
  assert made.eos_ids == tuple(facts["eos_ids"])
  assert (made.bos_id, made.pad_id) == (facts["bos_id"], facts.get("pad_id"))
  documents = made.encode_documents(["", *families.CORPUS[:3]])
  expected = [[made.bos_id, *made.encode(t)] for t in ["", *families.CORPUS[:3]]]
  assert [ids.tolist() for ids in documents] == expected
  assert all(ids.dtype == "uint32" for ids in documents)


def test_what_starts_a_document():
  content = json.loads(families.byte_level())
  made = pretrained_tokenizer.Pretrained(content, eos_ids=(2, 0), pad_id=1)
  assert made.encode_documents(["a"])[0][0] == made.start_id == 2
  made = pretrained_tokenizer.Pretrained(content, pad_id=1)
  assert made.encode_documents(["a"])[0][0] == made.start_id == 1
  made = pretrained_tokenizer.Pretrained(content)
  assert made.start_id is None
  with pytest.raises(errors.InputError, match="nothing a document could start with"):
    made.encode_documents(["a"])


def test_what_a_file_fixes_is_off():
  content = json.loads(families.byte_level())
  backend = hf.Tokenizer.from_str(json.dumps(content))
  backend.enable_truncation(3)
  backend.enable_padding(length=9)
  fixed = json.loads(backend.to_str())
  fixed["model"]["dropout"] = 0.5
  assert fixed["truncation"] and fixed["padding"]
  plain = pretrained_tokenizer.Pretrained(content)
  made = pretrained_tokenizer.Pretrained(fixed)
  for text in ("a", families.CORPUS[0]):
    for special in (False, True):
      assert made.encode(text, special=special) == plain.encode(text)


def test_saved_as_it_came(family, tmp_path):
  template = "{{ messages[0].content }} é"
  source, facts = families.FAMILIES[family]
  made = pretrained_tokenizer.Pretrained(
    json.loads(source()), **facts, add_bos=True, chat_template=template
  )
  made.save(tmp_path / "t.json")
  content = json.loads((tmp_path / "t.json").read_text())
  assert content["format"] == "huggingface"
  assert content["tokenizer"] == json.loads(source())
  loaded = tokenizers.load(tmp_path / "t.json")
  assert loaded.to_json() == made.to_json()
  for name in ("bos_id", "eos_ids", "pad_id", "add_bos", "start_id", "chat_template"):
    assert getattr(loaded, name) == getattr(made, name)
  assert loaded.encode(families.CORPUS[0]) == made.encode(families.CORPUS[0])


def test_names_and_ids_outside(byte_level):
  assert byte_level.name(1) == "<|im_start|>"
  for index in (-1, byte_level.vocab_size):
    for method in (byte_level.name, lambda i: byte_level.decode([i])):
      with pytest.raises(errors.InputError, match="not in the vocabulary"):
        method(index)
    with pytest.raises(errors.InputError, match="not in the vocabulary"):
      byte_level.decode_bytes([index])


def test_holes_and_unmarked_special_tokens():
  """A vocabulary without added tokens; text of one character is never special."""
  vocab = {"<pad>": 0, "a": 1, "b": 2, "!": 3, "<s>": 6, "<unk>": 7}
  model = {"type": "WordLevel", "vocab": vocab, "unk_token": "<unk>"}
  content = json.loads(hf.Tokenizer(hf.models.WordLevel()).to_str())
  content |= {"model": model, "pre_tokenizer": {"type": "WhitespaceSplit"}}
  made = pretrained_tokenizer.Pretrained(content, bos_id=6, eos_ids=(3,), pad_id=0)
  assert made.vocab_size == 8
  assert made.name(4) == "<|unused 4|>"
  assert made.encode("a ! <s>") == [1, 3, 7]
  assert made.encode("a<s>", special=True) == [1, 6]
  assert made.decode([6, 1, 4, 3, 0, 2]) == "a ! b"
  assert made.decode_bytes([6, 1, 4, 3]) == b" a !"
  assert not made.add_bos


def test_all_tokenizers_have_one_interface():
  ours = tokenizers.byte_tokenizer()
  named = symbols.Symbols([symbols.START, "k0", "v0"])
  for made in (ours, named):
    assert made.eos_ids == (made.bos_id,) == (made.start_id,)
    assert made.add_bos
    assert made.pad_id is None and made.chat_template is None
    with pytest.raises(errors.InputError, match="not in the vocabulary"):
      made.name(made.vocab_size)
  assert ours.encode(tokenizers.BOS, special=True) == ours.encode(tokenizers.BOS)
  assert (ours.name(0), ours.name(66)) == (tokenizers.BOS, "A")
  assert named.encode("k0 v0", special=True) == [1, 2]
  assert (named.name(0), named.name(2)) == (symbols.START, "v0")


def _broken(**changes):
  facts = {"format": "huggingface", "bos_id": 1, "eos_ids": [2], "add_bos": False}
  return facts | {"tokenizer": json.loads(families.byte_level())} | changes


def _moved():
  content = json.loads(families.byte_level())
  content["added_tokens"][-1]["id"] += 7
  return content


@pytest.mark.parametrize(
  ("content", "message"),
  [
    (_broken(tokenizer=None), "has no model.vocab"),
    (_broken(tokenizer={"model": {"vocab": []}}), "has no model.vocab"),
    (_broken(tokenizer={"model": {"vocab": {"a": "b"}}}), "token 'a' has id 'b'"),
    (_broken(tokenizer={"model": {"vocab": {"a": 2**40}}}), "token 'a' has id"),
    (_broken(tokenizer={"model": {"vocab": [0]}}), "token None has id 0"),
    (_broken(tokenizer={"model": {"vocab": {"a": 0, "b": 1, "c": 2}}}), "cannot be"),
    (
      _broken(tokenizer={"model": {"vocab": {"a": 0}}, "added_tokens": 3}),
      "not a list of objects",
    ),
    (_broken(tokenizer=_moved()), "does not fit together"),
    (_broken(bos_id=402), "bos_id is 402, the tokenizer has ids from 0 to 401"),
    (_broken(eos_ids=[2, -1]), r"eos_ids\[1\] is -1"),
    (_broken(eos_ids=["x"]), r"eos_ids\[0\] must be int, got 'x'"),
    (_broken(eos_ids=2), "eos_ids must be a list"),
    (_broken(bos_id=True), "bos_id must be int"),
    (_broken(bos_id=None, add_bos=True), "there is no bos_id"),
    (_broken(add_bos="yes"), "add_bos must be bool"),
    (_broken(chat_template=[]), "chat_template must be str"),
    (_broken(eos_id=3), "unknown field 'eos_id'; did you mean 'eos_ids'"),
  ],
)
def test_broken_content_is_one_line(tmp_path, content, message):
  (tmp_path / "tokenizer.json").write_text(json.dumps(content))
  with pytest.raises(errors.InputError, match=message) as found:
    tokenizers.load(tmp_path / "tokenizer.json")
  assert str(tmp_path) in str(found.value)
  assert "\n" not in str(found.value)
