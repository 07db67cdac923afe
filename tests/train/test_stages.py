"""Stage folders: every leaf kind and nesting, any mesh, and files that were changed."""

import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.core import errors, specs, tree
from effjax.data import tokenizers
from effjax.models import config as model_config
from effjax.models import decoder, encoder, encoder_config
from effjax.parallel import spread as spread_lib
from effjax.train import checkpoint, stages
from effjax.weights.leaves import masked, quantized


def _codes(key, shape, *, bits=8, groups=1, zero=False):
  low, high = (0, 2**bits) if zero else (-(2 ** (bits - 1)) + 1, 2 ** (bits - 1))
  grid = (*shape[:-2], groups, shape[-1])
  scale = jax.random.uniform(key, grid, minval=0.01, maxval=0.1)
  zeros = jnp.ones(grid) if zero else None
  codes = jax.random.randint(key, shape, low, high)
  return quantized.Quantized.create(codes, scale, zeros, bits=bits)


def _mixed(params):
  """Every leaf kind and nesting, spread over the matrices of a tree."""
  mask = lambda key, shape: jax.random.bernoulli(key, 0.5, shape)
  makers = (
    lambda key, leaf: _codes(key, leaf.shape),
    lambda key, leaf: _codes(key, leaf.shape, bits=4, groups=4),
    lambda key, leaf: _codes(key, leaf.shape, groups=2, zero=True),
    lambda key, leaf: masked.Masked.create(leaf, mask(key, leaf.shape)),
    lambda key, leaf: masked.Masked.create(
      _codes(key, leaf.shape, bits=4), mask(key, leaf.shape)
    ),
  )
  flat, count = tree.flatten(params), 0
  for path, leaf in flat.items():
    if leaf.ndim == 3:
      flat[path] = makers[count % len(makers)](jax.random.key(count), leaf)
      count += 1
  assert count > len(makers)
  return tree.unflatten(flat)


@pytest.fixture(scope="module")
def stage(tmp_path_factory):
  config = model_config.DecoderConfig(
    vocab_size=256, embed_dim=16, num_layers=2, pattern=("attention",)
  )
  model = decoder.Decoder(config)
  tree_specs = specs.specs(model)
  draw = lambda spec: jnp.asarray(np.random.default_rng(0).normal(size=spec.shape))
  params = _mixed(jax.tree.map(draw, tree_specs))
  path = tmp_path_factory.mktemp("stages") / "0-train"
  tokenizer = tokenizers.byte_tokenizer()
  stages.save_stage(path, model, params, tree_specs, tokenizer)
  return path, stages.Stage(model, params, tree_specs, tokenizer)


def _same(a, b):
  assert jax.tree.structure(a) == jax.tree.structure(b)
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
    assert x.dtype == y.dtype
    np.testing.assert_array_equal(x, y)


def test_round_trip(stage):
  path, saved = stage
  names = {p.name for p in path.iterdir()}
  assert names == {"model.json", "tree.json", "params", "tokenizer.json"}
  loaded = stages.load_stage(path)
  _same(loaded.params, saved.params)
  assert loaded.model == saved.model and loaded.specs == saved.specs
  text = "déjà vu\n"
  assert loaded.tokenizer.encode(text) == saved.tokenizer.encode(text)


@pytest.mark.parametrize("head", [{}, {"num_classes": 3}, {"pooling": "mean"}])
def test_an_encoder_comes_back_equal(tmp_path, head):
  options = {"attention": {"num_heads": 2, "head_dim": 8}}
  config = encoder_config.EncoderConfig(
    vocab_size=32,
    embed_dim=16,
    num_layers=4,
    share=2,
    embedding_dim=8,
    mixer_options=options,
    max_len=16,
    **head,
  )
  model = encoder.Encoder(config)
  tree_specs = specs.specs(model)
  draw = lambda spec: jnp.asarray(np.random.default_rng(0).normal(size=spec.shape))
  params = jax.tree.map(draw, tree_specs)
  stages.save_stage(tmp_path / "0-train", model, params, tree_specs)
  about = json.loads((tmp_path / "0-train" / "model.json").read_text())
  assert about["architecture"] == "encoder"
  loaded = stages.load_stage(tmp_path / "0-train")
  _same(loaded.params, params)
  assert loaded.model == model and loaded.specs == tree_specs
  assert loaded.tokenizer is None
  tokens_BL = jnp.arange(12, dtype=jnp.int32).reshape(2, 6)
  apply = lambda stage_model, p: stage_model.apply({"params": p}, tokens_BL)[0]
  np.testing.assert_array_equal(
    apply(loaded.model, loaded.params), apply(model, params)
  )


@pytest.mark.parametrize("preset", ["dp", "fsdp"])
def test_onto_a_mesh(stage, preset):
  path, saved = stage
  params = stages.load_stage(path, spread_lib.over(preset)).params
  _same(params, saved.params)
  arrays = jax.tree.leaves(params)
  assert all(len(a.sharding.device_set) == 8 for a in arrays)
  assert any(not a.sharding.is_fully_replicated for a in arrays) == (preset == "fsdp")


