"""What is known of the machine."""

import time

from effjax.cli.peers import machine


def test_it_has_a_name_and_cores():
  assert machine.describe()
  assert len(set(machine.cores())) == len(machine.cores()) >= 1


def test_the_part_of_others_leaves_out_our_own():
  watch, cpu = machine.Others(), time.process_time()
  while time.process_time() - cpu < 0.3:
    pass
  spent = time.process_time() - cpu
  everyone, others = watch.share(0.0), watch.share(spent)
  assert 0 <= others < everyone <= 1


def test_where_it_cannot_be_known_it_is_none(tmp_path, monkeypatch):
  for name in ("_STAT", "_CPUINFO"):
    monkeypatch.setattr(machine, name, tmp_path / "none")
  assert machine.Others().share(0.0) is None
  assert machine.describe()
