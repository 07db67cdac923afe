"""A tokenizer as keys of a GGUF file: the inverse of `tokenizer.read`.

llama.cpp knows the ways to cut text by name only, and SentencePiece by scores. Whether
it would encode as ours does is tried: the keys are read again, and both encode the same
odd texts. What does not agree is left out ("none"), and a note says so: a file without
a tokenizer serves a program that has one; one with the wrong tokenizer is a trap.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from effjax.core import errors
from effjax.data import pretrained_tokenizer, symbols, tokenizers
from effjax.interop.gguf import pre_tokenizers
from effjax.interop.gguf import tokenizer as gguf_tokenizer
from effjax.interop.gguf.tokenizer import PREFIX
from effjax.interop.gguf.values import Value

_NONE = {gguf_tokenizer.MODEL: "none"}
# Places where tokenizers differ: case, digits, spaces, line ends, code, scripts.
CHECKED = (
  "Hello, world! It's 12345 o'clock; we'll GO, THEY'RE late.",
  "  two  spaces   and\ttabs \t and a space at the end ",
  "def f(x_1, *args):\n\treturn self.value ** 2  # 0x1F\n\n\n    if a<=b: c += 1\r\n",
  "na\u00efve caf\u00e9 \u2014 \u201cquoted\u201d \u2026 10% of 1,234.56 $ or \u20ac",
  "\u0441\u043b\u043e\u0432\u043e \u65e5\u672c\u8a9e \ud55c\uad6d\uc5b4 \u0627\u0644",
  "x\u00b2 \u00bd \u2167 \u0661\u0662\u0663 \U0001f642\U0001f468\u200d\U0001f467",
  'http://a.b/c?d=e&f={g}[h]|i~j^k`l\' \\n "m"\n \n  \n',
  "\u00a0no-break \u3000ideographic\u2028line",
)


def write(tokenizer: Any, vocab_size: int) -> tuple[dict[str, Any], list[str]]:
  """The keys, and notes on what they cannot say.

  Args:
    tokenizer: of any kind that effjax has, or None.
    vocab_size: rows of the model's embedding; unused tokens fill up to it.

  Raises:
    InputError: more tokens than rows.
  """
  if tokenizer is None:
    return dict(_NONE), []
  if tokenizer.vocab_size > vocab_size:
    raise errors.InputError(
      f"the tokenizer has {tokenizer.vocab_size} ids, the model embeds {vocab_size}"
    )
  template = {}
  if tokenizer.chat_template:
    template[gguf_tokenizer.TEMPLATE] = tokenizer.chat_template
  content = None
  if not isinstance(tokenizer, symbols.Symbols):
    content = json.loads(tokenizer.to_json())
    content = content.get("tokenizer", content)
  reason = "llama.cpp has no such kind of tokenizer"
  if content is not None and content["model"].get("type", "BPE") == "BPE":
    reason = "no way to cut text that llama.cpp knows gives the same ids"
    for keys in _candidates(tokenizer, content):
      keys |= _tokens(tokenizer, content, vocab_size) | _facts(tokenizer) | template
      if _agrees(tokenizer, keys, vocab_size):
        return keys, _notes(content)
  note = f"no tokenizer is in the file: {reason}; give token ids to whatever runs it"
  return _NONE | template, [note]


def _candidates(tokenizer: Any, content: Mapping[str, Any]) -> list[dict[str, Any]]:
  """What the tokenizer may be to llama.cpp, apart from its tokens."""
  model = content["model"]
  merges = [m if isinstance(m, str) else " ".join(m) for m in model.get("merges", ())]
  if _is_byte_level(content.get("decoder")):
    named = pre_tokenizers.name_of(
      content.get("pre_tokenizer"), bool(model.get("ignore_merges"))
    )
    # Where nothing is merged every cut is the same.
    names = [named] if named else [] if merges else [pre_tokenizers.DEFAULT]
    common = {
      gguf_tokenizer.MODEL: "gpt2",
      f"{PREFIX}merges": Value("string[]", merges),
    }
    return [common | {f"{PREFIX}pre": name} for name in names]
  if not model.get("byte_fallback"):
    return []
  rank: dict[str, int] = {}
  for index, merge in enumerate(merges):
    rank.setdefault(merge.replace(" ", "", 1), index)
  names = [tokenizer.name(index) for index in range(tokenizer.vocab_size)]
  # Single characters are not merged from anything: they come after all that are.
  scores = [-float(rank.get(name, len(merges))) for name in names]
  return [
    {
      gguf_tokenizer.MODEL: "llama",
      f"{PREFIX}add_space_prefix": prefix,
      f"{PREFIX}scores": scores,
    }
    for prefix in (True, False)
  ]


def _tokens(
  tokenizer: Any, content: Mapping[str, Any], vocab_size: int
) -> dict[str, Any]:
  """Names and types of all tokens, and scores for those that fill up."""
  known = {i: n for n, i in pretrained_tokenizer.vocabulary(content).items()}
  added = {token["id"]: token for token in content.get("added_tokens") or ()}
  facts = {tokenizer.bos_id, tokenizer.pad_id, *tokenizer.eos_ids}
  own = isinstance(tokenizer, tokenizers.Tokenizer)
  unknown = content["model"].get("unk_token")
  names, types = [], []
  for index in range(vocab_size):
    name = known.get(index, gguf_tokenizer.FILLING.format(index))
    if index not in known or (own and name.startswith("<|unused ")):
      kind = gguf_tokenizer.UNUSED
    elif name == unknown:
      kind = gguf_tokenizer.UNKNOWN
    elif index in added:
      special = added[index].get("special")
      kind = gguf_tokenizer.CONTROL if special else gguf_tokenizer.USER_DEFINED
    elif index in facts and len(name) > 1:
      kind = gguf_tokenizer.CONTROL
    elif content["model"].get("byte_fallback") and _is_byte(name):
      kind = gguf_tokenizer.BYTE
    else:
      kind = gguf_tokenizer.NORMAL
    names.append(name)
    types.append(kind)
  return {
    f"{PREFIX}tokens": Value("string[]", names),
    f"{PREFIX}token_type": Value("int32[]", np.array(types, np.int32)),
  }


def _facts(tokenizer: Any) -> dict[str, Any]:
  ids = {
    "bos": tokenizer.bos_id,
    "eos": next(iter(tokenizer.eos_ids), None),
    "padding": tokenizer.pad_id,
  }
  # llama.cpp knows the usual ones by their names, and has keys for two more.
  named = gguf_tokenizer.ENDS
  more = [i for i in tokenizer.eos_ids[1:] if tokenizer.name(i) not in named]
  ids |= dict(zip(("eot", "eom"), more, strict=False))
  found = {f"{PREFIX}{n}_token_id": i for n, i in ids.items() if i is not None}
  return found | {f"{PREFIX}add_bos_token": bool(tokenizer.add_bos)}


def _agrees(tokenizer: Any, keys: dict[str, Any], vocab_size: int) -> bool:
  """Whether what is read from keys encodes as the tokenizer; fills up the scores."""
  scores = keys.get(f"{PREFIX}scores")
  if scores is not None:
    scores = np.array([*scores, *[0.0] * (vocab_size - len(scores))], np.float32)
    keys[f"{PREFIX}scores"] = Value("float32[]", scores)
  plain = {k: v.plain if isinstance(v, Value) else v for k, v in keys.items()}
  again = gguf_tokenizer.read(plain, vocab_size, "the exported keys")
  return all(tokenizer.encode(text) == again.encode(text) for text in CHECKED)


def _notes(content: Mapping[str, Any]) -> list[str]:
  if _is_byte_level(content.get("decoder")) and content.get("normalizer"):
    kind = content["normalizer"].get("type")
    return [f"llama.cpp does not normalize text ({kind}) before it encodes it"]
  return []


def _is_byte_level(decoder: Any) -> bool:
  steps: Sequence[Any] = [decoder]
  if isinstance(decoder, Mapping) and decoder.get("type") == "Sequence":
    steps = decoder.get("decoders", ())
  return any(isinstance(s, Mapping) and s.get("type") == "ByteLevel" for s in steps)


def _is_byte(name: str) -> bool:
  return len(name) == 6 and name.startswith("<0x") and name.endswith(">")
