"""A recipe that prunes, packs and trains on: what the table says of its bytes."""

import json

import jax
import numpy as np
import pytest

import effjax
from effjax.core import tree
from effjax.recipe import runner
from effjax.weights import verbs
from effjax.weights.leaves import compressed

_CONFIG = '''"""Pruned and packed."""
import ml_collections


def get_config(arg=""):
  c = ml_collections.ConfigDict()
  c.data = {
    "corpus": "synthetic",
    "tokenizer": "bytes",
    "vocab_size": 257,
    "sequence_length": 32,
    "batch_size": 4,
    "eval_bytes": 500,
  }
  c.model = {
    "vocab_size": 257,
    "embed_dim": 64,
    "num_layers": 2,
    "mixer_options": {"attention": {"num_heads": 2, "head_dim": 32}},
    "max_len": 64,
  }
  c.measure = {"latency": False, "xz_preset": 0}
  c.mesh = {"num_devices": 1}
  train = {"num_steps": 2, "optimizer": {"name": "adamw", "learning_rate": 1e-3}}
  everything = {"kind": ("matrix", "embedding")}
  c.stages = (
    {"name": "train", "technique": "train", "options": train},
    {
      "name": "pruned",
      "technique": "magnitude",
      "where": everything,
      "options": {"sparsity": 0.8, "budget": "uniform"},
    },
    {"name": "packed", "technique": "pack"},
    {"name": "tuned", "technique": "train", "options": train},
    {
      "name": "int8",
      "technique": "rtn",
      "after": "pruned",
      "where": everything,
    },
    {"name": "int8-packed", "technique": "pack"},
  )
  return c
'''


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
  folder = tmp_path_factory.mktemp("packed")
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv("EFFJAX_CACHE", str(folder / "cache"))
    (folder / "recipe.py").write_text(_CONFIG)
    yield runner.run(str(folder / "recipe.py"), workdir=folder / "run")


@pytest.fixture(scope="module")
def rows(finished):
  stages = json.loads((finished / "result.json").read_text())["stages"]
  return {row["stage"]: row for row in stages}


def test_disk_and_memory_are_really_smaller(rows, finished):
  dense = rows["train"]["bytes_on_disk"]
  assert rows["pruned"]["bytes_on_disk"] > dense  # Masks come on top.
  assert rows["packed"]["bytes_on_disk"] < 0.3 * dense
  assert rows["packed"]["bytes_held"] < 0.3 * rows["train"]["bytes_held"]
  assert rows["int8-packed"]["bytes_on_disk"] < 0.15 * dense
  assert rows["pruned"]["simulated"] == ["bytes", "flops"]
  assert rows["packed"]["simulated"] == ["flops"]
  # Orbax's own files: each array has its place in an index, which weighs on such a
  # small model.
  assert _stored(finished, "packed") < 0.5 * _stored(finished, "train")


def _stored(finished, stage):
  (folder,) = (finished / "stages").glob(f"[0-9]-{stage}")
  return sum(f.stat().st_size for f in (folder / "params").rglob("*") if f.is_file())


def test_the_model_is_the_same(rows, finished):
  for pruned, packed in (("pruned", "packed"), ("int8", "int8-packed")):
    for name in ("quality", "num_nonzero", "num_params", "flops_per_token"):
      assert rows[pruned][name] == rows[packed][name]
    before, after = (_dense(finished, name) for name in (pruned, packed))
    assert before.keys() == after.keys()
    for path, w in after.items():
      np.testing.assert_array_equal(w, before[path])


def _dense(finished, stage):
  flat = tree.flatten(effjax.load(finished, stage).params)
  return {path: verbs.dense(leaf) for path, leaf in flat.items()}


def test_training_keeps_the_places(finished):
  packed, tuned = (effjax.load(finished, name).params for name in ("packed", "tuned"))
  assert jax.tree.structure(packed) == jax.tree.structure(tuned)
  tuned = tree.flatten(tuned)
  for path, leaf in tree.flatten(packed).items():
    if not isinstance(leaf, compressed.Compressed):
      continue
    np.testing.assert_array_equal(leaf.mask(), tuned[path].mask())
    assert np.any(np.asarray(leaf.values != tuned[path].values))
