"""Exported files run in llama.cpp, come back bit for bit, or are refused by name."""

import jax
import numpy as np
import pytest

from effjax.compress import registry as transforms
from effjax.core import errors, registry
from effjax.data import tokenizers
from effjax.interop.gguf import export, keys, model, reader, rotary
from tests.interop.gguf import llama_cpp, tiny

# ggml looks GELU up in a table of float16.
_TOLERANCE = {"gpt2": 2e-3}
_MARGIN = 1e-3


@pytest.fixture(scope="module")
def files(tmp_path_factory):
  """Exports a tiny model in float32, once each: path, model, parameters."""
  made = {}

  def get(name):
    if name not in made:
      path = tmp_path_factory.mktemp("gguf") / f"{name}.gguf"
      made[name] = (path, *tiny.saved(path, name))
    return made[name]

  return get


def test_every_architecture_is_tested():
  known = set(registry.names(keys.ARCHITECTURES))
  assert {tiny.architecture(name) for name in tiny.MODELS} == known


@pytest.mark.oracle
@pytest.mark.parametrize("name", tiny.MODELS)
def test_logits_equal_those_of_llama_cpp(name, files):
  path, ours, params = files(name)
  ids = tiny.tokens()
  expected = tiny.logits(ours, params, ids)
  with llama_cpp.Model(path) as theirs:
    difference = np.abs(theirs.logits(ids) - expected).max()
  assert difference <= _TOLERANCE.get(name, 2e-5) * expected.std()


@pytest.mark.oracle
@pytest.mark.parametrize("name", tiny.MODELS)
def test_greedy_tokens_equal_those_of_llama_cpp(name, files):
  path, ours, params = files(name)
  ids = tiny.tokens(6)
  with llama_cpp.Model(path) as theirs:
    found = theirs.greedy(ids, 16)
  logits = tiny.logits(ours, params, ids + found)[len(ids) - 1 : -1]
  second, best = np.sort(logits, axis=-1)[:, -2:].T
  clear = best - second > max(_MARGIN, 10 * _TOLERANCE.get(name, 0))
  assert clear.mean() > 0.5
  np.testing.assert_array_equal(logits.argmax(-1)[clear], np.array(found)[clear])


@pytest.mark.parametrize("name", tiny.MODELS)
def test_a_file_comes_back_bit_for_bit(name, files, tmp_path):
  path, _, params = files(name)
  opened = model.open_gguf(path)
  loaded = opened.load(np.float32)
  out = tmp_path / path.name
  notes = export.save(
    out,
    opened.model,
    loaded,
    opened.specs,
    opened.tokenizer,
    type="F32",
    architecture=tiny.architecture(name),
  )
  assert notes == []
  assert out.read_bytes() == path.read_bytes()
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), loaded, params)


@pytest.mark.parametrize("name", tiny.MODELS)
def test_the_first_architecture_that_fits_is_found(name):
  config = tiny.build(name)[0].config
  # llama has everything that qwen2 has.
  expected = "llama" if name == "qwen2" else tiny.architecture(name)
  assert keys.fitting(config).model_type == expected


@pytest.mark.oracle
@pytest.mark.parametrize("type", export.TYPES)
def test_quantized_files_run_in_llama_cpp(type, tmp_path):
  path = tmp_path / "model.gguf"
  tiny.saved(path, "llama", type, embed_dim=256)
  types = {t.name: t.type for t in reader.open_file(path).tensors.values()}
  assert types["token_embd.weight"] == types["blk.0.attn_q.weight"] == type
  assert types["output_norm.weight"] == types["blk.1.ffn_norm.weight"] == "F32"
  opened = model.open_gguf(path)
  ids = tiny.tokens()
  ours = tiny.logits(opened.model, opened.load(np.float32), ids)
  with llama_cpp.Model(path) as theirs:
    difference = np.abs(theirs.logits(ids) - ours).max()
  assert difference <= 0.2 * ours.std()


