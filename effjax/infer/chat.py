"""Messages as the text a chat model was trained on.

A model's chat template is Jinja source, by the conventions of transformers: it sees
`messages`, `add_generation_prompt`, `bos_token`, `eos_token`, `raise_exception(text)`,
`strftime_now(format)` and the filter `tojson`, blocks are trimmed, and
`{% generation %}` marks what an assistant wrote and prints like its content.

A template is a program from somewhere else. It runs in Jinja's immutable sandbox and
sees strings, numbers, lists and dicts only.
"""

import datetime
import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.sandbox

from effjax.core import errors

# What a template that does not fit its messages can raise, beside Jinja's own errors.
_FAILURES = (
  jinja2.TemplateError,
  ArithmeticError,
  AttributeError,
  LookupError,
  RecursionError,
  TypeError,
  ValueError,
)


def render(
  template: str | None,
  messages: Sequence[Mapping[str, Any]],
  *,
  bos_token: str = "",
  eos_token: str = "",
  add_generation_prompt: bool = True,
  **variables: Any,
) -> str:
  """Messages as one text.

  Args:
    template: Jinja source; the `chat_template` of a tokenizer.
    messages: `{"role": "system" | "user" | "assistant", "content": text}` each.
    bos_token, eos_token: how the vocabulary writes these tokens.
    add_generation_prompt: end where the assistant's answer begins.
    **variables: anything else the template understands, of JSON types.

  Raises:
    InputError: there is no template, it is broken, or it refuses these messages.
  """
  if template is None:
    raise errors.InputError(
      "this model has no chat template: it continues text; leave out chat, and write "
      "the prompt as the text it should continue"
    )
  about = {
    "messages": [dict(message) for message in messages],
    "bos_token": bos_token,
    "eos_token": eos_token,
    "add_generation_prompt": add_generation_prompt,
  }
  try:
    return _compiled(template).render(variables | about)
  except _FAILURES as error:
    reason = " ".join(str(error).split())[:200] or type(error).__name__
    raise errors.InputError(
      f"the chat template cannot write these messages: {reason}"
    ) from None


def prompt(tokenizer: Any, user: str, system: str | None = None) -> str:
  """The text before the answer to a user's message; it spells special tokens.

  Args:
    tokenizer: has `chat_template`, `bos_id`, `eos_ids` and `name`.
    user: the message.
    system: how to answer; None for what the template itself says, if anything.

  Raises:
    InputError: see `render`.
  """
  messages = [] if system is None else [{"role": "system", "content": system}]
  messages.append({"role": "user", "content": user})
  name = lambda index: "" if index is None else tokenizer.name(index)
  return render(
    tokenizer.chat_template,
    messages,
    bos_token=name(tokenizer.bos_id),
    eos_token=name(next(iter(tokenizer.eos_ids), None)),
  )


class _Generation(jinja2.ext.Extension):
  """`{% generation %} ... {% endgeneration %}`: what is inside."""

  tags = {"generation"}

  def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
    line = next(parser.stream).lineno
    body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
    return jinja2.nodes.Scope(body, lineno=line)


class _Namespace(jinja2.utils.Namespace):
  """Jinja's `namespace`, without names that lead into the interpreter."""

  def __init__(*args: Any, **values: Any):
    # Without a parameter's name, so that a template may use any.
    self, *given = args
    found = dict(*given, **values)
    for name in found:
      _check_name(name)
    jinja2.utils.Namespace.__init__(self, found)

  def __setitem__(self, name: str, value: Any) -> None:
    _check_name(name)
    super().__setitem__(name, value)


def _check_name(name: Any) -> None:
  if str(name).startswith("_"):
    raise jinja2.exceptions.SecurityError(f"a namespace has no {name!r}")


@functools.lru_cache(maxsize=8)
def _compiled(template: str) -> jinja2.Template:
  environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
    trim_blocks=True,
    lstrip_blocks=True,
    extensions=[_Generation, jinja2.ext.loopcontrols],
  )
  environment.filters["tojson"] = _to_json
  environment.globals |= {
    "dict": _dict,
    "namespace": _Namespace,
    "raise_exception": _raise,
    "strftime_now": _now,
  }
  return environment.from_string(template)


def _dict(*args: Any, **values: Any) -> dict[Any, Any]:
  return dict(*args, **values)


def _to_json(
  value: Any,
  ensure_ascii: bool = False,
  indent: int | None = None,
  separators: Any = None,
  sort_keys: bool = False,
) -> str:
  """JSON as it is: Jinja's own filter escapes it for HTML."""
  return json.dumps(
    value,
    ensure_ascii=ensure_ascii,
    indent=indent,
    separators=separators,
    sort_keys=sort_keys,
  )


def _raise(message: Any) -> NoReturn:
  raise jinja2.TemplateError(str(message))


def _now(form: str) -> str:
  return datetime.datetime.now().strftime(form)
