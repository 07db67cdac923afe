"""The Python interface, on a finished run."""

import json
import subprocess
import sys

import jax
import numpy as np
import pytest

import effjax
from effjax.core import errors, tree
from effjax.weights.leaves import masked, quantized


@pytest.fixture(scope="module")
def run(command, finished):
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv("EFFJAX_CACHE", str(command.folder / "cache"))
    yield effjax.load(finished, "train")


def test_transform_then_evaluate_equals_the_stage(run, finished):
  params = effjax.transform(
    "rtn", run.params, run.specs, options={"bits": 8, "activations": "int8"}
  )
  rows = json.loads((finished / "result.json").read_text())["stages"]
  assert effjax.evaluate(run)["loss"] == pytest.approx(rows[0]["quality"]["loss"])
  found = effjax.evaluate(run, params)
  assert found == pytest.approx(rows[1]["quality"], rel=1e-5)
  row = effjax.measure(run, params, name="mine")
  assert row.keys() == rows[1].keys()
  for name in ("bytes_held", "bytes_on_disk", "bits_per_weight", "num_nonzero"):
    assert row[name] == rows[1][name]
  assert (row["stage"], row["after"]) == ("mine", "train")


def test_loaded_leaves_are_what_the_stages_made(finished):
  flat = tree.flatten(effjax.load(finished, "int8").params)
  kinds = {type(leaf) for leaf in flat.values()}
  assert quantized.Quantized in kinds
  flat = tree.flatten(effjax.load(finished).params)
  nested = [x for x in flat.values() if isinstance(x, masked.Masked)]
  assert nested
  assert all(isinstance(x.values, quantized.Quantized) for x in nested)


def test_where_and_specs(run):
  specs = effjax.specs(run.model)
  assert tree.flatten(specs) == tree.flatten(run.specs)
  params = effjax.transform(
    "rtn", run.params, specs, where={"path": "mlp/up"}, options={"bits": 4}
  )
  changed = [
    path
    for path, leaf in tree.flatten(params).items()
    if isinstance(leaf, quantized.Quantized)
  ]
  assert changed == ["run_0/layer_0/mlp/up"]


def test_calibrate(run):
  batches = [next(run.data().train_iterator())]
  stats = tree.flatten(effjax.calibrate(run.model, run.params, batches))
  assert stats["run_0/layer_0/mlp/up"].mean_square.shape == (1, 32)
  assert float(stats["run_0/layer_0/mlp/up"].count[0]) == 8 * 64


def test_generate(run):
  text = effjax.generate(run, "import ", max_tokens=5, temperature=0)
  assert text == effjax.generate(run, "import ", max_tokens=5, temperature=0)
  assert len(text) <= 5


def test_mistakes(run, finished):
  with pytest.raises(errors.InputError, match="did you mean 'rtn'"):
    effjax.transform("rtnn", run.params, run.specs)
  with pytest.raises(errors.InputError, match="did you mean 'tuned'"):
    effjax.load(finished, "tuend")
  with pytest.raises(errors.InputError, match="not a run folder"):
    effjax.load(finished / "stages")


def test_names_are_lazy_and_measure_is_both(tmp_path):
  code = (
    "import sys, effjax\n"
    "assert not {'jax', 'flax'} & set(sys.modules)\n"
    "assert set(effjax.__all__) <= set(dir(effjax))\n"
    "from effjax.measure import config\n"
    "assert callable(effjax.measure) and effjax.measure.config is config\n"
    "assert effjax.load.__module__ == 'effjax.recipe.api'\n"
  )
  done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
  assert done.returncode == 0, done.stderr


def test_params_are_plain_arrays_on_one_device(run):
  arrays = jax.tree.leaves(run.params)
  assert all(isinstance(a, jax.Array) and len(a.devices()) == 1 for a in arrays)
  assert all(np.isfinite(np.asarray(a)).all() for a in arrays)