@pytest.mark.oracle
@pytest.mark.parametrize("name", ["llama-experts", "mamba", "mamba2", "gpt2"])
def test_other_architectures_run_quantized(name, tmp_path):
  path = tmp_path / "model.gguf"
  # All experts for every token: which are chosen may hang on rounded activations.
  experts = {"num_experts": 4, "top_k": 4, "hidden_dim": 96}
  changes = {"mlp_options": {"moe": experts}} if name == "llama-experts" else {}
  tiny.saved(path, name, "Q8_0", **changes)
  opened = model.open_gguf(path)
  ids = tiny.tokens()
  ours = tiny.logits(opened.model, opened.load(np.float32), ids)
  with llama_cpp.Model(path) as theirs:
    difference = np.abs(theirs.logits(ids) - ours).max()
  assert difference <= 0.2 * ours.std()


@pytest.mark.parametrize(
  ("name", "shape", "type", "found"),
  [
    ("blk.0.ffn_up.weight", (8, 256), "Q4_K", "Q4_K"),
    ("blk.0.ffn_up.weight", (8, 96), "Q4_K", "Q5_0"),
    ("blk.0.ffn_up.weight", (8, 96), "Q5_K", "Q5_1"),
    ("blk.0.ffn_up.weight", (8, 96), "Q6_K", "Q8_0"),
    ("blk.0.ffn_up.weight", (8, 80), "Q6_K", "F16"),
    ("blk.0.ffn_up.weight", (8, 80), "Q4_0", "F16"),
    ("blk.0.ffn_up.weight", (8, 80), "BF16", "BF16"),
    ("blk.0.ffn_up_exps.weight", (4, 8, 32), "Q4_1", "Q4_1"),
    ("blk.0.ffn_gate_inp.weight", (4, 256), "Q4_0", "F32"),
    ("blk.0.attn_q.bias", (256,), "F16", "F32"),
    ("blk.0.ssm_norm.weight", (2, 256), "Q8_0", "F32"),
    ("blk.0.ssm_conv1d.weight", (256, 4), "F16", "F32"),
    ("blk.0.ssm_a", (256, 32), "Q8_0", "F32"),
    ("blk.0.ssm_in.weight", (256, 32), "Q8_0", "Q8_0"),
    ("position_embd.weight", (64, 256), "Q4_0", "F32"),
  ],
)
def test_types_are_those_of_llama_cpp(name, shape, type, found):
  assert export.tensor_type(name, shape, type) == found


def test_other_types_are_noted(tmp_path):
  made = tiny.build("llama")
  notes = export.save(tmp_path / "a.gguf", *made, type="Q4_K")
  assert len(notes) == 2
  assert notes[0].startswith(
    "Q5_0 in place of Q4_K, as rows of 64 are not whole blocks"
  )
  assert notes[1].endswith("blk.0.ffn_down.weight, blk.1.ffn_down.weight")


def test_notes_on_the_tokenizer_are_passed_on(tmp_path):
  ours = tokenizers.train(["a bc.def(g) h.ij\n  k.lm(n)\n"] * 9, 270)
  made = tiny.build("llama", vocab_size=280)
  (note,) = export.save(tmp_path / "a.gguf", *made, ours)
  assert note.startswith("no tokenizer is in the file")
  assert model.open_gguf(tmp_path / "a.gguf").tokenizer is None


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"logit_cap": 30.0}, "nearest is llama, which loses .*logit_cap: 30.0 -> None"),
    ({"norm": "layer"}, "which loses .*norm: 'layer' -> 'rms'"),
    ({"mixer_options": tiny.attention(window=4)}, "which loses .*window: 4 -> None"),
    ({"mixer_options": tiny.scaled("ntk")}, "which loses .*rope scaling.* 'ntk'"),
    (
      {"mixer_options": tiny.scaled("yarn", original_max_len=32, beta_fast=16.0)},
      "which loses .*beta_fast: 16.0 -> 32.0",
    ),
    ({"pattern": ("attention", "mamba2")}, "no architecture of llama.cpp"),
    ({"mlp": "gelu", "mlp_options": {}}, "which loses .*mlp"),
  ],
)
def test_what_no_architecture_can_say_is_named(changes, message):
  config = tiny.build("llama", **changes)[0].config
  with pytest.raises(errors.InputError, match=message) as raised:
    keys.fitting(config)
  assert "\n" not in str(raised.value)


