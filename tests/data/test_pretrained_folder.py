"""The tokenizer of a model folder, from its files alone."""

import json
import pickle

import pytest

from effjax.core import errors
from effjax.data import tokenizers
from tests.data import families

_MODELS = {
  # SmolLM2: a bos token that prompts do without.
  "byte_level": {
    "tokenizer_config.json": {
      "bos_token": "<|im_start|>",
      "eos_token": {"__type": "AddedToken", "content": "<|im_end|>"},
      "pad_token": "<|im_end|>",
      "chat_template": "chatml",
      "add_bos_token": True,  # The post-processor in tokenizer.json says otherwise.
    },
    "generation_config.json": {"eos_token_id": [2, 0]},
  },
  # Llama 2: the second file counts where the first is silent.
  "sentencepiece_bpe": {
    "tokenizer_config.json": {"eos_token": "</s>", "pad_token": None},
    "special_tokens_map.json": {"bos_token": {"content": "<s>"}, "pad_token": "<unk>"},
    "config.json": {"eos_token_id": 2, "bos_token_id": 7},
  },
  # BERT: neither bos nor eos.
  "word_piece": {
    "tokenizer_config.json": {
      "cls_token": "[CLS]",
      "sep_token": "[SEP]",
      "pad_token": "[PAD]",
    }
  },
  # Ids alone.
  "unigram": {"config.json": {"bos_token_id": 2, "eos_token_id": 3, "pad_token_id": 0}},
}
_EXPECTED = {
  "byte_level": (1, (2, 0), 2, False, "chatml"),
  "sentencepiece_bpe": (1, (2,), 0, True, None),
  "word_piece": (2, (3,), 0, True, None),
  "unigram": (2, (3,), 0, True, None),
}


def _write(folder, family, files=None):
  source, _ = families.FAMILIES[family]
  (folder / "tokenizer.json").write_text(source(), encoding="utf-8")
  for name, value in (_MODELS[family] if files is None else files).items():
    text = value if isinstance(value, str) else json.dumps(value)
    (folder / name).write_text(text, encoding="utf-8")
  return folder


@pytest.mark.parametrize("family", families.FAMILIES)
def test_facts(family, tmp_path):
  made = tokenizers.from_hf_folder(_write(tmp_path, family))
  found = (made.bos_id, made.eos_ids, made.pad_id, made.add_bos, made.chat_template)
  assert found == _EXPECTED[family]


@pytest.mark.oracle
@pytest.mark.parametrize("family", ["byte_level", "sentencepiece_bpe", "word_piece"])
def test_equals_transformers(family, tmp_path):
  transformers = pytest.importorskip("transformers")
  files = _MODELS[family]
  settings = files["tokenizer_config.json"] | {
    "tokenizer_class": "PreTrainedTokenizerFast"
  }
  files = files | {"tokenizer_config.json": settings}
  _write(tmp_path, family, files)
  oracle = transformers.PreTrainedTokenizerFast.from_pretrained(str(tmp_path))
  made = tokenizers.from_hf_folder(tmp_path)
  assert made.bos_id in (oracle.bos_token_id, oracle.cls_token_id)
  assert made.eos_ids[0] in (oracle.eos_token_id, oracle.sep_token_id)
  assert made.pad_id == oracle.pad_token_id
  assert made.chat_template == oracle.chat_template
  ids = oracle(families.CORPUS[0])["input_ids"]
  begin = [made.bos_id] if made.add_bos else []
  expected = [*begin, *made.encode(families.CORPUS[0])]
  assert ids[: len(expected)] == expected
  assert ids[len(expected) :] in ([], list(made.eos_ids))


def test_the_template_file_counts_first(tmp_path):
  files = {"tokenizer_config.json": {"chat_template": "old"}}
  _write(tmp_path, "byte_level", files | {"chat_template.jinja": "né\n"})
  assert tokenizers.from_hf_folder(tmp_path).chat_template == "né\n"


def test_of_several_templates_the_default_counts(tmp_path):
  named = [{"name": n, "template": f"for {n}"} for n in ("tool_use", "default")]
  files = {"tokenizer_config.json": {"chat_template": named}}
  _write(tmp_path, "byte_level", files)
  assert tokenizers.from_hf_folder(tmp_path).chat_template == "for default"


def test_add_bos_counts_where_no_post_processor_is(tmp_path):
  for asked in (True, False):
    settings = {"bos_token": "<|im_start|>", "add_bos_token": asked}
    _write(tmp_path, "byte_level", {"tokenizer_config.json": settings})
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    content["post_processor"] = None
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    assert tokenizers.from_hf_folder(tmp_path).add_bos is asked


def test_nothing_else_in_the_folder_is_read(tmp_path):
  _write(tmp_path, "byte_level")
  (tmp_path / "tokenizer.model").write_bytes(pickle.dumps("never opened"))
  (tmp_path / "tokenization.py").write_text("raise SystemExit")
  (tmp_path / "added_tokens.json").write_text("{")
  assert tokenizers.from_hf_folder(tmp_path).vocab_size == 402


@pytest.mark.parametrize(
  ("files", "message"),
  [
    ({"tokenizer.json": None}, "has no tokenizer.json.*AutoTokenizer"),
    ({"tokenizer.json": "{"}, "tokenizer.json is not JSON"),
    ({"tokenizer.json": "[]"}, "does not hold a JSON object"),
    ({"tokenizer.json": "{}"}, "has no model.vocab"),
    ({"tokenizer_config.json": "é"}, "tokenizer_config.json is not JSON"),
    ({"tokenizer_config.json": b"\xff"}, "tokenizer_config.json is not UTF-8"),
    ({"tokenizer_config.json": {"bos_token": 3}}, "bos_token must be a token's name"),
    ({"tokenizer_config.json": {"eos_token": "<e>"}}, "'<e>', which is not in the voc"),
    ({"tokenizer_config.json": {"chat_template": 3}}, "chat_template must be text"),
    ({"generation_config.json": {"eos_token_id": [0, 402]}}, "is 402, the tokenizer"),
    ({"config.json": {"bos_token_id": "x"}}, "bos_id must be int"),
  ],
)
def test_broken_folders(tmp_path, files, message):
  _write(tmp_path, "byte_level", {})
  for name, value in files.items():
    if value is None:
      (tmp_path / name).unlink()
    elif isinstance(value, bytes):
      (tmp_path / name).write_bytes(value)
    else:
      text = value if isinstance(value, str) else json.dumps(value)
      (tmp_path / name).write_text(text, encoding="utf-8")
  with pytest.raises(errors.InputError, match=message) as found:
    tokenizers.from_hf_folder(tmp_path)
  assert str(tmp_path) in str(found.value)
  assert "\n" not in str(found.value)


def test_no_folder(tmp_path):
  with pytest.raises(errors.InputError, match="not a folder"):
    tokenizers.from_hf_folder(tmp_path / "nothing")
