"""Which cluster is found, from nothing but environment variables, and what is said."""

import pytest

from effjax.core import errors
from effjax.parallel import clusters, launch

# What `srun -N2 -n4` sets, of what matters; process 3 on the second node.
_SLURM = {
  "SLURM_JOB_ID": "901593",
  "SLURM_LOCALID": "1",
  "SLURM_NNODES": "2",
  "SLURM_NODEID": "1",
  "SLURM_NODELIST": "node[17-18]",
  "SLURM_NPROCS": "4",
  "SLURM_NTASKS": "4",
  "SLURM_PROCID": "3",
  "SLURM_STEP_ID": "0",
  "SLURM_STEP_NODELIST": "node[17-18]",
  "SLURM_STEP_NUM_NODES": "2",
  "SLURM_STEP_NUM_TASKS": "4",
  "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
}
_MPI = {
  "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911",
  "OMPI_COMM_WORLD_SIZE": "8",
  "OMPI_COMM_WORLD_RANK": "5",
  "OMPI_COMM_WORLD_LOCAL_RANK": "1",
  "OMPI_COMM_WORLD_LOCAL_SIZE": "4",
}
_GKE = {"TPU_WORKER_HOSTNAMES": "t-0,t-1,t-2,t-3", "TPU_WORKER_ID": "2"}
_K8S = {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "3"}
_BY_HAND = {
  "EFFJAX_COORDINATOR": "node1:8476",
  "EFFJAX_NUM_PROCESSES": "2",
  "EFFJAX_PROCESS_ID": "1",
}


def _without(values, *names):
  return {name: value for name, value in values.items() if name not in names}


def test_slurm():
  found = clusters.detect(_SLURM)
  assert (found.method, found.num_processes, found.process_id) == ("slurm", 4, 3)
  assert found.coordinator is None  # JAX reads it out of the list of nodes.


@pytest.mark.parametrize(
  "environ",
  [
    {},
    # A shell that ssh opened on a node: the job's number and little else.
    {"SLURM_JOB_ID": "901593", "SLURM_NODELIST": "node17"},
    # `salloc -n4` with a shell on the first node: a step of one task.
    _SLURM | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"},
    # The script of sbatch, outside of srun: no step.
    _without(
      _SLURM,
      "SLURM_STEP_NODELIST",
      "SLURM_STEP_NUM_TASKS",
      "SLURM_STEP_TASKS_PER_NODE",
    ),
    _without(_SLURM, "SLURM_NTASKS"),
    _SLURM | {"SLURM_PROCID": ""},
    _MPI | {"OMPI_COMM_WORLD_SIZE": "1", "OMPI_COMM_WORLD_RANK": "0"},
    # A notebook's pod, and the only pod of a job.
    {"KUBERNETES_SERVICE_HOST": "10.0.0.1"},
    _K8S | {"JOB_COMPLETION_INDEX": "0"},
    # A machine without a TPU that compiles for one.
    _GKE | {"TPU_SKIP_MDS_QUERY": "1"},
  ],
)
def test_what_is_no_cluster(environ):
  assert clusters.detect(environ) is None


@pytest.mark.parametrize(
  ("environ", "expected"),
  [
    ({}, (1,)),
    ({"SLURM_STEP_TASKS_PER_NODE": "2,1(x3),4", "SLURM_NODEID": "2"}, ()),
    ({"SLURM_STEP_TASKS_PER_NODE": "1(x4)"}, ()),
    ({"CUDA_VISIBLE_DEVICES": "0,1,2,3"}, (2, 3)),
    ({"CUDA_VISIBLE_DEVICES": "5"}, ()),
    ({"CUDA_VISIBLE_DEVICES": "0,1", "SLURM_GPUS_PER_TASK": "2"}, ()),
    ({"SLURM_NODEID": ""}, None),
  ],
)
def test_a_process_takes_its_share_of_the_gpus_of_its_node(environ, expected):
  assert clusters.detect(_SLURM | environ).local_devices == expected


def test_open_mpi_goes_before_slurm():
  found = clusters.detect(_SLURM | _MPI)
  assert (found.method, found.num_processes, found.process_id) == ("ompi", 8, 5)
  assert found.local_devices == (1,)


def test_an_open_mpi_that_does_not_say_where_it_is():
  with pytest.raises(errors.InputError, match="started 8 processes.*--cluster=mpi4py"):
    clusters.detect(_without(_MPI, "OMPI_MCA_orte_hnp_uri"))


