"""The tokenizer in a GGUF file, as the `Pretrained` tokenizer here.

    tokenizer.ggml.model   what it is
    "gpt2"                 byte-level byte-pair encoding: tokens, merges, and in
                           `tokenizer.ggml.pre` how text is cut
    "llama"                SentencePiece's byte-pair encoding: tokens and scores; the
                           pair whose token has the highest score is merged first
    "none" (or no key)     no tokenizer

Source: llama-vocab.cpp. Deviation: a token for filling in the middle does not end a
text.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from effjax.core import errors
from effjax.data import pretrained_tokenizer
from effjax.interop.fields import Fields
from effjax.interop.gguf import pre_tokenizers

PREFIX = "tokenizer.ggml."
MODEL, TEMPLATE = f"{PREFIX}model", "tokenizer.chat_template"
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
SPACE = "\u2581"
# What converters call a row that no token has.
FILLING = "[PAD{}]"
# Control tokens of these names end a text, whether a key says so or not.
ENDS = frozenset(
  {
    "<|endoftext|>",
    "<|im_end|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<|end|>",
    "<|return|>",
    "<end_of_turn>",
    "<end_of_utterance>",
    "<EOT>",
    "<\uff5cend\u2581of\u2581sentence\uff5c>",
  }
)
_KINDS = ("gpt2", "llama", "none")


def read(
  metadata: Mapping[str, Any], vocab_size: int, where: str
) -> pretrained_tokenizer.Pretrained | None:
  """The tokenizer that the keys of a file describe.

  Args:
    metadata: key to plain value.
    vocab_size: rows of the model's embedding.
    where: the file, for messages.

  Returns:
    None if the file has no tokenizer.

  Raises:
    InputError: a kind of tokenizer or a way to cut text that is not read, keys that
      are missing or do not fit together, or more tokens than the model embeds.
  """
  fields = Fields(metadata, where)
  kind = fields.get(MODEL, str, "none")
  if kind not in _KINDS:
    raise errors.unknown(f"{MODEL} in {where}", kind, _KINDS)
  if kind == "none":
    return None
  tokens = _strings(fields, "tokens")
  if len(tokens) > vocab_size:
    raise errors.InputError(
      f"{where}: the tokenizer has {len(tokens)} tokens, the model embeds {vocab_size}"
    )
  types = _per_token(metadata, "token_type", len(tokens), where)
  types = [NORMAL] * len(tokens) if types is None else types
  vocab = _vocab(tokens, types, where)
  build = _byte_level if kind == "gpt2" else _sentence_piece
  content, add_bos = build(fields, tokens, types, vocab)
  content |= {
    "version": "1.0",
    "truncation": None,
    "padding": None,
    "post_processor": None,
    "added_tokens": _added(tokens, types, vocab),
  }
  defaults = {} if kind == "gpt2" else {"bos": 1, "eos": 2}
  ids = {
    name: _id(fields, name, len(tokens), defaults.get(name))
    for name in ("bos", "eos", "padding", "eot", "eom")
  }
  named = [i for i, name in enumerate(tokens) if name in ENDS and types[i] == CONTROL]
  ends = [ids["eos"], ids["eot"], ids["eom"], *named]
  try:
    return pretrained_tokenizer.Pretrained(
      content,
      bos_id=ids["bos"],
      eos_ids=[index for index in ends if index is not None],
      pad_id=ids["padding"],
      add_bos=fields.get(f"{PREFIX}add_bos_token", bool, add_bos)
      and ids["bos"] is not None,
      chat_template=fields.get(TEMPLATE, str, None),
    )
  except errors.InputError as error:
    raise errors.InputError(f"{where}: {error}") from None


def _byte_level(
  fields: Fields, tokens: Sequence[str], types: Sequence[int], vocab: Mapping[str, int]
) -> tuple[dict[str, Any], bool]:
  """Parts of a tokenizer file, and whether prompts begin with bos by default."""
  del tokens, types
  name = fields.get(f"{PREFIX}pre", str, pre_tokenizers.DEFAULT)
  cuts = pre_tokenizers.find(name, fields.where)
  # A token is at least one character, which may be a space.
  merges = [
    (merge[:at], merge[at + 1 :])
    for merge in _strings(fields, "merges")
    if (at := merge.find(" ", 1)) > 0
  ]
  content = {
    "normalizer": None,
    "pre_tokenizer": pre_tokenizers.to_json(cuts),
    "decoder": {
      "type": "ByteLevel",
      "add_prefix_space": False,
      "trim_offsets": True,
      "use_regex": True,
    },
    "model": _bpe(vocab, merges) | {"ignore_merges": cuts.ignore_merges},
  }
  return content, cuts.add_bos


def _sentence_piece(
  fields: Fields, tokens: Sequence[str], types: Sequence[int], vocab: Mapping[str, int]
) -> tuple[dict[str, Any], bool]:
  """Parts of a tokenizer file, and whether prompts begin with bos by default."""
  scores = _per_token(fields.values, "scores", len(tokens), fields.where)
  if scores is None:
    raise errors.InputError(f"{fields.where} has no {PREFIX}scores")
  mergeable = {
    name: index
    for name, index in vocab.items()
    if types[index] in (NORMAL, UNUSED) and len(name) > 1
  }
  merges = [
    (name[:at], name[at:])
    for name in sorted(mergeable, key=lambda n: (-scores[vocab[n]], vocab[n]))
    for at in range(1, len(name))
    if name[:at] in vocab and name[at:] in vocab
  ]
  prefix = fields.get(f"{PREFIX}add_space_prefix", bool, True)
  begin = [{"type": "Prepend", "prepend": SPACE}] if prefix else []
  replace = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
  back = {"type": "Replace", "pattern": {"String": SPACE}, "content": " "}
  strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prefix else []
  bytes_first = [back, {"type": "ByteFallback"}, {"type": "Fuse"}]
  unknown = next((n for n, index in vocab.items() if types[index] == UNKNOWN), None)
  content = {
    "normalizer": {"type": "Sequence", "normalizers": [*begin, replace]},
    "pre_tokenizer": None,
    "decoder": {"type": "Sequence", "decoders": [*bytes_first, *strip]},
    "model": _bpe(vocab, merges)
    | {"unk_token": unknown, "fuse_unk": True, "byte_fallback": True},
  }
  return content, True


def _bpe(vocab: Mapping[str, int], merges: Sequence[tuple[str, str]]) -> dict[str, Any]:
  """The `model` of a Hugging Face tokenizer file."""
  return {
    "type": "BPE",
    "dropout": None,
    "unk_token": None,
    "continuing_subword_prefix": None,
    "end_of_word_suffix": None,
    "fuse_unk": False,
    "byte_fallback": False,
    "ignore_merges": False,
    "vocab": dict(vocab),
    "merges": [list(merge) for merge in merges],
  }


def _vocab(tokens: Sequence[str], types: Sequence[int], where: str) -> dict[str, int]:
  """Token to id, without what only fills up rows of the embedding."""
  vocab: dict[str, int] = {}
  for index, name in enumerate(tokens):
    if types[index] == UNUSED and name == FILLING.format(index):
      continue
    if name not in vocab:
      vocab[name] = index
    elif types[index] != UNUSED:
      raise errors.InputError(
        f"{where}: the token {name!r} is {PREFIX}tokens[{vocab[name]}] and [{index}]"
      )
  return vocab


def _added(
  tokens: Sequence[str], types: Sequence[int], vocab: Mapping[str, int]
) -> list[dict[str, Any]]:
  """Tokens that are found in a text before it is cut, or that no text spells."""
  return [
    {
      "id": index,
      "content": name,
      "single_word": False,
      "lstrip": False,
      "rstrip": False,
      "normalized": False,
      "special": types[index] != USER_DEFINED,
    }
    for index, name in enumerate(tokens)
    if types[index] in (CONTROL, USER_DEFINED, UNKNOWN) and vocab[name] == index
  ]


def _strings(fields: Fields, name: str) -> list[str]:
  """A list of strings."""
  found = fields.values.get(f"{PREFIX}{name}")
  if not isinstance(found, list) or not all(isinstance(text, str) for text in found):
    what = "has no" if found is None else "does not have strings in"
    raise errors.InputError(f"{fields.where} {what} {PREFIX}{name}")
  return found


def _per_token(
  metadata: Mapping[str, Any], name: str, count: int, where: str
) -> list[Any] | None:
  """A list of numbers, one a token; None if there is none."""
  found = metadata.get(f"{PREFIX}{name}")
  if found is None:
    return None
  values = found.tolist() if hasattr(found, "tolist") else found
  if not isinstance(values, list) or len(values) != count:
    raise errors.InputError(
      f"{where}: {PREFIX}{name} must have one number for each of the {count} tokens"
    )
  return values


def _id(fields: Fields, name: str, count: int, default: int | None) -> int | None:
  """The id of a special token, or None; GGUF has "no such token" as a large number."""
  found = fields.get(f"{PREFIX}{name}_token_id", int, default)
  return found if found is not None and 0 <= found < count else None
