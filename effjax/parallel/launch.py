"""Which cluster this process is part of, told from its environment, and joining it.

`jax.distributed.initialize()` looks for clusters too, but takes some variables for a
cluster that are none (a shell on a node of a Slurm allocation), gives each process a
single GPU under Slurm and Open MPI, and aborts where a coordinator does not answer. So
it is decided here whether there is a cluster of several processes, and which of its
devices are ours; where the coordinator is, JAX is asked (jax._src.clusters).

Nothing here runs at import, so processes that a data loader starts never join again.
"""

import contextlib
import dataclasses
import importlib.util
import os
import socket
import sys
import threading
from collections.abc import Iterator, Mapping

import jax
from jax._src import cloud_tpu_init, distributed
from jax._src import clusters as jax_clusters

from effjax.core import errors
from effjax.parallel import clusters, hosts, watch

MODES = ("auto", "on", "off")
# What may be named: the names of jax._src.clusters, and "k8s", which has none there.
METHODS = ("ompi", "slurm", "gcetpu", "gketpu", "k8s", "mpi4py")
HEARTBEAT_SECS = 30


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
  """What the command line says.

  Attributes:
    mode: "auto" joins a cluster of several processes if there is one, "on" insists on
      it, "off" never joins.
    method: one of METHODS, to take that and look for no other; None to look.
    coordinator: HOST:PORT of process 0, where no cluster can be detected.
    num_processes, process_id: go with it.
    timeout_secs: how long processes wait for each other.
    heartbeat_secs: after how long without a heartbeat a process counts as dead.
  """

  mode: str = "auto"
  method: str | None = None
  coordinator: str | None = None
  num_processes: int | None = None
  process_id: int | None = None
  timeout_secs: float = hosts.DEFAULT_TIMEOUT_SECS
  heartbeat_secs: int = HEARTBEAT_SECS


def request(environ: Mapping[str, str], **said: str | int | float | None) -> Request:
  """The request of some flags, completed from EFFJAX_COORDINATOR and its like.

  Args:
    environ: variables EFFJAX_COORDINATOR, EFFJAX_NUM_PROCESSES, EFFJAX_PROCESS_ID, and
      EFFJAX_HEARTBEAT_SECS, which has no flag.
    **said: fields of Request; None for what was not said.

  Raises:
    InputError: a value is no number or not one of those allowed, or only a part of what
      belongs together was said.
  """
  found = {name: value for name, value in said.items() if value is not None}
  for name in ("coordinator", "num_processes", "process_id", "heartbeat_secs"):
    variable = f"EFFJAX_{name.upper()}"
    if name not in found and environ.get(variable):
      text = environ[variable]
      found[name] = text if name == "coordinator" else _number(variable, text)
  made = Request(**found)
  if made.mode not in MODES:
    raise errors.unknown("value of --dist", made.mode, MODES)
  if made.method is not None and made.method not in METHODS:
    raise errors.unknown("value of --cluster", made.method, METHODS)
  if made.timeout_secs <= 0 or made.heartbeat_secs <= 0:
    raise errors.InputError("--dist-timeout and EFFJAX_HEARTBEAT_SECS must be positive")
  _check_explicit(made)
  return made


def choose(wanted: Request, environ: Mapping[str, str]) -> clusters.Cluster | None:
  """The cluster to join, or None to run alone.

  Raises:
    InputError: one is insisted on, and none can be detected; see also clusters.detect.
  """
  if wanted.mode == "off":
    return None
  if wanted.coordinator is not None:
    if wanted.num_processes == 1 and wanted.mode == "auto":
      return None
    return clusters.Cluster(
      name="given by hand",
      method="deactivate",
      coordinator=wanted.coordinator,
      num_processes=wanted.num_processes,
      process_id=wanted.process_id,
    )
  if wanted.method in ("ompi", "slurm"):
    found = clusters.started_by(wanted.method, environ)
    if found is None:
      raise errors.InputError(
        f"--cluster={wanted.method}, but this process is not one of several that it "
        f"started; leave it out, or give {clusters.BY_HAND}"
      )
    return found
  if wanted.method is not None:
    name = None if wanted.method == "k8s" else wanted.method
    return clusters.Cluster(name=wanted.method, method=name, local_devices=None)
  found = clusters.detect(
    environ,
    on_tpu_vm=cloud_tpu_init.running_in_cloud_tpu_vm,
    can_ask_k8s=importlib.util.find_spec("kubernetes") is not None,
  )
  if found is None and wanted.mode == "on":
    raise errors.InputError(
      "--dist=on, but no cluster of several processes is detected (Open MPI, Slurm, "
      f"TPU VMs, Kubernetes); give {clusters.BY_HAND}, or leave --dist out to run alone"
    )
  return found


@contextlib.contextmanager
def joined(wanted: Request, environ: Mapping[str, str] = os.environ) -> Iterator[None]:
  """Makes this process one of a run's, or leaves it alone; before JAX does anything.

  In a run of several processes, what C++ prints goes to stderr while this is open:
  stdout is for results. An error of one process ends all (see watch).

  Raises:
    InputError: see `choose`; or the cluster cannot be joined.
  """
  cluster = choose(wanted, environ)
  if cluster is None:
    yield
    return
  hosts.set_timeout(wanted.timeout_secs)
  _order_collectives()
  with _stdout_to_stderr():
    _connect(cluster, wanted)
    if not hosts.several():
      yield
      return
    with watch.Watch(hosts.introduce(), wanted.heartbeat_secs):
      if hosts.first():
        address = distributed.global_state.coordinator_address
        sys.stderr.write(
          f"{jax.process_count()} processes ({cluster.name}, coordinator {address}), "
          f"{jax.device_count()} devices ({jax.devices()[0].device_kind})\n"
        )
      yield


