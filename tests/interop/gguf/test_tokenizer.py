"""Tokenizers of GGUF files encode as llama.cpp does, and come back as they were."""

import json
import random

import numpy as np
import pytest
import tokenizers as hf

from effjax.core import errors
from effjax.data import pretrained_tokenizer, tokenizers
from effjax.interop.gguf import (
  model,
  pre_tokenizers,
  reader,
  tokenizer,
  tokenizer_keys,
  writer,
)
from effjax.interop.gguf.values import Value
from tests.interop.gguf import llama_cpp, tiny

VOCAB = 640
CONTROL = ("<|begin|>", "<|im_end|>")
ODD = (
  "",
  "a",
  "  a b   c",
  "Hello, world! It's 12345 o'clock; we'll GO'S.\n\n  def f(x):\n\treturn x**2 \n",
  "na\u00efve caf\u00e9 \u2014 \u201cquotes\u201d \u2026 \u65e5\u672c\u8a9e \ud55c",
  "\U0001f642\U0001f469\u200d\U0001f467 flags \U0001f1e9\U0001f1ea",
  "\r\n\r\nx\r\n",
  "a\u00a0b\u2003c\u3000",
  "x\u00b2\u00bd\u2167 \u0661\u0662\u0663 4.567,89%",
  "<|im_end|>user<|begin|>\nhi <|tool|> <|im_end|>",
  " <|tool|><|tool|> x",
  "   ",
  "\n \n  \n",
  "if(a<=b){c+=1;}//~~^^||$$==<>",
  "I'LL they'Re I'M don'T",
  "tab\tsep  \t end ",
)
_POOL = (
  [chr(c) for c in range(32, 127)]
  + list("\u00e4\u00f6\u00df\u00e9\u0410\u0432\u0661\u096a\u00b2\u00bd\u2460")
  + list("\u65e5\u672c\u4e2d\ud55c\u2019\u201c\u2026\u20ac\u00a0\u3000\u200d\U0001f642")
  + 4 * ["\n", "\t", " ", "  ", "\r\n", "'", "s", "re", "1", "23"]
)


def _texts():
  rng = random.Random(0)
  drawn = ["".join(rng.choices(_POOL, k=rng.randrange(1, 40))) for _ in range(200)]
  return [*ODD, *drawn]


def _learned(backend, special, alphabet):
  """Tokens in order and merges, learned so that merges reach across words."""
  trainer = hf.trainers.BpeTrainer(
    vocab_size=400, initial_alphabet=alphabet, show_progress=False
  )
  corpus = [*tokenizer_keys.CHECKED, *ODD] * 3
  backend.train_from_iterator(corpus, trainer)
  learned = json.loads(backend.to_str())["model"]
  names = sorted(learned["vocab"], key=learned["vocab"].get)
  return [n for n in names if n not in special], [tuple(m) for m in learned["merges"]]


@pytest.fixture(scope="module")
def byte_level():
  """Keys of a byte-level tokenizer, but for how text is cut."""
  backend = hf.Tokenizer(hf.models.BPE())
  backend.pre_tokenizer = hf.pre_tokenizers.ByteLevel(
    add_prefix_space=False, use_regex=False
  )
  names, merges = _learned(backend, CONTROL, hf.pre_tokenizers.ByteLevel.alphabet())
  tokens = [*CONTROL, *names, "<|tool|>"]
  types = [3, 3, *[1] * len(names), 4]
  return _filled(tokens, types) | {
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.merges": [" ".join(merge) for merge in merges],
    "tokenizer.ggml.bos_token_id": 0,
    "tokenizer.ggml.eos_token_id": 1,
    "tokenizer.chat_template": "{{ messages }}",
  }


@pytest.fixture(scope="module")
def sentence_piece():
  """Keys of a SentencePiece tokenizer."""
  backend = hf.Tokenizer(hf.models.BPE())
  backend.pre_tokenizer = hf.pre_tokenizers.Metaspace(split=True)
  names, merges = _learned(backend, (), [])
  rank = {}
  for index, merge in enumerate(merges):
    rank.setdefault("".join(merge), -float(index))
  raw_bytes = [f"<0x{byte:02X}>" for byte in range(256)]
  names = [n for n in names if n != "<|tool|>"][: VOCAB - 5 - len(raw_bytes)]
  tokens = ["<unk>", "<s>", "</s>", *raw_bytes, *names, "<|tool|>"]
  types = [2, 3, 3, *[6] * 256, *[1] * len(names), 4]
  scores = [0.0] * 259 + [rank.get(name, -1e4) for name in names]
  scores += [0.0] * (VOCAB - len(scores))
  return _filled(tokens, types) | {
    "tokenizer.ggml.model": "llama",
    "tokenizer.ggml.scores": np.array(scores, np.float32),
  }


def _filled(tokens, types):
  more = VOCAB - len(tokens)
  assert more >= 0
  return {
    "tokenizer.ggml.tokens": tokens + [f"[PAD{i}]" for i in range(len(tokens), VOCAB)],
    "tokenizer.ggml.token_type": np.array([*types, *[5] * more], np.int32),
  }


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
  """A file of a tiny model with these rows, whose tokenizer is to be replaced."""
  path = tmp_path_factory.mktemp("gguf") / "bare.gguf"
  tiny.saved(path, "llama", vocab_size=VOCAB)
  return reader.open_file(path)


