"""The tokenizer of a Hugging Face model folder, from its JSON files alone.

Nothing in the folder is executed or unpickled. Read are `tokenizer.json`, and where
they exist `tokenizer_config.json`, `special_tokens_map.json`, `generation_config.json`,
`config.json` and `chat_template.jinja`.
"""

import json
import pathlib
from collections.abc import Mapping
from typing import Any

from effjax.core import config, errors
from effjax.data import pretrained_tokenizer


def from_hf_folder(path: str | pathlib.Path) -> pretrained_tokenizer.Pretrained:
  """Reads the tokenizer of a model folder.

  What begins and ends a text comes from the first file that says so, in this order:
  `tokenizer_config.json`, `special_tokens_map.json`, `generation_config.json`,
  `config.json`; a null in the first two means that there is none. Every id that
  `generation_config.json` (or else `config.json`) lists ends a text too. Where no bos
  or eos token is named, the cls and the sep token are meant (BERT). Whether a prompt
  begins with `bos_id` is what the post-processor in `tokenizer.json` does, as in
  transformers; `add_bos_token` counts where there is none.

  Args:
    path: the folder.

  Raises:
    InputError: no `tokenizer.json`, or files that are broken or do not fit together.
  """
  folder = pathlib.Path(path)
  config.require(folder.is_dir(), f"{folder} does not exist or is not a folder")
  config.require(
    (folder / "tokenizer.json").is_file(),
    f"{folder} has no tokenizer.json, the one tokenizer format that is read; if it has "
    "another one (tokenizer.model, vocab.txt), write it once with transformers: "
    "AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)",
  )
  content = _read(folder / "tokenizer.json")
  files = {
    name: _read(folder / f"{name}.json")
    for name in (
      "tokenizer_config",
      "special_tokens_map",
      "generation_config",
      "config",
    )
  }
  try:
    ids = pretrained_tokenizer.vocabulary(content)
    bos_id = _named(files, ids, "bos_token", "cls_token")
    eos_id = _named(files, ids, "eos_token", "sep_token")
    facts = {
      "bos_id": bos_id,
      "eos_ids": [index for index in (eos_id, *_ends(files)) if index is not None],
      "pad_id": _named(files, ids, "pad_token"),
      "chat_template": _chat_template(folder, files["tokenizer_config"]),
    }
    if content.get("post_processor") is None:
      asked = files["tokenizer_config"].get("add_bos_token") is True
      facts["add_bos"] = asked and bos_id is not None
    return pretrained_tokenizer.from_content({"tokenizer": content} | facts)
  except errors.InputError as error:
    raise errors.InputError(f"{folder}: {error}") from None


def _named(files: Mapping[str, Any], ids: Mapping[str, int], *names: str) -> Any:
  """The id of the first of some special tokens that the files know."""
  tables = [files[file] for file in ("tokenizer_config", "special_tokens_map")]
  for name in names:
    found = [table[name] for table in tables if name in table]
    token = next((token for token in found if token is not None), None)
    if token is not None:
      return _id_of(name, token, ids)
    if found:
      continue
    for file in ("generation_config", "config"):
      index = files[file].get(f"{name}_id")
      if index is not None:
        # Some models list their ends here; `_ends` reads them.
        return None if isinstance(index, list) else index
  return None


def _id_of(name: str, token: Any, ids: Mapping[str, int]) -> int | None:
  written = token.get("content") if isinstance(token, Mapping) else token
  config.require(
    isinstance(written, str), f"{name} must be a token's name, got {str(token)[:60]}"
  )
  # A padding token that training added beside the vocabulary is never seen.
  config.require(
    written in ids or name == "pad_token",
    f"{name} is {written!r}, which is not in the vocabulary of tokenizer.json",
  )
  return ids.get(written)


def _ends(files: Mapping[str, Any]) -> list[Any]:
  """The ids at which the model's authors stop."""
  for file in ("generation_config", "config"):
    found = files[file].get("eos_token_id")
    if found is not None:
      return found if isinstance(found, list) else [found]
  return []


def _chat_template(folder: pathlib.Path, settings: Mapping[str, Any]) -> str | None:
  path = folder / "chat_template.jinja"
  if path.is_file():
    return _text(path)
  found = settings.get("chat_template")
  if isinstance(found, list):  # Several with names; the others are for tools.
    named = {e.get("name"): e.get("template") for e in found if isinstance(e, Mapping)}
    found = named.get("default", next(iter(named.values()), None))
  config.require(
    found is None or isinstance(found, str),
    f"chat_template must be text or a list with names, got {str(found)[:60]}",
  )
  return found


def _read(path: pathlib.Path) -> dict[str, Any]:
  """The JSON object of a file; empty if there is none."""
  if not path.is_file():
    return {}
  try:
    value = json.loads(_text(path))
  except ValueError as error:
    raise errors.InputError(f"{path} is not JSON: {error}") from None
  config.require(isinstance(value, dict), f"{path} does not hold a JSON object")
  return value


def _text(path: pathlib.Path) -> str:
  try:
    return path.read_text(encoding="utf-8")
  except UnicodeDecodeError as error:
    raise errors.InputError(f"{path} is not UTF-8 text: {error}") from None
