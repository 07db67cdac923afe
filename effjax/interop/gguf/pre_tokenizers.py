"""Where text is cut before bytes are merged, by the names that llama.cpp has for it.

Source: `tokenizer.ggml.pre` in llama-vocab.cpp. A name stands for patterns that cut one
after the other: each cuts what the ones before have left whole.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from effjax.core import errors

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
_ENDINGS = r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
# What Hugging Face's files write for it.
_ANY_CASE = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_MODERN = (
  _ENDINGS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*"
  r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cuts:
  """How text is cut.

  Attributes:
    patterns: regular expressions, in order.
    ignore_merges: whether a piece that is a token is one, whatever the merges say.
    add_bos: whether prompts begin with the bos token where the file does not say.
  """

  patterns: tuple[str, ...]
  ignore_merges: bool = False
  add_bos: bool = False


_LLAMA3 = Cuts(patterns=(_MODERN % "{1,3}",), ignore_merges=True, add_bos=True)
_QWEN2 = Cuts(patterns=(_MODERN % "",))
_DIGITS = Cuts(patterns=(r"\p{N}", _GPT2))
_PLAIN = Cuts(patterns=(_GPT2,))
DEFAULT = "default"
# The first name of each kind is the one that is written.
KNOWN = {
  "llama-bpe": _LLAMA3,
  "llama3": _LLAMA3,
  "llama-v3": _LLAMA3,
  "qwen2": _QWEN2,
  "deepseek-r1-qwen": _QWEN2,
  "smollm": _DIGITS,
  "starcoder": _DIGITS,
  "refact": _DIGITS,
  "command-r": _DIGITS,
  "codeshell": _DIGITS,
  "exaone": _DIGITS,
  "gpt-2": _PLAIN,
  "phi-2": _PLAIN,
  "mpt": _PLAIN,
  "olmo": _PLAIN,
  "jais": _PLAIN,
  DEFAULT: Cuts(
    patterns=(r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]")
  ),
}


def find(name: str, where: str) -> Cuts:
  """How text is cut by a name.

  Raises:
    InputError: it is not known here; the message lists those that are.
  """
  if name not in KNOWN:
    raise errors.unknown(f"tokenizer.ggml.pre in {where}", name, KNOWN)
  return KNOWN[name]


def to_json(cuts: Cuts) -> dict[str, Any]:
  """The `pre_tokenizer` of a Hugging Face tokenizer file."""
  steps = [
    {
      "type": "Split",
      "pattern": {"Regex": pattern},
      "behavior": "Isolated",
      "invert": False,
    }
    for pattern in cuts.patterns
  ]
  to_bytes = {
    "type": "ByteLevel",
    "add_prefix_space": False,
    "trim_offsets": True,
    "use_regex": False,
  }
  return {"type": "Sequence", "pretokenizers": [*steps, to_bytes]}


def name_of(pre_tokenizer: Any, ignore_merges: bool) -> str | None:
  """The name of what a Hugging Face tokenizer file does; None if it has none here.

  Args:
    pre_tokenizer: the entry of the file.
    ignore_merges: of its model.
  """
  found = _patterns(pre_tokenizer)
  for name, cuts in KNOWN.items():
    if found == cuts.patterns and ignore_merges == cuts.ignore_merges:
      return name
  return None


def _patterns(pre_tokenizer: Any) -> tuple[str, ...] | None:
  """The patterns that cut, one after the other; None for anything else."""
  steps = _flatten(pre_tokenizer)
  if not steps or steps[-1].get("type") != "ByteLevel":
    return None
  patterns = []
  for step in steps:
    kind = step.get("type")
    if kind == "ByteLevel" and step is steps[-1] and not step.get("add_prefix_space"):
      patterns += [_GPT2] if step.get("use_regex", True) else []
    elif kind == "Digits" and step.get("individual_digits"):
      patterns.append(r"\p{N}")
    elif kind == "Split" and _is_cut(step):
      pattern = step["pattern"]["Regex"].replace(_ANY_CASE, _ENDINGS)
      # White space that nothing matches is left whole anyway.
      patterns.append(_GPT2 if pattern == rf"{_GPT2}|\s+" else pattern)
    else:
      return None
  return tuple(patterns)


def _is_cut(step: Mapping[str, Any]) -> bool:
  return (
    isinstance(step.get("pattern"), Mapping)
    and isinstance(step["pattern"].get("Regex"), str)
    and step.get("behavior") == "Isolated"
    and not step.get("invert")
  )


def _flatten(step: Any) -> list[Mapping[str, Any]]:
  if not isinstance(step, Mapping):
    return []
  if step.get("type") != "Sequence":
    return [step]
  return [inner for part in step.get("pretokenizers", ()) for inner in _flatten(part)]
