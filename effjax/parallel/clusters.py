"""The cluster of several processes that an environment speaks of, if there is one.

What launchers set: Open MPI, Slurm, TPU VMs (of GKE and of Compute Engine), Kubernetes.
Some variables stand in places that are no cluster, too, such as a shell on a node of a
Slurm allocation; what counts is that this process was started as one of several.
"""

import dataclasses
from collections.abc import Mapping

from effjax.core import errors

# What to say where nothing can be detected.
BY_HAND = "--coordinator HOST:PORT --num-processes N --process-id I"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cluster:
  """A cluster that this process is part of.

  Attributes:
    name: in words.
    method: what jax.distributed is told to look for; None lets it look.
    coordinator: HOST:PORT; None where JAX finds it out.
    num_processes, process_id: None where JAX finds them out.
    local_devices: numbers of the GPUs that are this process's; None leaves it to JAX,
      `()` takes all that are visible.
  """

  name: str
  method: str | None
  coordinator: str | None = None
  num_processes: int | None = None
  process_id: int | None = None
  local_devices: tuple[int, ...] | None = ()


def detect(
  environ: Mapping[str, str], *, on_tpu_vm: bool = False, can_ask_k8s: bool = False
) -> Cluster | None:
  """The cluster of several processes that an environment speaks of, or None.

  Args:
    environ: the environment variables.
    on_tpu_vm: whether TPU chips and their driver are here.
    can_ask_k8s: whether the client of Kubernetes is installed.

  Raises:
    InputError: there is such a cluster, but not what it takes to join it.
  """
  for name in ("ompi", "slurm"):
    if (found := started_by(name, environ)) is not None:
      return found
  if on_tpu_vm and "tpu" in environ.get("JAX_PLATFORMS", "tpu"):
    return _tpu(environ)
  return _k8s(environ, can_ask_k8s)


def started_by(name: str, environ: Mapping[str, str]) -> Cluster | None:
  """The cluster if "ompi" or "slurm" started this process as one of several."""
  return {"ompi": _ompi, "slurm": _slurm}[name](environ)


def _ompi(environ: Mapping[str, str]) -> Cluster | None:
  size = _number_in(environ, "OMPI_COMM_WORLD_SIZE")
  rank = _number_in(environ, "OMPI_COMM_WORLD_RANK")
  if size is None or rank is None or size < 2:
    return None
  if "OMPI_MCA_orte_hnp_uri" not in environ:
    raise errors.InputError(
      f"mpirun started {size} processes, but this Open MPI (5 or later) does not say "
      f"where the first one is: add --cluster=mpi4py, or {BY_HAND}"
    )
  on_node = _number_in(environ, "OMPI_COMM_WORLD_LOCAL_SIZE")
  return Cluster(
    name="Open MPI",
    method="ompi",
    num_processes=size,
    process_id=rank,
    local_devices=_share_of_gpus(
      environ, on_node, _number_in(environ, "OMPI_COMM_WORLD_LOCAL_RANK")
    ),
  )


def _slurm(environ: Mapping[str, str]) -> Cluster | None:
  """The step that srun started this process in.

  A shell on a node of an allocation has many of the variables, the number of tasks
  among them, but is a step of one task or none.
  """
  size = _number_in(environ, "SLURM_STEP_NUM_TASKS")
  rank = _number_in(environ, "SLURM_PROCID")
  needed = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_LOCALID")
  if size is None or rank is None or size < 2 or any(n not in environ for n in needed):
    return None
  return Cluster(
    name="Slurm",
    method="slurm",
    num_processes=size,
    process_id=rank,
    local_devices=_share_of_gpus(
      environ, _slurm_tasks_here(environ), _number_in(environ, "SLURM_LOCALID")
    ),
  )


def _slurm_tasks_here(environ: Mapping[str, str]) -> int | None:
  """Tasks of the step on this node, out of a list such as "2(x3),1"."""
  node = _number_in(environ, "SLURM_NODEID")
  counts: list[int] = []
  for part in environ.get("SLURM_STEP_TASKS_PER_NODE", "").split(","):
    count, _, times = part.partition("(x")
    times = times.rstrip(")") or "1"
    if not count.isdigit() or not times.isdigit():
      return None
    counts += [int(count)] * int(times)
  return counts[node] if node is not None and node < len(counts) else None


def _share_of_gpus(
  environ: Mapping[str, str], on_node: int | None, local: int | None
) -> tuple[int, ...] | None:
  """Which of the visible GPUs are this process's, of several on a node."""
  if on_node == 1:
    return ()
  visible = environ.get("CUDA_VISIBLE_DEVICES")
  num_visible = None if visible is None else len(visible.split(","))
  if num_visible == 1 or "SLURM_GPUS_PER_TASK" in environ:
    return ()  # The scheduler shows each process its own.
  if None in (on_node, local):
    return None
  each = 1 if num_visible is None else max(1, num_visible // on_node)
  return tuple(range(local * each, (local + 1) * each))


def _tpu(environ: Mapping[str, str]) -> Cluster | None:
  """TPU VMs: of GKE, which says in variables what there is, or of Compute Engine."""
  names = environ.get("TPU_PROCESS_ADDRESSES") or environ.get("TPU_WORKER_HOSTNAMES")
  slices = _number_in(environ, "MEGASCALE_NUM_SLICES") or 1
  if names is not None:
    if len(names.split(",")) * slices < 2:
      return None
    return Cluster(name="TPUs of GKE", method="gketpu", local_devices=None)
  if "TPU_SKIP_MDS_QUERY" in environ:
    return None
  # How many there are only the metadata server knows; joining alone does no harm.
  return Cluster(name="TPU VMs", method="gcetpu", local_devices=None)


def _k8s(environ: Mapping[str, str], can_ask: bool) -> Cluster | None:
  index = _number_in(environ, "JOB_COMPLETION_INDEX")
  if "KUBERNETES_SERVICE_HOST" not in environ or index is None:
    return None
  if can_ask:
    return Cluster(name="Kubernetes", method=None, local_devices=None)
  if index == 0:
    return None  # As likely as not the only one.
  raise errors.InputError(
    f"this is pod {index} of an indexed Kubernetes job, whose size only its API knows: "
    f"install the package kubernetes, or give {BY_HAND}, or --dist=off to run alone"
  )


def _number_in(environ: Mapping[str, str], name: str) -> int | None:
  text = environ.get(name, "")
  return int(text) if text.isdigit() else None
