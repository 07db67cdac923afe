"""Processes that join, talk, stop together, and end together when one of them fails."""

import re
import signal
import socket
import textwrap

import pytest

from effjax.parallel import watch
from tests import processes

_MEMBER = """
import os, signal, sys, time
from effjax.parallel import hosts, launch

import jax
import numpy as np

from effjax.core import errors
from effjax.parallel import mesh, own, rules, spread
from effjax.train import signals


def together():
  '''A collective: waits for all processes.'''
  everywhere = spread.over("dp")
  rows = everywhere.put(np.ones((jax.local_device_count(), 4), np.float32))
  return float(jax.jit(lambda x: x.sum(), out_shardings=everywhere.whole)(rows))


def body(me):
BODY

try:
  with launch.joined(launch.request(os.environ, timeout_secs=TIMEOUT)):
    body(jax.process_index())
except errors.EffjaxError as error:
  sys.stderr.write(f"effjax: error: {error}\\n")
  sys.exit(error.exit_code)
"""


@pytest.fixture
def start(tmp_path):
  """Starts processes that join and do `body(me)`."""

  def started(count, body, timeout_secs=60, heartbeat_secs=5, **env):
    code = _MEMBER.replace("BODY", textwrap.indent(textwrap.dedent(body), "  "))
    command = processes.python(code.replace("TIMEOUT", str(timeout_secs)))
    shared = {
      "JAX_NUM_CPU_DEVICES": "2",
      "EFFJAX_HEARTBEAT_SECS": str(heartbeat_secs),
    }
    return processes.running(tmp_path, count, command, shared | env)

  return started


def test_what_processes_say_to_each_other(start, tmp_path):
  """Words, files and arrays, also on devices that do not lie side by side."""
  body = f"""
    folder = __import__("pathlib").Path({str(tmp_path)!r})
    assert hosts.told("count", lambda: [me, "x"]) == [0, "x"]
    hosts.agree("the colour", ["red"], "paint it")
    hosts.told("write", lambda: (folder / "a").write_text("a") and None)
    hosts.see(folder / "a")
    hosts.meet("all")

    # Rows of the two processes in turn: 0, 1, 0, 1.
    devices = np.array(jax.devices()).reshape(2, 2).T.reshape(1, 4, 1, 1, 1, 1)
    mixed = spread.Spread(jax.sharding.Mesh(devices, rules.AXES))
    assert mixed.share() == (me, 2), mixed.share()
    rows = np.arange(12.).reshape(6, 2)[None] + 100 * me
    rows = rows.reshape(6, 2)[:4]
    found = hosts.whole(mixed.put(rows))
    expected = np.stack([rows[0] - 100 * me, rows[0] - 100 * me + 100])
    np.testing.assert_array_equal(found[[0, 2]], expected)
    assert sorted(found[:, 0].tolist()) == [0, 2, 4, 6, 100, 102, 104, 106]
    everything = np.arange(16.).reshape(8, 2)
    np.testing.assert_array_equal(hosts.whole(mixed.put_all(everything)), everything)

    # What one process has, and what is split between them.
    whole = spread.over("hsdp", shape={{"data": 2}})
    mine = own.spread_of_process(whole)
    assert dict(mine.mesh.shape) == dict(whole.mesh.shape) | {{"data": 1}}
    assert all(d.process_index == me for d in mine.mesh.devices.flat)
    P = jax.sharding.PartitionSpec
    named = lambda s, spec: jax.sharding.NamedSharding(s.mesh, spec)
    assert not own.is_split_over_processes(whole, [named(whole, P("fsdp"))])
    assert own.is_split_over_processes(whole, [named(whole, P(("data", "fsdp")))])
    here = jax.device_put(everything, named(mine, P("fsdp")))
    given = own.give_to_all({{"a": here}}, {{"a": named(whole, P("data"))}})["a"]
    np.testing.assert_array_equal(hosts.whole(given), everything)
    assert together() == 16
    print("said", me)
  """
  with start(2, body) as job:
    ended = job.wait()
  assert [end.code for end in ended] == [0, 0], ended
  # What is printed meanwhile, by C++ too, is kept out of results.
  assert [end.out for end in ended] == ["", ""]
  assert [end.lines[-1] for end in ended] == ["said 0", "said 1"]
  first = ended[0].lines[0]
  assert first.startswith("2 processes (given by hand, coordinator 127.0.0.1:")
  assert first.endswith("4 devices (cpu)")


def test_values_that_differ_are_named(start):
  with start(
    2, "hosts.agree('the colour', 'red' if me else 'blue', 'paint it')"
  ) as job:
    ended = job.wait()
  assert [end.code for end in ended] == [2, 2]
  for end in ended:
    assert "the colour is 'red' in process 1" in end.lines[-1]
    assert end.lines[-1].endswith("and 'blue' in process 0: paint it")


def test_an_error_of_one_process_is_the_error_of_all(start):
  """Process 0 waits in a collective that process 1 never joins."""
  body = """
    if me == 1:
      raise errors.InputError("there is no such thing; choose another")
    together()
  """
  with start(2, body) as job:
    ended = job.wait(60)
  assert [end.code for end in ended] == [2, 2]
  line = "effjax: error: there is no such thing; choose another"
  assert [end.lines[-1] for end in ended] == [line, line]


