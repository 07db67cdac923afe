import json

import jax
import jax.numpy as jnp
import pytest

from effjax.core import tree as tree_lib
from effjax.data import tokenizers
from effjax.measure import config as config_lib
from effjax.measure import rows, tasks
from effjax.weights.leaves import masked

FIELDS = {
  "stage", "technique", "after", "quality", "num_params", "num_nonzero",
  "bits_per_weight", "bytes_held", "bytes_on_disk", "flops_per_token",
  "flops_executed_per_token", "prefill_ms", "decode_ms_p50", "decode_ms_p90",
  "tokens_per_sec", "peak_memory_bytes", "stage_secs", "simulated", "batch",
  "prompt_tokens", "decode_tokens", "device", "seed", "corpus",
}  # fmt: skip


@pytest.fixture(scope="module")
def config():
  # The shapes of test_latency and test_quality: their programs are compiled once.
  return config_lib.MeasureConfig(
    prompt_tokens=8, decode_tokens=6, warmup_tokens=1, eval_batch_size=2
  )


def _stage(name, num_weights, **kwargs):
  return rows.Stage(
    name=name,
    technique="train",
    after=None,
    num_weights=num_weights,
    seed=0,
    corpus="stdlib sha256:0123",
    stage_secs=1.5,
    peak_memory_bytes=1 << 20,
    **kwargs,
  )


def test_row_has_every_field_and_is_json(model, params, text, config):
  num_weights = sum(a.size for a in jax.tree.leaves(params))
  row = rows.measure_stage(model, params, text, config, _stage("train", num_weights))
  assert row.keys() == FIELDS
  assert json.loads(json.dumps(row, allow_nan=False)) == row
  assert row["num_params"] == num_weights
  assert row["bits_per_weight"] == 32
  assert row["bytes_held"] == 4 * num_weights < row["bytes_on_disk"]
  assert row["simulated"] == []
  assert row["flops_per_token"] == row["flops_executed_per_token"] > 0


def test_masks_cost_bytes_and_save_nothing(model, params, text):
  config = config_lib.MeasureConfig(prompt_tokens=8, latency=False, eval_batch_size=2)
  flat = dict(tree_lib.flatten(params))
  num_weights = sum(a.size for a in flat.values())
  path = next(p for p in flat if p.endswith("mlp/up"))
  size = flat[path].size
  mask = jnp.zeros(flat[path].shape, bool).at[..., ::2].set(True)
  flat[path] = masked.Masked.create(flat[path], mask)
  row = rows.measure_stage(
    model, tree_lib.unflatten(flat), text, config, _stage("pruned", num_weights)
  )
  assert row["simulated"] == ["bytes", "flops"]
  assert row["bits_per_weight"] > 32
  assert row["flops_per_token"] < row["flops_executed_per_token"]
  assert row["num_params"] - row["num_nonzero"] >= size // 2
  assert row["prefill_ms"] is row["decode_ms_p50"] is row["tokens_per_sec"] is None


def test_simulation_that_no_leaf_kind_shows_is_declared(model, params, text):
  config = config_lib.MeasureConfig(prompt_tokens=8, latency=False, eval_batch_size=2)
  stage = _stage("rounded", 1, simulated=("bytes",))
  row = rows.measure_stage(model, params, text, config, stage)
  assert row["simulated"] == ["bytes"]


class Questions(tasks.Questions):
  """A task whose answers are made up."""

  def quality(self, model, params, batch_size):
    return {"task": "made up", "accuracy": 0.5, "batch_size": batch_size}


def test_a_task_stands_beside_the_text(model, params, text):
  config = config_lib.MeasureConfig(prompt_tokens=8, latency=False, eval_batch_size=2)
  asked = Questions(task="r8", tokenizer=tokenizers.byte_tokenizer())
  found = rows.measure_quality(model, params, text, asked, 2)
  assert (found["accuracy"], found["batch_size"]) == (0.5, 2)
  assert found["bits_per_byte"] > 0
  assert rows.measure_quality(model, params, None, None, 2) == {}
  row = rows.measure_stage(model, params, None, config, _stage("t", 9))
  assert row["quality"] is None
