"""Pods to compile for without having one: XLA's TPU compiler runs on any Linux machine.

It comes with the package `libtpu` (the extra `plan`). A topology is a generation and
its chips along each axis of the network, such as "v5e:2x4" or "v5p:8x8x16".
"""

import importlib.util
import math
import os
from collections.abc import Sequence
from typing import Any

import jax
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh

from effjax.core import errors
from effjax.parallel import mesh as mesh_lib
from effjax.parallel import rules
from effjax.parallel import spread as spread_lib

# What libtpu would ask a real machine for, and that several processes may load it.
_ENVIRONMENT = {
  "TPU_SKIP_MDS_QUERY": "1",
  "TPU_ACCELERATOR_TYPE": "v5litepod-16",
  "TPU_WORKER_HOSTNAMES": "localhost",
  "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
GENERATIONS = ("v4", "v5e", "v5p", "v6e")
# Products of two tensors are sent piece by piece while they are computed, and what is
# sent early is written into fusions many times: faster, but nothing can be counted.
COUNTABLE = {
  "xla_jf_spmd_threshold_for_windowed_einsum_mib": 1_000_000,
  "xla_tpu_enable_async_collective_fusion": False,
}


def devices(name: str) -> list[Any]:
  """Descriptions of a topology's chips, for shardings that are only compiled for.

  Args:
    name: such as "v5e:2x4".

  Raises:
    InputError: libtpu is not installed, or knows no such topology.
  """
  if importlib.util.find_spec("libtpu") is None:
    raise errors.InputError(
      "compiling for TPUs needs the package libtpu: pip install 'effjax[plan]'"
    )
  generation, _, shape = name.partition(":")
  if generation not in GENERATIONS:
    raise errors.unknown("TPU generation", generation, GENERATIONS)
  for key, value in _ENVIRONMENT.items():
    os.environ.setdefault(key, value)
  try:
    return list(topologies.get_topology_desc(name, platform="tpu").devices)
  except RuntimeError as error:
    reason = " ".join(str(error).split())[:120]
    raise errors.InputError(
      f"libtpu knows no topology {name!r} ({reason}); {generation} has chips along "
      f"{'two axes, like 4x4' if generation in ('v5e', 'v6e') else 'three, like 2x2x4'}"
    ) from None


def compiled(lowered: jax.stages.Lowered, countable: bool = False) -> Any:
  """A program for the chips of a topology.

  It is not kept in the compilation cache: JAX cannot read such programs back.

  Args:
    lowered: for shardings over `devices`.
    countable: compiles so that what is sent can be counted (see COUNTABLE).
  """
  least = "jax_persistent_cache_min_compile_time_secs"
  before = getattr(jax.config, least)
  jax.config.update(least, float("inf"))
  try:
    return lowered.compile(compiler_options=COUNTABLE if countable else None)
  finally:
    jax.config.update(least, before)


def spread(name: str, mesh_config: mesh_lib.MeshConfig) -> spread_lib.Spread:
  """The spread of a config over a topology's chips.

  Raises:
    InputError: see `devices` and mesh.sizes.
  """
  return over(devices(name), mesh_config)


def over(chips: Sequence[Any], mesh_config: mesh_lib.MeshConfig) -> spread_lib.Spread:
  """The spread of a config over chips of one topology; see `spread`."""
  sizes = mesh_lib.sizes(mesh_config, len(chips))
  chips = chips[: math.prod(sizes)]
  axis_types = (AxisType.Auto,) * len(rules.AXES)
  mesh = Mesh(mesh_lib.grid(chips, sizes), rules.AXES, axis_types=axis_types)
  return spread_lib.Spread(mesh, mesh_config)
