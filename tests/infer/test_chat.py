"""Chat templates against transformers, and what they may not do."""

import datetime
import json

import pytest

from effjax.core import errors
from effjax.data import pretrained_tokenizer
from effjax.infer import chat
from tests.data import families

CHATML = """\
{% for message in messages %}
{% if loop.first and messages[0]['role'] != 'system' %}
{{ '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' -}}
{% endif %}
{{ '<|im_start|>' + message['role'] + '\\n' -}}
{{ message['content'] + '<|im_end|>' + '\\n' -}}
{% endfor %}
{% if add_generation_prompt %}
{{ '<|im_start|>assistant\\n' -}}
{% endif %}
"""
LLAMA_2 = """\
{% if messages[0]['role'] == 'system' %}
{% set rest = messages[1:] %}{% set system = messages[0]['content'] %}
{% else %}
{% set rest = messages %}{% set system = false %}
{% endif %}
{% for message in rest %}
{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
{{ raise_exception('Conversation roles must alternate user/assistant/user/...') }}
{% endif %}
{% if loop.index0 == 0 and system != false %}
{% set content = '<<SYS>>\\n' + system + '\\n<</SYS>>\\n\\n' + message['content'] %}
{% else %}
{% set content = message['content'] %}
{% endif %}
{% if message['role'] == 'user' %}
{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}
{% elif message['role'] == 'assistant' %}
{{ ' ' + content.strip() + ' ' + eos_token }}
{% endif %}
{% endfor %}
"""
LLAMA_3 = """\
{{- bos_token }}
{%- if not date_string is defined %}
    {%- set date_string = strftime_now("%d %b %Y") %}
{%- endif %}
{%- set ns = namespace(system='') %}
{%- for message in messages if message.role == 'system' %}
    {%- set ns.system = message.content | trim %}
    {%- break %}
{%- endfor %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\nToday Date: " + date_string }}
{{- "\\n\\n" + ns.system + "<|eot_id|>" }}
{%- for message in messages if message.role != 'system' %}
    {%- generation %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
    {{- message['content'] | trim + '<|eot_id|>' }}
    {%- endgeneration %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""
MISTRAL = """\
{%- if messages[0]["role"] == "system" %}
    {%- set system_message = messages[0]["content"] %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set loop_messages = messages %}
{%- endif %}
{{- bos_token }}
{%- for message in loop_messages %}
    {%- if message["role"] == "user" %}
        {%- if loop.last and system_message is defined %}
            {{- "[INST]" + system_message + "\\n\\n" + message["content"] + "[/INST]" }}
        {%- else %}
            {{- "[INST]" + message["content"] + "[/INST]" }}
        {%- endif %}
    {%- elif message["role"] == "assistant" %}
        {{- dict(said=message.content) | tojson + eos_token }}
    {%- else %}
        {{- raise_exception("Only user and assistant roles are supported!") }}
    {%- endif %}
{%- endfor %}
"""
TEMPLATES = {
  "chatml": CHATML,
  "llama 2": LLAMA_2,
  "llama 3": LLAMA_3,
  "mistral": MISTRAL,
}


def _turns(*contents, system=None):
  roles = ("user", "assistant") * len(contents)
  turns = zip(roles, contents, strict=False)
  messages = [{"role": role, "content": text} for role, text in turns]
  return ([{"role": "system", "content": system}] if system else []) + messages


CONVERSATIONS = [
  _turns("Hello"),
  _turns('  <b>Hi & "you"</b> é 😀\n', system="Be brief.\n"),
  _turns("What?", "That's it.", "Who?", "{{ bos_token }}", "<|im_end|> {% raw %}"),
]


@pytest.mark.oracle
@pytest.mark.parametrize("name", TEMPLATES)
def test_equals_transformers(name, tmp_path):
  transformers = pytest.importorskip("transformers")
  (tmp_path / "t.json").write_text(families.sentencepiece_bpe(), encoding="utf-8")
  oracle = transformers.PreTrainedTokenizerFast(
    tokenizer_file=str(tmp_path / "t.json"),
    bos_token="<s>",
    eos_token="</s>",
    chat_template=TEMPLATES[name],
  )
  for messages in CONVERSATIONS:
    for ask in (True, False):
      expected = oracle.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=ask
      )
      found = chat.render(
        TEMPLATES[name],
        messages,
        bos_token="<s>",
        eos_token="</s>",
        add_generation_prompt=ask,
      )
      assert found == expected


def test_prompt_of_a_tokenizer():
  content = json.loads(families.byte_level())
  made = pretrained_tokenizer.Pretrained(
    content, bos_id=0, eos_ids=(2, 0), chat_template=CHATML
  )
  text = chat.prompt(made, "hi", system="Be kind.")
  assert text == (
    "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n"
    "<|im_start|>assistant\n"
  )
  ids = made.encode(text, special=True)
  assert [ids.count(i) for i in (0, 1, 2)] == [0, 3, 2]
  assert "helpful" in chat.prompt(made, "hi")
  made.chat_template = "{{ bos_token }}|{{ eos_token }}|{{ messages | length }}"
  assert chat.prompt(made, "hi") == "<|endoftext|>|<|im_end|>|1"
  bare = pretrained_tokenizer.Pretrained(content, chat_template=made.chat_template)
  assert chat.prompt(bare, "hi", "x") == "||2"


def test_more_variables_and_the_date():
  found = chat.render(
    "{{ tools | tojson(indent=1) }} {{ strftime_now('%Y') }}", [], tools=[{"a": "<é>"}]
  )
  assert found == '[\n {\n  "a": "<é>"\n }\n] ' + str(datetime.datetime.now().year)


def test_a_template_cannot_change_the_messages():
  messages = _turns("a")
  with pytest.raises(errors.InputError):
    chat.render("{{ messages.append(1) }}", messages)
  assert messages == _turns("a")


@pytest.mark.parametrize(
  ("template", "message"),
  [
    (None, "no chat template"),
    ("{% for %}", "Expected"),
    ("{{ raise_exception('only\n one\n role') }}", "only one role"),
    ("{{ missing.field }}", "'missing' is undefined"),
    ("{{ messages[0].content + 1 }}", "can only concatenate"),
    ("{{ 1 / 0 }}", "division"),
    ("{{ messages.__class__.__mro__ }}", "unsafe"),
    ("{{ raise_exception.__globals__.x }}", "unsafe"),
    ("{{ dict.__globals__['x'] }}", "unsafe"),
    ("{% set ns = namespace() %}{% set ns.__class__ = 1 %}", "namespace has no"),
    ("{{ namespace(_x=1) }}", "namespace has no"),
    ("{{ range(10000000) | list }}", "Range too big"),
    ("{% include 'passwd' %}", "no loader"),
    ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
  ],
)
def test_broken_templates_are_one_line(template, message):
  with pytest.raises(errors.InputError, match=message) as found:
    chat.render(template, _turns("hi"))
  assert "\n" not in str(found.value)
  assert len(str(found.value)) < 300
