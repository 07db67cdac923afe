"""Quantized tensors that come in as leaves and leave again with the same bits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.compress import registry as transforms
from effjax.core import errors
from effjax.core import layers as core_layers
from effjax.core import specs as specs_lib
from effjax.core import tree as tree_lib
from effjax.interop import sources
from effjax.interop.gguf import encode, export, leaves, model, reader, writer
from effjax.models import config, decoder
from tests.interop.gguf import tiny

_WIDE = {"mlp_options": {"swiglu": {"hidden_dim": 256}}}
_WIDE["mixer_options"] = tiny.attention(head_dim=64)
TOKENS_BL = np.random.default_rng(0).integers(0, 96, (2, 11)).astype(np.int32)


@pytest.fixture(scope="module")
def made():
  """A tiny random decoder."""
  cfg = config.DecoderConfig(
    vocab_size=96,
    embed_dim=64,
    num_layers=3,
    mixer_options={"attention": {"num_heads": 4, "num_kv_heads": 2, "head_dim": 16}},
    mlp_options={"swiglu": {"hidden_dim": 96}},
    max_len=64,
  )
  built = decoder.Decoder(cfg)
  params = built.init(jax.random.key(0), *built.example_inputs())["params"]
  return built, params, specs_lib.specs(built)


def _logits(opened, params):
  tokens_BL = jnp.asarray(TOKENS_BL)
  return np.asarray(jax.jit(opened.model.apply)({"params": params}, tokens_BL)[0])


def _structure(tree):
  return jax.tree.map(lambda a: (tuple(a.shape), jnp.dtype(a.dtype).name), tree)


@pytest.mark.parametrize("type", ["Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"])
def test_leaves_have_the_bits_of_the_file(type, made, tmp_path):
  export.save(tmp_path / "a.gguf", *made, type=type)
  kept = model.open_gguf(tmp_path / "a.gguf", keep_quantized=True)
  params = kept.load()
  flat = tree_lib.flatten(params)
  assert leaves.type_of(flat["embed/table"]) == type
  assert leaves.type_of(flat["run_0/layer_0/mixer/q"]) == type
  assert _structure(params) == _structure(kept.abstract("float32"))
  decoded = model.open_gguf(tmp_path / "a.gguf")
  np.testing.assert_allclose(
    _logits(kept, params), _logits(decoded, decoded.load()), atol=1e-4
  )
  notes = export.save(tmp_path / "b.gguf", kept.model, params, kept.specs, type="F32")
  assert f"bit for bit: 22 {type}" in notes[0]
  before, after = (reader.open_file(tmp_path / f"{n}.gguf") for n in "ab")
  assert before.tensors.keys() == after.tensors.keys()
  for name, info in before.tensors.items():
    assert after.tensors[name].type == info.type
    np.testing.assert_array_equal(after.raw(name), before.raw(name), name)


def test_layers_of_other_types_are_scanned_apart(made, tmp_path):
  export.save(tmp_path / "a.gguf", *made, type="Q8_0")
  file = reader.open_file(tmp_path / "a.gguf")
  other = "blk.1.ffn_down.weight"
  tensors = []
  for name, info in file.tensors.items():
    raw, type = file.raw(name), info.type
    if name == other:
      values = np.random.default_rng(1).standard_normal(info.shape)
      raw, type = encode.encode(values.astype(np.float32), "Q4_1"), "Q4_1"
    tensors.append(writer.Tensor(name=name, type=type, shape=info.shape, raw=raw))
  writer.write(tmp_path / "mixed.gguf", file.values, tensors)
  opened = model.open_gguf(tmp_path / "mixed.gguf", keep_quantized=True)
  params = opened.load()
  assert [(run.period, run.repeats) for run in opened.model.runs] == [(1, 1)] * 3
  assert leaves.type_of(params["run_1"]["layer_0"]["mlp"]["down"]) == "Q4_1"
  assert leaves.type_of(params["run_0"]["layer_0"]["mlp"]["down"]) == "Q8_0"
  export.save(tmp_path / "again.gguf", opened.model, params, opened.specs)
  again = reader.open_file(tmp_path / "again.gguf")
  for tensor in tensors:
    np.testing.assert_array_equal(again.raw(tensor.name), tensor.raw, tensor.name)


@pytest.mark.parametrize("variant", ["q8_0", "q4_0", "q5_1", "q4_k", "q6_k", "q3_k"])
def test_what_is_quantized_here_leaves_and_comes_back(variant, tmp_path):
  built, params, specs = tiny.build("llama", embed_dim=256, **_WIDE)
  quantized = transforms.find("rtn")(
    params,
    specs,
    where={"kind": ("matrix", "embedding")},
    options={"format": "gguf", "variant": variant},
  )
  path = tmp_path / "a.gguf"
  notes = export.save(path, built, quantized, specs, type="F32")
  assert notes == [
    f"quantized leaves written as they are, bit for bit: 15 {variant.upper()}"
  ]
  opened = model.open_gguf(path, keep_quantized=True)
  ours = core_layers.unstack(built, quantized)[1]
  theirs = core_layers.unstack(opened.model, opened.load())[1]
  assert jax.tree.structure(ours) == jax.tree.structure(theirs)
  for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
    np.testing.assert_array_equal(a, b)


def test_a_cut_file_is_named_when_it_is_read(made, tmp_path):
  path = tmp_path / "a.gguf"
  export.save(path, *made, type="Q8_0")
  opened = model.open_gguf(path, keep_quantized=True)
  path.write_bytes(path.read_bytes()[:5000])
  with pytest.raises(errors.InputError, match="is not whole any more"):
    opened.load()


def test_a_folder_has_nothing_to_keep(tmp_path):
  with pytest.raises(errors.InputError, match="leave out keep_quantized"):
    sources.open_source(tmp_path, keep_quantized=True)