def test_mamba_has_one_expansion():
  options = {"mamba1": {"inner_dim": 96}}
  config = tiny.build("mamba", mixer_options=options)[0].config
  with pytest.raises(errors.InputError, match="2 x 64 inner channels, not 96"):
    keys.fitting(config)


def test_compressed_weights_need_dense(tmp_path):
  ours, params, specs = tiny.build("llama")
  params = transforms.find("rtn")(params, specs, where=None, options={"bits": 2})
  with pytest.raises(errors.InputError, match="--dense"):
    export.save(tmp_path / "a.gguf", ours, params, specs)
  export.save(tmp_path / "a.gguf", ours, params, specs, dense=True)
  assert model.open_gguf(tmp_path / "a.gguf").model.config.num_layers == 2


def test_adapters_need_a_merge_or_dense(tmp_path):
  ours, params, specs = tiny.build("llama")
  params = transforms.find("lora")(params, specs, options={"rank": 2})
  with pytest.raises(errors.InputError, match="has adapters.*merge_lora") as raised:
    export.save(tmp_path / "a.gguf", ours, params, specs)
  assert "\n" not in str(raised.value)
  merged = transforms.find("merge_lora")(params, specs)
  export.save(tmp_path / "merged.gguf", ours, merged, specs)
  export.save(tmp_path / "dense.gguf", ours, params, specs, dense=True)
  # The general name in the file is that of the file.
  sizes = [len((tmp_path / f"{n}.gguf").read_bytes()) for n in ("merged", "dense")]
  assert abs(sizes[0] - sizes[1]) <= 32


def test_mistakes_leave_no_file(tmp_path):
  ours, params, specs = tiny.build("llama")
  path = tmp_path / "a.gguf"
  with pytest.raises(errors.InputError, match="'Q4'; did you mean"):
    export.save(path, ours, params, specs, type="Q4")
  params["embed"]["table"] = params["embed"]["table"].at[0, 0].set(1e6)
  with pytest.raises(errors.InputError, match="tensor token_embd.weight: F16 holds"):
    export.save(path, ours, params, specs)
  assert list(tmp_path.iterdir()) == []
  export.save(path, ours, params, specs, type="F32")
  with pytest.raises(errors.InputError, match="exists already"):
    export.save(path, ours, params, specs, type="F32")


def test_llama_3_scaling_is_found_in_its_factors():
  scaling = {"kind": "llama3", "factor": 8.0, "original_max_len": 8192}
  scaling |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
  options = {"head_dim": 128, "rope_theta": 500_000.0, "rope_scaling": scaling}
  factors = rotary.tensors(options)[rotary.FACTORS]
  assert (factors[0], factors[-1]) == (1, 8)
  assert rotary.fit(factors, 500_000.0, None) == [8.0, 8192, 1.0, 4.0]
  odd = options | {"rope_scaling": scaling | {"original_max_len": 5000}}
  factors = rotary.tensors(odd)[rotary.FACTORS]
  assert rotary.fit(factors, 500_000.0, None) == [8.0, 5000, 1.0, 4.0]
  assert rotary.fit(np.ones(64, np.float32), 500_000.0, None) is None


@pytest.mark.parametrize("change", [0.5, 1.01, np.nan, -1.0])
def test_other_factors_are_refused(change):
  scaling = {"kind": "llama3", "factor": 8.0, "original_max_len": 8192}
  scaling |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
  options = {"head_dim": 128, "rope_theta": 500_000.0, "rope_scaling": scaling}
  factors = rotary.tensors(options)[rotary.FACTORS].copy()
  factors[3] *= change
  with pytest.raises(errors.InputError, match="Llama 3's scaling"):
    rotary.fit(factors, 500_000.0, None)
