"""Every command in the README parses, and every file it names is there."""

import pathlib
import re
import shlex

from effjax.cli import catalog, main

ROOT = pathlib.Path(__file__).resolve().parents[2]
_BLOCK = re.compile(r"^```(?:sh|bash|console)\n(.*?)^```", re.MULTILINE | re.DOTALL)
_CALL = re.compile(r"^(?:\S*python3? -m |\S*/)?effjax (.*)$")


def _commands():
  text = (ROOT / "README.md").read_text("utf-8")
  blocks = "\n".join(_BLOCK.findall(text)).replace("\\\n", " ")
  calls = (_CALL.match(line.strip().removeprefix("$ ")) for line in blocks.splitlines())
  return [shlex.split(call[1], comments=True) for call in calls if call]


def test_the_table_of_techniques_is_fresh():
  text = (ROOT / "README.md").read_text("utf-8")
  begin, end = "<!-- effjax list --markdown -->\n", "<!-- end -->"
  table = text.partition(begin)[2].partition(end)[0].strip()
  assert table == catalog.markdown(), "run: python -m effjax list --markdown"


def test_commands_parse(monkeypatch):
  monkeypatch.chdir(ROOT)
  commands = _commands()
  assert len(commands) >= 2
  for argv in commands:
    module, args = main.parse(argv)
    assert module.__name__.endswith(f".{argv[0]}")
    config = getattr(args, "config", None)
    assert config is None or pathlib.Path(config.split(":")[0]).is_file(), argv
