"""A tokenizer that came with a pretrained model: any Hugging Face `tokenizer.json`.

The `tokenizers` library encodes. Deviations from its defaults: truncation, padding and
BPE dropout that a file may fix are off, no special token is added, and text cannot
spell one. The library itself would let it: a Unigram vocabulary holds "</s>" as a piece
like any other, and merges can reach it. So plain text is encoded by a copy in which
special tokens have names that text does not contain, as SentencePiece keeps its control
symbols apart.
"""

import functools
import json
import pathlib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import tokenizers as hf

from effjax.core import config, errors
from effjax.data import token_bytes

FORMAT = "huggingface"
_FACTS = ("bos_id", "eos_ids", "pad_id", "add_bos", "chat_template")
# Noncharacters around a number: nobody writes that.
_UNSPELLABLE = "\ufdd0special {}\ufdd1"
_UNUSED = "<|unused {}|>"
# Names of special tokens in vocabularies that do not mark them; byte tokens are none.
_MARKUP = re.compile(r"(?!<0x[0-9A-Fa-f]{2}>)<.+>|\[.+\]", re.DOTALL)
# No vocabulary is near that large; a table has a row for each id.
_MAX_ID = 2**24
# Not in any vocabulary: stands for the text when special tokens are put around it.
_TEXT_ID = 2**32 - 1
# The library's errors have no class of their own.
_LIBRARY_ERROR = Exception