def _with_keys(bare, path, keys):
  values = {k: v for k, v in bare.values.items() if not k.startswith("tokenizer.")}
  tensors = [
    writer.Tensor(name=t.name, type=t.type, shape=t.shape, raw=bare.raw(t.name))
    for t in bare.tensors.values()
  ]
  writer.write(path, values | keys, tensors)
  return path


def _facts(tokenizer, ends, texts):
  """All that two tokenizers must agree on."""
  return {
    "plain": {text: tokenizer.encode(text) for text in texts},
    "special": {text: tokenizer.encode(text, special=True) for text in texts},
    "add_bos": tokenizer.add_bos,
    "ends": set(ends),
  }


def _both(path, texts):
  """The facts of our tokenizer and of llama.cpp's, and ours."""
  ours = model.open_gguf(path).tokenizer
  with llama_cpp.Model(path) as theirs:
    expected = _facts(theirs, theirs.ends(), texts)
  return _facts(ours, ours.eos_ids, texts), expected, ours


@pytest.mark.oracle
@pytest.mark.parametrize("pre", pre_tokenizers.KNOWN)
def test_byte_level_ids_equal_those_of_llama_cpp(pre, byte_level, bare, tmp_path):
  keys = byte_level | {"tokenizer.ggml.pre": pre}
  path = _with_keys(bare, tmp_path / "a.gguf", keys)
  found, expected, ours = _both(path, _texts())
  assert found == expected
  for text in ODD:
    plain = text.replace("<|im_end|>", "").replace("<|begin|>", "")
    assert ours.decode(ours.encode(plain)) == plain


@pytest.mark.oracle
@pytest.mark.parametrize("prefix", [True, False])
@pytest.mark.parametrize("step", [1, 40])
def test_sentence_piece_ids_equal_those_of_llama_cpp(
  prefix, step, sentence_piece, bare, tmp_path
):
  # With a step, many tokens have equal scores.
  scores = sentence_piece["tokenizer.ggml.scores"] // step
  keys = sentence_piece | {
    "tokenizer.ggml.add_space_prefix": prefix,
    "tokenizer.ggml.scores": scores,
  }
  path = _with_keys(bare, tmp_path / "a.gguf", keys)
  found, expected, _ = _both(path, _texts())
  assert found == expected


def _plain(keys):
  return {k: v.plain if isinstance(v, Value) else v for k, v in keys.items()}


def _equal(keys, expected):
  for name, value in expected.items():
    np.testing.assert_array_equal(keys[name], value, name)


def test_byte_level_keys_come_back(byte_level):
  for pre in ("llama-bpe", "qwen2", "smollm", "gpt-2", "default"):
    keys = byte_level | {"tokenizer.ggml.pre": pre}
    ours = tokenizer.read(keys, VOCAB, "test")
    written, notes = tokenizer_keys.write(ours, VOCAB)
    assert notes == []
    _equal(_plain(written), keys)


def test_sentence_piece_ids_come_back(sentence_piece):
  ours = tokenizer.read(sentence_piece, VOCAB, "test")
  written, notes = tokenizer_keys.write(ours, VOCAB)
  assert notes == []
  again = tokenizer.read(_plain(written), VOCAB, "test")
  assert [again.encode(t) for t in _texts()] == [ours.encode(t) for t in _texts()]
  names = ("tokens", "token_type")
  prefix = tokenizer.PREFIX
  _equal(_plain(written), {prefix + n: sentence_piece[prefix + n] for n in names})


def _hugging_face(byte_level, pre_tokenizer, normalizer=None, ignore_merges=False):
  """The tokenizer as a Hugging Face file has it."""
  read = tokenizer.read(byte_level, VOCAB, "test")
  content = json.loads(read.to_json())["tokenizer"]
  content |= {"pre_tokenizer": pre_tokenizer, "normalizer": normalizer}
  content["model"] |= {"ignore_merges": ignore_merges}
  return pretrained_tokenizer.Pretrained(content, bos_id=0, eos_ids=[1])


def _sequence(*steps):
  return {"type": "Sequence", "pretokenizers": list(steps)}


_BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
_MODERN = (
  r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s"
  r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _split(pattern):
  cut = {"type": "Split", "pattern": {"Regex": pattern}}
  return cut | {"behavior": "Isolated", "invert": False}


@pytest.mark.parametrize(
  ("pre_tokenizer", "normalizer", "ignore_merges", "name"),
  [
    (_BYTES | {"use_regex": True}, None, False, "gpt-2"),
    (_BYTES, None, False, "gpt-2"),
    (
      _sequence({"type": "Digits", "individual_digits": True}, _BYTES),
      None,
      False,
      "smollm",
    ),
    (
      _sequence(_split(_MODERN % "{1,3}"), _BYTES | {"use_regex": False}),
      None,
      True,
      "llama-bpe",
    ),
    (
      _sequence(_split(_MODERN % ""), _BYTES | {"use_regex": False}),
      {"type": "NFC"},
      False,
      "qwen2",
    ),
  ],
)
def test_files_of_hugging_face_get_their_name(
  pre_tokenizer, normalizer, ignore_merges, name, byte_level
):
  ours = _hugging_face(byte_level, pre_tokenizer, normalizer, ignore_merges)
  keys, notes = tokenizer_keys.write(ours, VOCAB)
  assert keys["tokenizer.ggml.pre"] == name
  assert len(notes) == (normalizer is not None)


@pytest.mark.parametrize(
  ("pre_tokenizer", "normalizer"),
  [
    (_BYTES | {"use_regex": False}, None),
    (_BYTES | {"add_prefix_space": True}, None),
    (_sequence(_split(r"\d+"), _BYTES), None),
    (_BYTES, {"type": "Lowercase"}),
  ],
)
def test_what_llama_cpp_would_encode_otherwise_is_left_out(
  pre_tokenizer, normalizer, byte_level
):
  ours = _hugging_face(byte_level, pre_tokenizer, normalizer)
  keys, (note,) = tokenizer_keys.write(ours, VOCAB)
  assert keys == {"tokenizer.ggml.model": "none"}
  assert "no way to cut text that llama.cpp knows" in note


def test_our_own_tokenizers(byte_level):
  keys, notes = tokenizer_keys.write(tokenizers.byte_tokenizer(), 300)
  assert (keys["tokenizer.ggml.pre"], notes) == ("default", [])
  again = tokenizer.read(_plain(keys), 300, "test")
  assert again.bos_id == 0
  for text in ODD:
    assert again.encode(text) == tokenizers.byte_tokenizer().encode(text)
  learned = tokenizers.train(ODD * 9, 300)
  keys, (note,) = tokenizer_keys.write(learned, 300)
  assert keys == {"tokenizer.ggml.model": "none"}
  assert note.startswith("no tokenizer is in the file")
  assert tokenizer_keys.write(None, 300) == (keys, [])
  with pytest.raises(errors.InputError, match="300 ids, the model embeds 299"):
    tokenizer_keys.write(learned, 299)


def test_facts_and_template_are_read(byte_level):
  ours = tokenizer.read(byte_level, VOCAB, "test")
  assert (ours.bos_id, ours.eos_ids, ours.pad_id) == (0, (1,), None)
  assert not ours.add_bos
  assert ours.chat_template == "{{ messages }}"
  more = {
    "tokenizer.ggml.add_bos_token": True,
    "tokenizer.ggml.padding_token_id": 5,
    "tokenizer.ggml.eot_token_id": 0,
    "tokenizer.ggml.eom_token_id": 2**32 - 1,
  }
  ours = tokenizer.read(byte_level | more, VOCAB, "test")
  assert (ours.eos_ids, ours.pad_id, ours.add_bos) == ((1, 0), 5, True)
  llama = byte_level | {"tokenizer.ggml.pre": "llama-bpe"}
  assert tokenizer.read(llama, VOCAB, "test").add_bos
  assert tokenizer.read({"tokenizer.ggml.model": "none"}, VOCAB, "test") is None
  assert tokenizer.read({}, VOCAB, "test") is None


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"pre": "quen2"}, "unknown tokenizer.ggml.pre in test 'quen2'; .*'qwen2'.*smollm"),
    ({"model": "bert"}, "unknown tokenizer.ggml.model in test 'bert'.*gpt2, llama"),
    ({"tokens": None}, "test has no tokenizer.ggml.tokens"),
    ({"merges": None}, "test has no tokenizer.ggml.merges"),
    ({"tokens": np.zeros(3)}, "does not have strings in tokenizer.ggml.tokens"),
    ({"tokens": ["a"] * (VOCAB + 1)}, "641 tokens, the model embeds 640"),
    ({"token_type": np.zeros(3, np.int32)}, "one number for each of the 640 tokens"),
    ({"model": "llama"}, "test has no tokenizer.ggml.scores"),
    ({"merges": ["zz qq"]}, "test: the Hugging Face tokenizer cannot be read"),
    ({"bos_token_id": "x"}, "bos_token_id must be int"),
  ],
)
def test_keys_that_do_not_fit_are_one_clear_line(changes, message, byte_level):
  keys = byte_level | {f"tokenizer.ggml.{k}": v for k, v in changes.items()}
  with pytest.raises(errors.InputError, match=message) as raised:
    tokenizer.read(keys, VOCAB, "test")
  assert "\n" not in str(raised.value)


def test_a_name_is_one_token(byte_level):
  tokens = list(byte_level["tokenizer.ggml.tokens"])
  # Rows that fill up may have one name.
  tokens[-1] = tokens[-2] = "unused"
  keys = byte_level | {"tokenizer.ggml.tokens": tokens}
  assert tokenizer.read(keys, VOCAB, "test").vocab_size == VOCAB - 1
  tokens[9] = tokens[8]
  with pytest.raises(errors.InputError, match=r"is tokenizer.ggml.tokens\[8\] and"):
    tokenizer.read(keys | {"tokenizer.ggml.tokens": tokens}, VOCAB, "test")
