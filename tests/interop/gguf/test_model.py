"""GGUF files that others wrote become the same models, or one clear line."""

import dataclasses

import numpy as np
import pytest

from effjax.core import errors
from effjax.interop import sources
from effjax.interop.gguf import encode, model, reader, writer
from effjax.interop.gguf.values import Value
from tests.interop.gguf import tiny

VOCAB, WIDTH, HEADS, KV_HEADS, HEAD = 48, 32, 4, 2, 8
_ATTENTION = {
  "hidden_size": WIDTH,
  "intermediate_size": 56,
  "num_hidden_layers": 2,
  "num_attention_heads": HEADS,
  "num_key_value_heads": KV_HEADS,
  "head_dim": HEAD,
  "max_position_embeddings": 64,
}
_STATES = {
  "hidden_size": WIDTH,
  "num_hidden_layers": 2,
  "num_heads": 4,
  "head_dim": 16,
  "state_size": 8,
  "n_groups": 2,
  "chunk_size": 4,
}
# Names of transformers and of GGUF.
_NAMES = {
  "model.embed_tokens": "token_embd",
  "backbone.embeddings": "token_embd",
  "model.norm": "output_norm",
  "backbone.norm_f": "output_norm",
  "lm_head": "output",
  "input_layernorm": "attn_norm",
  "post_attention_layernorm": "ffn_norm",
  "self_attn.q_proj": "attn_q",
  "self_attn.k_proj": "attn_k",
  "self_attn.v_proj": "attn_v",
  "self_attn.o_proj": "attn_output",
  "mlp.gate_proj": "ffn_gate",
  "mlp.up_proj": "ffn_up",
  "mlp.down_proj": "ffn_down",
  "norm": "attn_norm",
  "mixer.in_proj": "ssm_in",
  "mixer.out_proj": "ssm_out",
  "mixer.norm": "ssm_norm",
  "mixer.conv1d": "ssm_conv1d",
}
_MIXER = {"A_log": "ssm_a", "D": "ssm_d", "dt_bias": "ssm_dt.bias"}


def _foreign_name(name):
  parts = name.split(".")
  prefix = ""
  if parts[1] == "layers":
    prefix, parts = f"blk.{parts[2]}.", parts[3:]
  if parts[-1] in _MIXER:
    return prefix + _MIXER[parts[-1]]
  return f"{prefix}{_NAMES['.'.join(parts[:-1])]}.{parts[-1]}"