@pytest.mark.parametrize(
  ("environ", "method"),
  [
    ({}, "gcetpu"),
    (_GKE, "gketpu"),
    ({"TPU_PROCESS_ADDRESSES": "t-0:8476,t-1:8476"}, "gketpu"),
    ({"TPU_WORKER_HOSTNAMES": "t-0", "MEGASCALE_NUM_SLICES": "2"}, "gketpu"),
    ({"TPU_WORKER_HOSTNAMES": "localhost"}, None),
    ({"TPU_SKIP_MDS_QUERY": "1"}, None),
    ({"JAX_PLATFORMS": "cpu"}, None),
    ({"JAX_PLATFORMS": "tpu,cpu"}, "gcetpu"),
  ],
)
def test_tpu_vms(environ, method):
  found = clusters.detect(environ, on_tpu_vm=True)
  assert (found and found.method) == method


def test_kubernetes():
  assert clusters.detect(_K8S, can_ask_k8s=True).name == "Kubernetes"
  with pytest.raises(errors.InputError, match="pod 3 of an indexed Kubernetes job"):
    clusters.detect(_K8S)


def test_modes():
  choose = lambda mode, environ: launch.choose(
    launch.request(environ, mode=mode), environ
  )
  assert choose("auto", {}) is None and choose("auto", _SLURM).name == "Slurm"
  assert choose("off", _SLURM) is None and choose("off", _BY_HAND) is None
  assert choose("on", _SLURM).name == "Slurm"
  with pytest.raises(errors.InputError, match="no cluster of several processes is det"):
    choose("on", {})
  found = choose("auto", _SLURM | _BY_HAND)
  assert found == clusters.Cluster(
    name="given by hand",
    method="deactivate",
    coordinator="node1:8476",
    num_processes=2,
    process_id=1,
  )
  alone = {"EFFJAX_NUM_PROCESSES": "1", "EFFJAX_PROCESS_ID": "0"}
  assert choose("auto", _BY_HAND | alone) is None
  assert choose("on", _BY_HAND | alone).num_processes == 1


def test_a_cluster_that_is_named_is_taken():
  wanted = launch.request(_SLURM, method="mpi4py")
  assert launch.choose(wanted, _SLURM).method == "mpi4py"
  wanted = launch.request({}, method="k8s")
  assert launch.choose(wanted, {}).method is None


def test_a_cluster_that_is_named_must_be_there():
  assert (
    launch.choose(launch.request({}, method="slurm"), _SLURM | _MPI).name == "Slurm"
  )
  with pytest.raises(
    errors.InputError, match="--cluster=slurm, but this process is not"
  ):
    launch.choose(launch.request({}, method="slurm"), {})


def test_flags_go_before_variables():
  made = launch.request(_BY_HAND, process_id=0, timeout_secs=5.0, mode=None)
  assert made == launch.Request(
    coordinator="node1:8476", num_processes=2, process_id=0, timeout_secs=5.0
  )
  assert made.heartbeat_secs == 30
  assert launch.request({"EFFJAX_HEARTBEAT_SECS": "12"}).heartbeat_secs == 12
  assert launch.request({}).timeout_secs == 1800


@pytest.mark.parametrize(
  ("said", "message"),
  [
    ({"mode": "atuo"}, "did you mean 'auto'"),
    ({"method": "slrum"}, "did you mean 'slurm'"),
    ({"coordinator": "node1:1"}, "give all three or none"),
    ({"process_id": 1}, "give all three or none"),
    (
      {"coordinator": "node1", "num_processes": 2, "process_id": 0},
      "'node1' must be HOST:PORT",
    ),
    (
      {"coordinator": "node1:1", "num_processes": 2, "process_id": 2},
      "process id 2 must be from 0 to 1",
    ),
    ({"timeout_secs": 0.0}, "--dist-timeout .* must be positive"),
  ],
)
def test_mistakes(said, message):
  with pytest.raises(errors.InputError, match=message):
    launch.request({}, **said)


def test_a_variable_that_is_no_number():
  with pytest.raises(
    errors.InputError, match="EFFJAX_PROCESS_ID='one' must be a whole"
  ):
    launch.request(_BY_HAND | {"EFFJAX_PROCESS_ID": "one"})
