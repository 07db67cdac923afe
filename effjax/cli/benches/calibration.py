"""Step times that plans predict for published runs, over those that were measured.

MaxText's configs for slices of v5e and v5p are compiled with their sizes, sharding and
recomputation (effjax.measure.pods.published) and read like any plan. `ratio` is
measured over predicted. What plans correct with is this table, kept as data:

  effjax bench calibration --json > effjax/measure/pods/calibration.json
"""

import dataclasses
from typing import Any

from effjax.cli import timing
from effjax.measure.pods import (
  chips,
  closed_form,
  compiled,
  laid,
  links,
  published,
  roofline,
  traced,
)
from effjax.parallel import hlo, topology
from effjax.parallel import mesh as mesh_lib
from effjax.parallel import spread as spread_lib
from effjax.train import lowering


def bench(quick: bool = False) -> timing.Table:
  """Compiles six published configs, about a minute each, or finds them compiled.

  Args:
    quick: two layers of the first one, to see that it works.

  Raises:
    InputError: libtpu is not installed.
  """
  compiled.forget_locations()
  runs = published.RUNS
  if quick:
    small = {"num_layers": 2, "width": 512, "hidden_dim": 1024, "num_heads": 4}
    runs = (dataclasses.replace(runs[0], topology="v5e:2x2", **small),)
  rows = [_row(run) for run in runs]
  return timing.Table(
    title="published MaxText runs, as predicted and as measured",
    rows=rows,
    notes=[
      "predicted: each instruction the longer of FLOPs and bytes at peak rates, then "
      "collectives, none hidden; best: all of a loop body's hidden behind it",
      "ratio: measured / predicted, best_ratio: measured / best",
      "closed: in closed form, against predicted_secs and hbm_gb",
      "32B on v5p-128: of 6 sequences a chip, as the 7 of the published run need 1.6 "
      "GiB more than there are in this program; time per token is compared",
      "measured: MaxText's FLOPs (attention as if nothing was masked) over the "
      "TFLOP/s of its README",
    ],
  )


def _row(run: published.Run) -> dict[str, Any]:
  spread = topology.spread(run.topology, run.mesh())
  slice_ = chips.parse(run.topology)
  steps = lowering.Steps(
    training=lowering.of_model(run.model()),
    config=run.training(),
    batch_size=run.rows * spread.mesh.size,
    length=published.LENGTH,
  )
  program = compiled.compiled(steps.lower(spread), run.topology)
  wiring = links.of_mesh(slice_, spread.mesh)
  cost = roofline.of(hlo.read(program.text), wiring)
  closed = _closed_form(steps, spread, slice_)
  return {
    "run": run.name,
    "topology": run.topology,
    "batch_per_chip": run.rows,
    "remat": run.remat,
    "tensor": run.tensor,
    "hbm_gb": program.peak_bytes / 1e9,
    "compute_secs": cost.compute_secs,
    "hbm_secs": cost.hbm_secs,
    "ici_secs": cost.ici_secs,
    "predicted_secs": cost.step_secs,
    "best_secs": cost.best_secs,
    "measured_secs": run.secs,
    "ratio": run.secs / cost.step_secs,
    "best_ratio": run.secs / cost.best_secs,
    "closed_secs": closed.chip_secs + closed.ici_secs,
    "closed_hbm_gb": closed.hbm_bytes / 1e9,
  }


def _closed_form(
  steps: lowering.Steps, spread: spread_lib.Spread, slice_: chips.Slice
) -> closed_form.Estimate:
  """The same step without compiling it."""
  one = topology.spread(slice_.name, mesh_lib.MeshConfig(num_devices=1))
  facts = traced.facts(steps, one, model_flops=0.0)
  lies = laid.Laid(facts, spread)
  return closed_form.Estimate(laid=lies, facts=facts, micro_batches=1, slice=slice_)


TECHNIQUE = bench