def _converted(name, values, kind):
  """What llama.cpp's converter makes of a tensor."""
  if kind == "llama" and name.endswith(("attn_q.weight", "attn_k.weight")):
    heads = HEADS if "attn_q" in name else KV_HEADS
    pairs = values.reshape(heads, 2, HEAD // 2, WIDTH).swapaxes(1, 2)
    return np.ascontiguousarray(pairs).reshape(values.shape)
  if name.endswith("ssm_a"):
    return -np.exp(values)[:, None]
  if name.endswith("ssm_d"):
    return values[:, None]
  if name.endswith("ssm_conv1d.weight"):
    return np.ascontiguousarray(values[:, 0])
  if name.endswith("ssm_norm.weight"):
    return values.reshape(_STATES["n_groups"], -1)
  return values


def _attention_keys(gguf_writer):
  gguf_writer.add_feed_forward_length(_ATTENTION["intermediate_size"])
  gguf_writer.add_head_count(HEADS)
  gguf_writer.add_head_count_kv(KV_HEADS)
  gguf_writer.add_rope_dimension_count(HEAD)
  gguf_writer.add_layer_norm_rms_eps(1e-6)


def _state_keys(gguf_writer):
  gguf_writer.add_ssm_conv_kernel(4)
  gguf_writer.add_ssm_inner_size(64)
  gguf_writer.add_ssm_state_size(_STATES["state_size"])
  gguf_writer.add_ssm_time_step_rank(_STATES["num_heads"])
  gguf_writer.add_ssm_group_count(_STATES["n_groups"])
  gguf_writer.add_layer_norm_rms_eps(1e-5)


@pytest.mark.oracle
@pytest.mark.parametrize(
  ("kind", "fields", "add_keys"),
  [
    ("llama", _ATTENTION, _attention_keys),
    ("qwen2", _ATTENTION, _attention_keys),
    ("mamba2", _STATES, _state_keys),
  ],
)
def test_a_converted_model_has_equal_logits(kind, fields, add_keys, tmp_path):
  transformers = pytest.importorskip("transformers")
  torch = pytest.importorskip("torch")
  gguf = pytest.importorskip("gguf")
  torch.manual_seed(0)
  config = transformers.AutoConfig.for_model(
    kind, vocab_size=VOCAB, bos_token_id=1, eos_token_id=2, pad_token_id=0, **fields
  )
  theirs = transformers.AutoModelForCausalLM.from_config(config).float().eval()
  gguf_writer = gguf.GGUFWriter(tmp_path / "model.gguf", kind)
  gguf_writer.add_context_length(64)
  gguf_writer.add_embedding_length(WIDTH)
  gguf_writer.add_block_count(2)
  add_keys(gguf_writer)
  for name, values in theirs.state_dict().items():
    if name == "lm_head.weight" and config.tie_word_embeddings:
      continue
    if values.ndim == 2 and not name.endswith("A_log"):
      torch.nn.init.normal_(values, std=0.15)
    foreign = _foreign_name(name)
    gguf_writer.add_tensor(foreign, _converted(foreign, values.numpy(), kind))
  gguf_writer.write_header_to_file()
  gguf_writer.write_kv_data_to_file()
  gguf_writer.write_tensors_to_file()
  gguf_writer.close()
  ids = tiny.tokens() % np.array(VOCAB)
  with torch.no_grad():
    expected = theirs(torch.tensor([ids.tolist()]), use_cache=False).logits[0].numpy()
  opened = sources.open_source(tmp_path / "model.gguf")
  found = tiny.logits(opened.model, opened.load(np.float32), ids.tolist())
  assert opened.tokenizer is None
  assert np.abs(found - expected).max() <= 1e-4 * expected.std()


@pytest.fixture(scope="module")
def file(tmp_path_factory):
  """A file of a tiny Llama."""
  path = tmp_path_factory.mktemp("gguf") / "llama.gguf"
  tiny.saved(path, "llama")
  return reader.open_file(path)


def _tensors(file):
  return {
    name: writer.Tensor(name=name, type=info.type, shape=info.shape, raw=file.raw(name))
    for name, info in file.tensors.items()
  }


def _changed(file, path, keys=(), tensors=()):
  """The file with other keys and tensors, and without those that are None."""
  values = {k: v for k, v in (file.values | dict(keys)).items() if v is not None}
  held = (_tensors(file) | dict(tensors)).values()
  writer.write(path, values, [tensor for tensor in held if tensor is not None])
  return path


def test_tensors_are_decoded(file):
  source = model.Tensors(file)
  values = source.read("blk.0.ffn_up.weight")
  assert values.dtype == np.float32
  assert values.shape == source.shapes()["blk.0.ffn_up.weight"] == (96, 64)
  assert values.tobytes() == file.raw("blk.0.ffn_up.weight").tobytes()


def test_the_dtype_of_parameters_is_chosen(file):
  opened = model.open_gguf(file.path)
  assert opened.load("bfloat16")["embed"]["table"].dtype == "bfloat16"
  assert opened.load(None)["embed"]["table"].dtype == "float32"
  assert opened.origin["format"] == "gguf"
  assert opened.origin["metadata"]["llama.block_count"] == 2


def test_a_file_is_known_by_its_first_bytes(file, tmp_path):
  named = tmp_path / "weights.bin"
  named.write_bytes(file.path.read_bytes())
  assert sources.open_source(named).model.config.num_layers == 2
  (tmp_path / "text").write_text("no model")
  with pytest.raises(errors.InputError, match="neither a GGUF file nor a folder"):
    sources.open_source(tmp_path / "text")
  (tmp_path / "damaged.gguf").write_text("no model")
  with pytest.raises(errors.InputError, match="not a GGUF file"):
    sources.open_source(tmp_path / "damaged.gguf")


def test_one_number_for_all_layers_may_be_a_list(file, tmp_path):
  keys = {
    "llama.attention.head_count_kv": Value("int32[]", [2, 2]),
    "llama.feed_forward_length": Value("int32[]", [96, 96]),
  }
  opened = model.open_gguf(_changed(file, tmp_path / "a.gguf", keys))
  assert opened.model.config == model.open_gguf(file.path).model.config
  keys = {"llama.feed_forward_length": Value("int32[]", [96, 80])}
  with pytest.raises(errors.InputError, match=r"must be int, got \[96, 80\]"):
    model.open_gguf(_changed(file, tmp_path / "b.gguf", keys))


def test_factors_of_one_stretch_nothing(file, tmp_path):
  raw = encode.encode(np.ones(8, np.float32), "F32")
  factors = writer.Tensor(name="rope_freqs.weight", type="F32", shape=(8,), raw=raw)
  tensors = {factors.name: factors}
  path = _changed(file, tmp_path / "a.gguf", tensors=tensors)
  assert model.open_gguf(path).model.config == model.open_gguf(file.path).model.config
  raw = encode.encode(np.linspace(1, 3, 8).astype(np.float32) ** 2, "F32")
  tensors = {factors.name: dataclasses.replace(factors, raw=raw)}
  path = _changed(file, tmp_path / "b.gguf", tensors=tensors)
  with pytest.raises(errors.InputError, match="b.gguf: rope_freqs.weight does not"):
    model.open_gguf(path)


@pytest.mark.parametrize(
  ("keys", "message"),
  [
    (
      {"general.architecture": "lama"},
      "unknown general.architecture in .*'lama'; did you mean 'llama'",
    ),
    ({"general.architecture": None}, "no field 'general.architecture'"),
    ({"llama.embedding_length": None}, "no field 'llama.embedding_length'"),
    ({"llama.block_count": 3}, "missing 9 tensors blk.2.attn_k.weight"),
    ({"llama.block_count": 1}, "9 tensors blk.1.* no place for"),
    ({"llama.block_count": 2**31}, "block_count is 2147483648, the file has 20"),
    ({"llama.block_count": 0}, "block_count must be positive, got 0"),
    ({"llama.attention.head_count": 0}, "head_count must be positive, got 0"),
    ({"llama.feed_forward_length": 80}, r"shape .64, 96., .*64, 80"),
    ({"llama.context_length": "x"}, "llama.context_length must be int, got 'x'"),
    (
      {"llama.attention.layer_norm_rms_epsilon": True},
      "rms_epsilon must be float, got True",
    ),
    ({"llama.rope.dimension_count": 8}, "dimension_count=8 is not supported"),
    ({"llama.attention.sliding_window": 8}, "sliding_window=8 is not supported"),
    (
      {"llama.rope.scaling.type": "longrope", "llama.rope.scaling.factor": 2.0},
      "unknown rope scaling .*'longrope'.*linear, llama3, yarn",
    ),
    ({"split.count": 2}, "one of 2 parts; join them"),
  ],
)
def test_keys_that_do_not_fit_are_one_clear_line(keys, message, file, tmp_path):
  path = _changed(file, tmp_path / "a.gguf", keys)
  with pytest.raises(errors.InputError, match=message) as raised:
    model.open_gguf(path)
  assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
  ("name", "shape", "type", "message"),
  [
    ("blk.1.ffn_up.weight", None, None, "a.gguf: missing tensor blk.1.ffn_up.weight"),
    ("token_embd.weight", None, None, "a.gguf: missing tensor token_embd.weight"),
    ("blk.0.attn_q.weight", (32, 64), "F32", r"attn_q.weight has shape \(32, 64\)"),
    ("blk.0.more.weight", (64,), "F32", "tensor blk.0.more.weight that the model has"),
    ("blk.0.ffn_up.weight", (96, 64), "IQ4_NL", "is IQ4_NL, which is not read"),
  ],
)
def test_tensors_that_do_not_fit_are_one_clear_line(
  name, shape, type, message, file, tmp_path
):
  tensor = None
  if shape is not None:
    num_bytes = 96 * 64 // 32 * 18 if type == "IQ4_NL" else 4 * np.prod(shape)
    raw = np.zeros(num_bytes, np.uint8)
    tensor = writer.Tensor(name=name, type=type, shape=shape, raw=raw)
  path = _changed(file, tmp_path / "a.gguf", tensors={name: tensor})
  with pytest.raises(errors.InputError, match=message) as raised:
    model.open_gguf(path)
  assert "\n" not in str(raised.value)


def test_states_that_grow_are_refused(tmp_path):
  path = tmp_path / "mamba.gguf"
  tiny.saved(path, "mamba")
  file = reader.open_file(path)
  info = file.tensors["blk.0.ssm_a"]
  raw = encode.encode(np.ones(info.shape, np.float32), "F32")
  tensor = writer.Tensor(name=info.name, type="F32", shape=info.shape, raw=raw)
  path = _changed(file, tmp_path / "a.gguf", tensors={info.name: tensor})
  with pytest.raises(errors.InputError, match="ssm_a has entries that are not neg"):
    model.open_gguf(path).load(np.float32)
