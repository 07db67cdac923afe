"""A tokenizer as the files that `transformers.AutoTokenizer` reads."""

import json
from typing import Any

from effjax.data import pretrained_tokenizer, symbols, tokenizers


def files(tokenizer: Any) -> dict[str, str]:
  """Content by file name; nothing for no tokenizer, or one of symbols.

  Args:
    tokenizer: any tokenizer here, or None.
  """
  if tokenizer is None or isinstance(tokenizer, symbols.Symbols):
    return {}
  content = json.loads(tokenizer.to_json())
  if isinstance(tokenizer, pretrained_tokenizer.Pretrained):
    content = content["tokenizer"]
  else:
    content |= _start(tokenizer.bos_id)
  roles = {
    "bos_token": tokenizer.bos_id,
    "eos_token": next(iter(tokenizer.eos_ids), None),
    "pad_token": tokenizer.pad_id,
  }
  settings = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "clean_up_tokenization_spaces": False,
    **{k: tokenizer.name(v) for k, v in roles.items() if v is not None},
  }
  found = {"tokenizer.json": _text(content), "tokenizer_config.json": _text(settings)}
  if tokenizer.chat_template is not None:
    found["chat_template.jinja"] = tokenizer.chat_template
  return found | {"generation_config.json": _text(special_ids(tokenizer))}


def special_ids(tokenizer: Any) -> dict[str, Any]:
  """Fields of config.json that say where a text begins and ends."""
  if tokenizer is None:
    return {}
  ends = list(tokenizer.eos_ids)
  return {
    "bos_token_id": tokenizer.bos_id,
    "eos_token_id": ends[0] if len(ends) == 1 else ends or None,
    "pad_token_id": tokenizer.pad_id,
  }


def _start(bos_id: int) -> dict[str, Any]:
  """What our own tokenizers do to a text: `BOS` in front, and no text spells it."""
  name = tokenizers.BOS
  token = {"id": bos_id, "content": name, "special": True, "normalized": False}
  token |= {"single_word": False, "lstrip": False, "rstrip": False}
  special = {"id": name, "ids": [bos_id], "tokens": [name]}
  one = [
    {"SpecialToken": {"id": name, "type_id": 0}},
    {"Sequence": {"id": "A", "type_id": 0}},
  ]
  return {
    "added_tokens": [token],
    "post_processor": {
      "type": "TemplateProcessing",
      "single": one,
      "pair": [*one, {"Sequence": {"id": "B", "type_id": 1}}],
      "special_tokens": {name: special},
    },
  }


def _text(value: Any) -> str:
  return json.dumps(value, indent=2, ensure_ascii=False) + "\n"