def test_a_crash_of_one_process_ends_the_others(start):
  body = """
    if me == 0:
      raise RuntimeError("out of luck")
    together()
  """
  with start(2, body) as job:
    ended = job.wait(60)
  assert [end.code for end in ended] == [1, 1]
  assert ended[0].lines[-1] == "RuntimeError: out of luck"  # with its traceback
  pid = job.processes[0].pid
  assert f"pid {pid}) failed: RuntimeError: out of luck" in ended[1].lines[-1]
  assert "Traceback" not in "".join(ended[1].lines)


_WORK = """
  for _ in range(100_000):
    together()
    sys.stderr.write("step\\n")
"""


@pytest.mark.parametrize(("count", "dead"), [(3, 1), (2, 0)])
def test_a_dead_process_is_named_and_ends_all(start, count, dead):
  with start(count, _WORK) as job:
    job.when(lambda: "step" in job.text(0)).send(dead, signal.SIGKILL)
    ended = job.wait(45)
  pids = [process.pid for process in job.processes]
  for number, end in enumerate(ended):
    if number == dead:
      assert end.code == -signal.SIGKILL
      continue
    assert end.code == 1, end.lines
    line = end.lines[-1]
    assert line.startswith(f"effjax: error: process {dead} ("), line
    assert f"pid {pids[dead]}" in line and "is dead or cut off" in line
    assert "the same command resumes" in line


def test_who_died_in_words():
  """Messages as the coordination service of jaxlib 0.10.2 writes them."""
  say = lambda message, me=0: watch.obituary(message, me, "process {}".format, 30)
  silent = "Barrier failed because: UNAVAILABLE: Task {} heartbeat timeout. This"
  assert say(silent.format(2)) == "process 2 is dead or cut off: no heartbeat for 30 s"
  both = silent.format(2) + silent.format(1)
  assert say(both).startswith("process 1 and process 2 are dead or cut off")
  assert say(both, 1).startswith("process 2 is dead or cut off")
  assert say(silent.format(1), 1).startswith("process 1 was stopped for a while")
  left = "Barrier failed because: task disconnected. Barrier Id: w/1::0, Task: 3\n"
  assert say(left) == "process 3 has left the run before its end"
  gone = "UNAVAILABLE: Failed to send RPC to coordination service."
  assert say(gone, 1) == "process 0, the coordinator, is dead or cut off"


def test_who_comes_too_late_is_waited_for_in_vain(start):
  body = """
    hosts.set_timeout(3)
    if me == 1:
      time.sleep(5)
    hosts.told("open the folder", lambda: None)
    hosts.meet("all processes to pack")
  """
  with start(2, body, heartbeat_secs=3) as job:
    ended = job.wait(60)
  assert [end.code for end in ended] == [1, 1]
  first, second = (end.lines[-1] for end in ended)
  waited = re.search(r"process 0 waited (\d) s for all processes to pack; look", first)
  assert waited and int(waited.group(1)) >= 3, first
  late = "process 1 came too late: the others waited for all processes to pack"
  assert second == first or second.endswith(late)


def test_processes_stop_at_the_same_place(start):
  """One of them gets the signal, and it is the other one that is ahead."""
  body = """
    with signals.StopRequest() as stop:
      for place in range(10_000):
        if place % 2 and stop.at():
          break
        try:
          with stop.interruptible():
            signals.check()
        except signals.Interrupted:
          assert stop.requested.name == "SIGTERM"
          break
        sys.stderr.write("step\\n")
        time.sleep(0.002 + 0.004 * me)
    sys.stderr.write(f"stopped at {place}\\n")
    assert place < 9_999
    # What is agreed on stays so.
    assert stop.at()
  """
  for number in (signal.SIGTERM, signal.SIGINT):
    with start(2, body) as job:
      job.when(lambda job=job: "step" in job.text(1)).send(1, number)
      ended = job.wait(60)
    assert [end.code for end in ended] == [0, 0], ended
    places = {end.lines[-1] for end in ended}
    assert len(places) == 1 and places.pop().startswith("stopped at ")


def test_who_cannot_join_says_why(start, tmp_path):
  """Nobody at the address; nobody else comes; the port is in use."""
  one = {"EFFJAX_NUM_PROCESSES": "2"}
  with start(1, "pass", timeout_secs=4, EFFJAX_PROCESS_ID="1", **one) as nobody:
    with start(1, "pass", timeout_secs=4, **one) as lonely:
      used = socket.create_server(("", 0))
      address = f"127.0.0.1:{used.getsockname()[1]}"
      with used, start(1, "pass", EFFJAX_COORDINATOR=address, **one) as late:
        ended = [job.wait(60)[0] for job in (nobody, lonely, late)]
  assert [end.code for end in ended] == [2, 2, 2], ended
  lines = [end.lines[-1] for end in ended]
  where = f"127.0.0.1:{nobody.port}, which does not answer"
  assert f"waited 4 s for the coordinator {where}" in lines[0]
  assert lines[0].startswith("effjax: error: process 1 (")
  assert f"waited 4 s at 127.0.0.1:{lonely.port} for the other processes" in lines[1]
  assert f"cannot listen at {address}: Address already in use" in lines[2]
