import multiprocessing
import pathlib
import time

import pytest

from effjax.data import cache


@pytest.mark.parametrize(
  ("variables", "expected"),
  [
    ({"EFFJAX_CACHE": "/a", "XDG_CACHE_HOME": "/b"}, "/a"),
    ({"XDG_CACHE_HOME": "/b"}, "/b/effjax"),
    ({}, "/elsewhere/.cache/effjax"),
  ],
)
def test_folder(monkeypatch, variables, expected):
  for name in ("EFFJAX_CACHE", "XDG_CACHE_HOME"):
    monkeypatch.delenv(name, raising=False)
  monkeypatch.setenv("HOME", "/elsewhere")
  for name, value in variables.items():
    monkeypatch.setenv(name, value)
  assert cache.folder() == pathlib.Path(expected)


def test_a_failed_block_leaves_nothing(tmp_path):
  target = tmp_path / "made"
  with pytest.raises(RuntimeError), cache.replacing(target) as made:
    (made / "half").write_text("x")
    raise RuntimeError
  assert list(tmp_path.iterdir()) == []


def test_a_finished_block_replaces_the_old_folder_whole(tmp_path):
  target = tmp_path / "made"
  for name in ("old", "new"):
    with cache.replacing(target) as made:
      (made / name).write_text(name)
  assert [path.name for path in target.iterdir()] == ["new"]
  assert list(tmp_path.iterdir()) == [target]


def _append_while_locked(target):
  with cache.locked(target):
    with open(target, "a") as file:
      file.write("start ")
      file.flush()
      time.sleep(0.05)
      file.write("stop ")


def test_processes_take_turns(tmp_path):
  context = multiprocessing.get_context("spawn")
  target = tmp_path / "log"
  processes = [
    context.Process(target=_append_while_locked, args=(target,)) for _ in range(3)
  ]
  for process in processes:
    process.start()
  for process in processes:
    process.join(60)
    assert process.exitcode == 0
  assert target.read_text() == "start stop " * 3