class Pretrained:
  """Text to ids and back, as the model's authors did.

  Attributes:
    vocab_size: number of ids; the model may have more rows than that.
    bos_id: the id that begins a text, or None.
    eos_ids: ids that end a text, the tokenizer's own first.
    pad_id: the id that fills rows, or None.
    add_bos: whether a prompt begins with `bos_id`.
    start_id: the id before the first token of a document that is scored, so that all
      of its tokens are predicted: `bos_id` if there is one (even if prompts do without
      it), else the first of `eos_ids`, else `pad_id`, as lm-eval does; None if there
      is none of them.
    chat_template: Jinja source that writes messages as text, or None.
    prefix_ids, suffix_ids: what the file puts around a text, such as [CLS] and [SEP];
      an encoder reads them too.
  """

  def __init__(
    self,
    tokenizer: Mapping[str, Any],
    *,
    bos_id: int | None = None,
    eos_ids: Sequence[int] = (),
    pad_id: int | None = None,
    add_bos: bool | None = None,
    chat_template: str | None = None,
  ):
    """Wraps the content of a `tokenizer.json`.

    Args:
      tokenizer: the file's JSON object; not changed.
      bos_id, eos_ids, pad_id, chat_template: see the attributes.
      add_bos: None for what the file's post-processor does.

    Raises:
      InputError: not such a file, or the ids are not in its vocabulary.
    """
    tokens = vocabulary(tokenizer)
    self.vocab_size: int = 1 + max(tokens.values())
    self.bos_id, self.pad_id = bos_id, pad_id
    self.eos_ids = tuple(dict.fromkeys(eos_ids))
    facts = {"bos_id": bos_id, "pad_id": pad_id}
    facts |= {f"eos_ids[{i}]": index for i, index in enumerate(self.eos_ids)}
    for what, index in facts.items():
      config.require(
        index is None or 0 <= index < self.vocab_size,
        f"{what} is {index}, the tokenizer has ids from 0 to {self.vocab_size - 1}",
      )
    self.prefix_ids, self.suffix_ids = _added_around(tokenizer)
    if add_bos is None:
      add_bos = bos_id is not None and self.prefix_ids[:1] == (bos_id,)
    config.require(
      not add_bos or bos_id is not None, "add_bos is true, but there is no bos_id"
    )
    self.add_bos = add_bos
    candidates = (bos_id, *self.eos_ids, pad_id)
    self.start_id = next((i for i in candidates if i is not None), None)
    self.chat_template = chat_template
    self._content = json.dumps(tokenizer, ensure_ascii=False)
    self._names: list[str | None] = [None] * self.vocab_size
    for name, index in tokens.items():
      self._names[index] = name
    self._added = {token["id"] for token in tokenizer.get("added_tokens") or ()}
    self._special = self._special_ids(tokenizer, facts.values())
    self._plain = _backend(_renamed(tokenizer, self._name_of_special()))
    self._check_ids(tokens)
    self._spelling = token_bytes.Spelling(tokenizer.get("decoder"))
    self._bytes_of = [self._read(index) for index in range(self.vocab_size)]

  def encode(self, text: str, *, special: bool = False) -> list[int]:
    """The ids of a text; none is added.

    Args:
      text: any text. It is encoded in one piece: what a tokenizer puts before a text
        must not come up in its middle.
      special: whether text that spells a special token becomes that token; for
        prompts that a chat template wrote.
    """
    backend = self._whole if special else self._plain
    return backend.encode_batch_fast([text], add_special_tokens=False)[0].ids

  def encode_documents(self, texts: Sequence[str]) -> list[np.ndarray]:
    """The ids of each text after `start_id`, as uint32, on all cores.

    Raises:
      InputError: the tokenizer has no id that could be the start.
    """
    config.require(
      self.start_id is not None,
      "this tokenizer has no bos, eos or pad token, so nothing a document could start "
      "with; set bos_id in the run's tokenizer.json",
    )
    encoded = self._plain.encode_batch_fast(list(texts), add_special_tokens=False)
    return [np.array([self.start_id, *found.ids], np.uint32) for found in encoded]

  def decode_bytes(self, ids: Iterable[int]) -> bytes:
    """The bytes of some ids within a text; special and unused ids have none.

    A token that begins a word begins with its space, even the first. (WordPiece does
    not hold spaces: every word has one before it.)

    Raises:
      InputError: an id outside the vocabulary.
    """
    return b"".join(self._bytes_of[self._checked(index)] for index in ids)

  def decode(self, ids: Iterable[int]) -> str:
    """The text that some ids are; bytes that form no character become U+FFFD.

    A space that the tokenizer puts before every text is taken away again.

    Raises:
      InputError: an id outside the vocabulary.
    """
    seen = [self._checked(index) for index in ids]
    seen = [i for i in seen if i not in self._special and self._names[i] is not None]
    if not seen:
      return ""
    found = self._read(seen[0], first=True) + self.decode_bytes(seen[1:])
    text = found.decode("utf-8", errors="replace")
    spaces = len(text) - len(text.lstrip(" "))
    return text[min(spaces, self._spelling.strip) :]

  def name(self, index: int) -> str:
    """How the vocabulary writes an id, such as "<|im_end|>".

    Raises:
      InputError: an id outside the vocabulary.
    """
    name = self._names[self._checked(index)]
    return _UNUSED.format(index) if name is None else name

  def save(self, path: str | pathlib.Path) -> None:
    """Writes JSON that `tokenizers.load` reads."""
    pathlib.Path(path).write_text(self.to_json(), encoding="utf-8")

  def to_json(self) -> str:
    """The content of a saved file: Hugging Face's own, as it came, and the facts."""
    facts = {name: getattr(self, name) for name in _FACTS}
    head = json.dumps({"format": FORMAT} | facts, ensure_ascii=False)
    return f'{head[:-1]}, "tokenizer": {self._content}}}'

  @functools.cached_property
  def _whole(self) -> hf.Tokenizer:
    """The tokenizer as it is, for text in which special tokens count."""
    backend = _backend(json.loads(self._content))
    missing = sorted(self._special - self._added)
    backend.add_special_tokens([self._names[i] for i in missing])
    return backend

  def _name_of_special(self) -> dict[str, int]:
    return {self._names[index]: index for index in self._special}

  def _special_ids(
    self, tokenizer: Mapping[str, Any], facts: Iterable[int | None]
  ) -> frozenset[int]:
    """What text cannot spell: tokens marked so, and facts that look like it.

    One character is ordinary text, whatever it is used for beside that.
    """
    found = {
      token["id"]
      for token in tokenizer.get("added_tokens") or ()
      if token.get("special")
    }
    for index in facts:
      name = None if index is None else self._names[index]
      if name and (index in self._added or _MARKUP.fullmatch(name)):
        found.add(index)
    return frozenset(i for i in found if len(self._names[i]) > 1)

  def _read(self, index: int, first: bool = False) -> bytes:
    name = self._names[index]
    if name is None or index in self._special:
      return b""
    return self._spelling.read(name, added=index in self._added, first=first)

  def _checked(self, index: int) -> int:
    if not 0 <= index < self.vocab_size:
      raise errors.InputError(
        f"token id {int(index)} is not in the vocabulary (0 to {self.vocab_size - 1})"
      )
    return index

  def _check_ids(self, tokens: Mapping[str, int]) -> None:
    """That the library gives added tokens the ids that the file says."""
    renamed = {n: _UNSPELLABLE.format(i) for n, i in self._name_of_special().items()}
    for index in self._added:
      name = self._names[index]
      found = self._plain.token_to_id(renamed.get(name, name))
      config.require(
        found == tokens[name] == index,
        f"the added token {name!r} says it is id {index}, but its place is {found}; "
        "the tokenizer file does not fit together",
      )


def from_content(content: Mapping[str, Any]) -> Pretrained:
  """What `Pretrained.save` wrote.

  Args:
    content: the file's JSON object.

  Raises:
    InputError: a field is missing, unknown, mistyped or does not fit the vocabulary.
  """
  allowed = ("format", "tokenizer", *_FACTS)
  unknown = next((name for name in content if name not in allowed), None)
  if unknown is not None:
    raise errors.unknown("field", unknown, allowed)
  facts = {name: content[name] for name in _FACTS if name in content}
  eos_ids = facts.get("eos_ids", [])
  config.require(
    isinstance(eos_ids, list), f"eos_ids must be a list of ids, got {eos_ids!r}"
  )
  for i, index in enumerate(eos_ids):
    _require_kind(f"eos_ids[{i}]", index, int)
  kinds = {"bos_id": int, "pad_id": int, "add_bos": bool, "chat_template": str}
  for name, kind in kinds.items():
    if facts.get(name) is not None:
      _require_kind(name, facts[name], kind)
  vocabulary(content.get("tokenizer"))
  return Pretrained(content["tokenizer"], **facts)