def _order_collectives() -> None:
  """Has XLA's CPU backend run the collectives of a program in one order everywhere.

  By default it runs independent parts of a program side by side, collectives among
  them, and two processes that begin with different ones wait for each other for good
  (jaxlib 0.10.2; found with sparse training under "fsdp"). XLA reads its flags when
  the first program is compiled.
  """
  flag = "--xla_cpu_enable_concurrency_optimized_scheduler"
  flags = os.environ.get("XLA_FLAGS", "")
  if flag not in flags and not cloud_tpu_init.running_in_cloud_tpu_vm:
    os.environ["XLA_FLAGS"] = f"{flags} {flag}=false".strip()


def _check_explicit(made: Request) -> None:
  given = (made.coordinator, made.num_processes, made.process_id)
  if given == (None, None, None):
    return
  if None in given:
    raise errors.InputError(
      f"{clusters.BY_HAND} (or EFFJAX_COORDINATOR, EFFJAX_NUM_PROCESSES, "
      "EFFJAX_PROCESS_ID) go together: give all three or none"
    )
  host, _, port = made.coordinator.rpartition(":")
  if not host or not port.isdigit():
    raise errors.InputError(
      f"coordinator {made.coordinator!r} must be HOST:PORT, as in node1:8476"
    )
  if not 0 <= made.process_id < made.num_processes:
    raise errors.InputError(
      f"process id {made.process_id} must be from 0 to {made.num_processes - 1}, of "
      f"{made.num_processes} processes"
    )


def _connect(cluster: clusters.Cluster, wanted: Request) -> None:
  """Initializes JAX for several processes.

  Raises:
    InputError: it cannot be done.
  """
  local = cluster.local_devices
  if cluster.method in ("slurm", "ompi"):
    cluster = dataclasses.replace(cluster, coordinator=_ask(cluster.method))
  if cluster.process_id == 0 and cluster.coordinator is not None:
    _check_port(cluster.coordinator)
  # JAX aborts when its own time is up: the timer comes first, and says what is wrong.
  timer = threading.Timer(wanted.timeout_secs, _give_up, (cluster, wanted))
  timer.daemon = True
  timer.start()
  try:
    jax.distributed.initialize(
      coordinator_address=cluster.coordinator,
      num_processes=cluster.num_processes,
      process_id=cluster.process_id,
      local_device_ids=None if local is None else list(local),
      cluster_detection_method=cluster.method,
      initialization_timeout=round(wanted.timeout_secs) + 60,
      heartbeat_timeout_seconds=wanted.heartbeat_secs,
      shutdown_timeout_seconds=wanted.heartbeat_secs,
    )
  except (RuntimeError, ValueError, OSError) as error:
    raise errors.InputError(
      f"cannot join the processes of {cluster.name}: {' '.join(str(error).split())}; "
      f"give {clusters.BY_HAND}, or --dist=off to run alone"
    ) from None
  finally:
    timer.cancel()


def _ask(method: str) -> str:
  """Where the coordinator is, as JAX reads it out of the environment."""
  (found,) = (c for c in jax_clusters.ClusterEnv._cluster_types if c.name == method)
  return found.get_coordinator_address(
    timeout_secs=None, override_coordinator_port=os.environ.get("JAX_COORDINATOR_PORT")
  )


def _check_port(address: str) -> None:
  """Raises InputError if process 0 cannot listen; JAX would try, and often crash."""
  port = int(address.rpartition(":")[2])
  both = socket.has_dualstack_ipv6()
  family = socket.AF_INET6 if both else socket.AF_INET
  try:
    socket.create_server(("", port), family=family, dualstack_ipv6=both).close()
  except OSError as error:
    raise errors.InputError(
      f"process 0 ({socket.gethostname()}) cannot listen at {address}: "
      f"{error.strerror}; is another run using the port?"
    ) from None


def _give_up(cluster: clusters.Cluster, wanted: Request) -> None:
  """Says what was waited for, and ends the process, whose main thread is blocked."""
  process, address = distributed.global_state.process_id, _address(cluster)
  secs = f"{wanted.timeout_secs:.0f} s"
  if process == 0:
    what = f"{secs} at {address} for the other processes, and not all of them came"
    fix = "are they running, and can they reach this address?"
  elif _answers(address):
    what = f"{secs} at the coordinator {address}, where not all processes came"
    fix = "are they all running?"
  else:
    what = f"{secs} for the coordinator {address}, which does not answer"
    fix = "is process 0 running, and can it be reached from here?"
  line = f"process {process} ({socket.gethostname()}) waited {what}; {fix}"
  os.write(sys.stderr.fileno(), f"effjax: error: {line}\n".encode())
  os._exit(errors.InputError.exit_code)


def _address(cluster: clusters.Cluster) -> str:
  found = distributed.global_state.coordinator_address
  return cluster.coordinator or found or f"of {cluster.name}"


def _answers(address: str) -> bool:
  host, _, port = address.rpartition(":")
  try:
    socket.create_connection((host, int(port)), timeout=5).close()
  except (OSError, ValueError):
    return False
  return True


def _number(name: str, text: str) -> int:
  if not text.isdigit():
    raise errors.InputError(f"{name}={text!r} must be a whole number")
  return int(text)


@contextlib.contextmanager
def _stdout_to_stderr() -> Iterator[None]:
  sys.stdout.flush()
  kept = os.dup(1)
  os.dup2(2, 1)
  try:
    yield
  finally:
    sys.stdout.flush()
    os.dup2(kept, 1)
    os.close(kept)