def _edited(stage, tmp_path, name, edit):
  """A copy of the folder with one JSON file changed in place by `edit`."""
  path = tmp_path / "stage"
  shutil.copytree(stage[0], path)
  value = json.loads((path / name).read_text())
  edit(value)
  (path / name).write_text(json.dumps(value))
  return path


def _edit_leaf(kind, change):
  """Changes the description of the first parameter of a kind."""

  def edit(value):
    entries = value["params"].values()
    change(next(e["leaf"] for e in entries if e["leaf"]["kind"] == kind))

  return edit


def _bits_to_seven(leaf):
  leaf["data"]["codes"]["shape"][-1] = 7


EDITS = {
  "another shape": (
    "tree.json",
    lambda v: v["params"]["embed/table"]["leaf"].update(shape=[256, 17]),
    "embed/table has shape",
  ),
  "another dtype": (
    "tree.json",
    lambda v: v["params"]["embed/table"]["leaf"].update(dtype="bfloat16"),
    "embed/table is stored as",
  ),
  "unknown kind": (
    "tree.json",
    _edit_leaf("quantized", lambda leaf: leaf.update(kind="quantised")),
    "did you mean 'quantized'",
  ),
  "newer version": (
    "tree.json",
    _edit_leaf("masked", lambda leaf: leaf.update(version=99)),
    "version 99",
  ),
  "missing field": (
    "tree.json",
    _edit_leaf("quantized", lambda leaf: leaf["static"].pop("bits")),
    "static fields",
  ),
  "inner shape": (
    "tree.json",
    _edit_leaf("quantized", _bits_to_seven),
    "run_0/layer_0",
  ),
  "missing parameter": (
    "tree.json",
    lambda v: v["params"].pop("final_norm/scale"),
    "final_norm/scale",
  ),
  "unknown spec field": (
    "tree.json",
    lambda v: v["params"]["embed/table"]["spec"].update(colour=1),
    "colour",
  ),
  "no table": ("tree.json", lambda v: v.pop("params"), "params"),
  "newer format": ("tree.json", lambda v: v.update(format=2), "format 2"),
  "unknown architecture": (
    "model.json",
    lambda v: v.update(architecture="vision"),
    "architecture 'vision' is unknown; available: decoder, encoder",
  ),
  "another architecture": (
    "model.json",
    lambda v: v.update(architecture="encoder"),
    "unknown field of model",
  ),
  "unknown model field": (
    "model.json",
    lambda v: v["config"].update(num_layer=1),
    "did you mean 'num_layers'",
  ),
}


@pytest.mark.parametrize("case", EDITS)
def test_what_was_changed_is_named(stage, tmp_path, case):
  name, edit, message = EDITS[case]
  path = _edited(stage, tmp_path, name, edit)
  with pytest.raises(errors.InputError, match=message) as error:
    stages.load_stage(path)
  assert "\n" not in str(error.value) and str(path) in str(error.value)


def test_damaged_files(stage, tmp_path):
  with pytest.raises(errors.InputError, match="no stage folder"):
    stages.load_stage(tmp_path / "nothing")
  path = tmp_path / "stage"
  shutil.copytree(stage[0], path)
  text = (path / "tree.json").read_text()
  (path / "tree.json").write_text(text[:100])
  with pytest.raises(errors.InputError, match=r"tree\.json cannot be read"):
    stages.load_stage(path)
  (path / "tree.json").write_text(text)
  for file in [file for file in (path / "params").rglob("*") if file.is_file()]:
    whole = file.read_bytes()
    file.write_bytes(whole[:-1])
    with pytest.raises(errors.InputError, match=rf"params cannot be read.*{file.name}"):
      stages.load_stage(path)
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(errors.InputError, match="was changed"):
      stages.load_stage(path)
    file.write_bytes(whole)
  stages.load_stage(path)
  (path / "params" / "manifest.ocdbt").unlink()
  with pytest.raises(errors.InputError, match=r"manifest\.ocdbt is missing"):
    stages.load_stage(path)


def test_a_full_disk_leaves_nothing(stage, tmp_path, monkeypatch):
  def full(*args, **kwargs):
    raise OSError(28, "No space left on device")

  monkeypatch.setattr(stages.ocp.StandardCheckpointer, "save", full)
  path = tmp_path / "1-int8"
  saved = stage[1]
  with pytest.raises(OSError, match="No space left"):
    stages.save_stage(path, saved.model, saved.params, saved.specs)
  assert list(tmp_path.iterdir()) == []


def test_an_existing_stage_is_never_overwritten(stage):
  path, saved = stage
  with pytest.raises(FileExistsError):
    stages.save_stage(path, saved.model, saved.params, saved.specs)


def test_disk_full_is_recognized_however_it_is_said():
  for error in (OSError(28, "x"), ValueError("a: No space left on device [b]")):
    with pytest.raises(OSError, match="/folder"):
      with checkpoint.disk_full_named(pathlib.Path("/folder")):
        raise error
  with pytest.raises(ValueError, match="other"):
    with checkpoint.disk_full_named(pathlib.Path("/folder")):
      raise ValueError("other")