def _require_kind(name: str, value: Any, kind: type) -> None:
  right = isinstance(value, kind) and (kind is bool or not isinstance(value, bool))
  config.require(right, f"{name} must be {kind.__name__}, got {str(value)[:40]!r}")


def vocabulary(tokenizer: Any) -> dict[str, int]:
  """Every token of a `tokenizer.json`, added ones too, and its id.

  Raises:
    InputError: not the content of such a file.
  """
  wrong = "is not the content of a Hugging Face tokenizer.json: {}"
  model = tokenizer.get("model") if isinstance(tokenizer, Mapping) else None
  vocab = model.get("vocab") if isinstance(model, Mapping) else None
  if isinstance(vocab, list):  # Unigram: pieces and their scores.
    pieces = [
      piece[0] if isinstance(piece, list) and piece else None for piece in vocab
    ]
    vocab = {name: index for index, name in enumerate(pieces)}
  config.require(
    isinstance(vocab, Mapping) and bool(vocab), wrong.format("it has no model.vocab")
  )
  added = tokenizer.get("added_tokens") or []
  config.require(
    isinstance(added, list) and all(isinstance(token, Mapping) for token in added),
    wrong.format("added_tokens is not a list of objects"),
  )
  tokens = dict(vocab)
  tokens |= {token.get("content"): token.get("id") for token in added}
  for name, index in tokens.items():
    # The type is exactly that: JSON's true is no id.
    if not (isinstance(name, str) and type(index) is int and 0 <= index < _MAX_ID):
      raise errors.InputError(wrong.format(f"token {name!r} has id {index!r}"))
  return tokens


def _renamed(
  tokenizer: Mapping[str, Any], special: Mapping[str, int]
) -> dict[str, Any]:
  """The same tokenizer, its special tokens under names that text does not contain."""
  names = {name: _UNSPELLABLE.format(index) for name, index in special.items()}
  model = dict(tokenizer["model"])
  if isinstance(model["vocab"], list):
    model["vocab"] = [[names.get(p, p), *rest] for p, *rest in model["vocab"]]
  else:
    model["vocab"] = {names.get(n, n): index for n, index in model["vocab"].items()}
  if isinstance(model.get("merges"), list):
    model["merges"] = [m for m in model["merges"] if not _makes(m, names)]
  if model.get("unk_token") in names:
    model["unk_token"] = names[model["unk_token"]]
  added = [
    token | {"content": names.get(token["content"], token["content"])}
    for token in tokenizer.get("added_tokens") or ()
  ]
  # What it puts around a text names tokens too, and nothing is put around one here.
  changes = {"model": model, "added_tokens": added, "post_processor": None}
  return dict(tokenizer) | changes


def _makes(merge: Any, names: Mapping[str, str]) -> bool:
  """Whether a merge takes or makes one of some tokens."""
  left, right = merge.split(" ") if isinstance(merge, str) else merge
  return left + right in names or left in names or right in names


def _backend(tokenizer: Mapping[str, Any]) -> hf.Tokenizer:
  """The library's tokenizer, without what makes ids depend on length or chance."""
  model = dict(tokenizer["model"])
  if "dropout" in model:
    model["dropout"] = None
  changes = {"truncation": None, "padding": None, "model": model}
  return _from_json(dict(tokenizer) | changes)


def _from_json(tokenizer: Mapping[str, Any]) -> hf.Tokenizer:
  try:
    return hf.Tokenizer.from_str(json.dumps(tokenizer, ensure_ascii=False))
  except _LIBRARY_ERROR as error:
    reason = " ".join(str(error).split())[:120]
    raise errors.InputError(
      f"the Hugging Face tokenizer cannot be read: {reason}"
    ) from None


def _added_around(
  tokenizer: Mapping[str, Any],
) -> tuple[tuple[int, ...], tuple[int, ...]]:
  """The ids that the file's post-processor puts before a text, and after it."""
  if tokenizer.get("post_processor") is None:
    return (), ()
  word = {"type": "WordLevel", "vocab": {"text": _TEXT_ID}, "unk_token": "text"}
  tiny = {
    "version": "1.0",
    "truncation": None,
    "padding": None,
    "added_tokens": [],
    "normalizer": None,
    "pre_tokenizer": None,
    "post_processor": tokenizer["post_processor"],
    "decoder": None,
    "model": word,
  }
  ids = _from_json(tiny).encode("text").ids
  text = ids.index(_TEXT_ID)
  return tuple(ids[:text]), tuple(ids[text + 1 :])
