"""Encoders in and out: outputs of transformers, bits of the files."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import numpy as safetensors

from effjax.core import errors
from effjax.interop.hf import architecture, folder, weights_files
from effjax.models import encoder_config

pytestmark = pytest.mark.oracle

VOCAB, WIDTH, LENGTH = 48, 32, 11
_BERT = {
  "hidden_size": WIDTH,
  "intermediate_size": 56,
  "num_hidden_layers": 2,
  "num_attention_heads": 4,
  "max_position_embeddings": 64,
  "type_vocab_size": 3,
}
_ALBERT = _BERT | {
  "embedding_size": 16,
  "num_hidden_layers": 4,
  "num_hidden_groups": 2,
}
# Fields of a tiny model, by its class and, behind the dash, a name of its own.
MODELS = {
  "BertForMaskedLM": _BERT,
  "BertForMaskedLM-tanh": _BERT | {"hidden_act": "gelu_new"},
  "BertForSequenceClassification": _BERT | {"num_labels": 5},
  "BertForSequenceClassification-two": _BERT,
  "BertModel": _BERT | {"layer_norm_eps": 1e-6},
  "AlbertForMaskedLM": _ALBERT,
  "AlbertForMaskedLM-erf": _ALBERT | {"hidden_act": "gelu"},
  "AlbertForSequenceClassification": _ALBERT | {"num_labels": 3},
  "AlbertModel": _ALBERT | {"num_hidden_groups": 1},
}


def _class_name(name):
  return name.partition("-")[0]


def _model_type(name):
  return "albert" if name.startswith("Albert") else "bert"


@pytest.fixture(scope="session")
def saved(tmp_path_factory):
  """Makes and saves a tiny random model of transformers, once each."""
  transformers = pytest.importorskip("transformers")
  torch = pytest.importorskip("torch")
  made = {}

  def get(name):
    if name not in made:
      config = transformers.AutoConfig.for_model(
        _model_type(name), vocab_size=VOCAB, **MODELS[name]
      )
      config._attn_implementation = "eager"
      model = getattr(transformers, _class_name(name))(config).float().eval()
      generator = torch.Generator().manual_seed(0)
      with torch.no_grad():
        for parameter, values in model.named_parameters():
          scale = "norm" in parameter.lower() and parameter.endswith("weight")
          noise = torch.randn(values.shape, generator=generator)
          values.copy_(float(scale) + 0.2 * noise)
      path = tmp_path_factory.mktemp("hf") / name
      model.save_pretrained(path)
      made[name] = path, model
    return made[name]

  return get


def _inputs():
  """Two rows, the second one padded, with two sentences each."""
  mask = np.ones((2, LENGTH), np.int64)
  mask[1, 7:] = 0
  return {
    "input_ids": np.random.default_rng(0).integers(0, VOCAB, (2, LENGTH)),
    "attention_mask": mask,
    "token_type_ids": (np.arange(LENGTH) >= 4).astype(np.int64)[None].repeat(2, 0),
  }


def _expected(model):
  """Logits of tokens that are none of padding, or of rows; or normalized means."""
  torch = pytest.importorskip("torch")
  inputs = {name: torch.tensor(value) for name, value in _inputs().items()}
  with torch.no_grad():
    output = model(**inputs)
  mask_BL1 = inputs["attention_mask"][..., None]
  if "logits" not in output:
    sum_BD = (output.last_hidden_state * mask_BL1).sum(1)
    mean_BD = sum_BD / mask_BL1.sum(1)
    return torch.nn.functional.normalize(mean_BD, dim=-1).numpy()
  logits = output.logits
  return (logits * mask_BL1 if logits.ndim == 3 else logits).numpy()


def _ours(opened):
  inputs = {name: jnp.asarray(v, jnp.int32) for name, v in _inputs().items()}
  mask_BL = inputs["attention_mask"]
  logits = jax.jit(opened.model.apply)(
    {"params": opened.load()},
    inputs["input_ids"],
    segments=mask_BL,
    token_types_BL=inputs["token_type_ids"],
  )[0]
  return np.asarray(logits * mask_BL[..., None] if logits.ndim == 3 else logits)


@pytest.mark.parametrize("name", MODELS)
def test_outputs_equal_those_of_transformers(name, saved):
  path, model = saved(name)
  expected = _expected(model)
  got = _ours(folder.open_folder(path))
  assert got.shape == expected.shape
  assert np.abs(got - expected).max() <= 1e-4 * expected.std()


@pytest.mark.parametrize("name", MODELS)
def test_a_folder_comes_back_bit_for_bit(name, saved, tmp_path):
  transformers = pytest.importorskip("transformers")
  path, model = saved(name)
  opened = folder.open_folder(path)
  args = opened.model, opened.load(), opened.specs
  assert folder.save(tmp_path / "out", *args) == _model_type(name)
  before, after = weights_files.Tensors(path), weights_files.Tensors(tmp_path / "out")
  # The pooler of a plain model is no part of a sentence encoder.
  kept = {k: v for k, v in before.shapes().items() if not k.startswith("pooler.")}
  assert dict(after.shapes()) == kept
  for tensor in kept:
    np.testing.assert_array_equal(after.read(tensor), before.read(tensor), tensor)
  about = json.loads((tmp_path / "out" / "config.json").read_text())
  assert about["architectures"] == [_class_name(name)]
  again = getattr(transformers, _class_name(name)).from_pretrained(
    tmp_path / "out", attn_implementation="eager"
  )
  np.testing.assert_array_equal(_expected(again.eval()), _expected(model))


@pytest.mark.parametrize("name", MODELS)
def test_the_architecture_is_found_again(name, saved):
  path, _ = saved(name)
  config = folder.open_folder(path).model.config
  found = architecture.fitting(config)
  assert found.model_type == _model_type(name)
  assert architecture.what_is_lost(found, config) == []


def _changed(saved, tmp_path, name, tensors=None, **fields):
  """A copy of a folder with other fields and more tensors."""
  path, _ = saved(name)
  out = tmp_path / "changed"
  out.mkdir()
  values = json.loads((path / "config.json").read_text()) | fields
  values = {k: v for k, v in values.items() if v is not None}
  (out / "config.json").write_text(json.dumps(values))
  held = safetensors.load_file(path / weights_files.SINGLE) | (tensors or {})
  safetensors.save_file(held, out / weights_files.SINGLE)
  return out


@pytest.mark.parametrize("name", ["BertForMaskedLM", "AlbertForMaskedLM"])
def test_what_older_files_hold_beside_the_weights_is_left_out(name, saved, tmp_path):
  path, _ = saved(name)
  kind = _model_type(name)
  held = safetensors.load_file(path / weights_files.SINGLE)
  head = "cls.predictions." if kind == "bert" else "predictions."
  positions = np.arange(64)[None]
  sentence = "cls.seq_relationship" if kind == "bert" else "sop_classifier.classifier"
  pooler = "bert.pooler.dense" if kind == "bert" else "albert.pooler"
  tensors = {
    f"{head}decoder.weight": held[f"{kind}.embeddings.word_embeddings.weight"],
    f"{head}decoder.bias": held[f"{head}bias"],
    f"{kind}.embeddings.position_ids": positions,
    f"{pooler}.weight": np.zeros((WIDTH, WIDTH), np.float32),
    f"{sentence}.weight": np.zeros((2, WIDTH), np.float32),
  }
  classes = [None, ["BertForPreTraining" if kind == "bert" else "AlbertForPreTraining"]]
  expected = folder.open_folder(path)
  for number, architectures in enumerate(classes):
    below = tmp_path / str(number)
    below.mkdir()
    old = _changed(saved, below, name, tensors, architectures=architectures)
    got = folder.open_folder(old)
    assert got.model == expected.model
    jax.tree.map(np.testing.assert_array_equal, got.load(), expected.load())


def test_norms_may_have_the_names_of_the_first_files(saved, tmp_path):
  transformers = pytest.importorskip("transformers")
  path, model = saved("BertForMaskedLM")
  old = _changed(saved, tmp_path, "BertForMaskedLM")
  names = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
  held = safetensors.load_file(old / weights_files.SINGLE)
  for tensor in tuple(held):
    for today, first in names.items():
      if tensor.endswith(today):
        held[tensor.removesuffix(today) + first] = held.pop(tensor)
  safetensors.save_file(held, old / weights_files.SINGLE, {"format": "pt"})
  assert "bert.embeddings.LayerNorm.gamma" in weights_files.Tensors(old).shapes()
  got, expected = folder.open_folder(old).load(), folder.open_folder(path).load()
  jax.tree.map(np.testing.assert_array_equal, got, expected)
  again = transformers.BertForMaskedLM.from_pretrained(old, attn_implementation="eager")
  np.testing.assert_array_equal(_expected(again.eval()), _expected(model))


@pytest.mark.parametrize(
  ("name", "fields", "message"),
  [
    ("BertForMaskedLM", {"hidden_size": 36}, r"shape .*32.*, the config says .*36"),
    ("BertForMaskedLM", {"hidden_size": 30}, "num_attention_heads=4 must divide"),
    ("BertForMaskedLM", {"hidden_act": "relu"}, "hidden_act='relu' is not supported"),
    ("AlbertModel", {"hidden_act": "silu"}, "hidden_act='silu' is not supported"),
    (
      "BertModel",
      {"position_embedding_type": "relative_key"},
      "position_embedding_type='relative_key' is not supported; effjax has 'absolute'",
    ),
    ("BertForMaskedLM", {"is_decoder": True}, "is_decoder=True is not supported"),
    ("BertForMaskedLM", {"tie_word_embeddings": False}, "tie_word_embeddings=False"),
    ("BertForMaskedLM", {"type_vocab_size": 0}, "type_vocab_size=0 must be positive"),
    (
      "BertForMaskedLM",
      {"architectures": ["BertForQuestionAnswering"]},
      "unknown class in .*'BertForQuestionAnswering'; .*available: BertForMaskedLM",
    ),
    (
      "BertForMaskedLM",
      {"architectures": ["BertModel"]},
      "missing 37 tensors ",
    ),
    (
      "BertForSequenceClassification",
      {"id2label": {"0": "a", "1": "b"}},
      "classifier.(weight|bias) has shape .5,.*, the config says .2,",
    ),
    ("AlbertModel", {"inner_group_num": 2}, "inner_group_num=2 is not supported"),
    ("AlbertModel", {"num_hidden_groups": 3}, "num_hidden_groups=3 must divide"),
    ("AlbertModel", {"embedding_size": 32}, "embedding_size=32 equals hidden_size"),
    ("AlbertModel", {"num_hidden_groups": 2}, "missing 16 tensors encoder.albert_l"),
  ],
)
def test_a_config_that_does_not_fit_is_one_clear_line(
  name, fields, message, saved, tmp_path
):
  with pytest.raises(errors.InputError, match=message) as raised:
    folder.open_folder(_changed(saved, tmp_path, name, **fields))
  assert "\n" not in str(raised.value)


def test_a_weight_of_integers_is_refused(saved, tmp_path):
  name = "embeddings.LayerNorm.bias"
  tensors = {name: np.zeros(WIDTH, np.int64)}
  with pytest.raises(errors.InputError, match=f"missing tensor {name}"):
    folder.open_folder(_changed(saved, tmp_path, "BertModel", tensors))


@pytest.mark.parametrize(
  ("pooling", "message"),
  [
    ({"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": False}, None),
    ({"pooling_mode_cls_token": True}, "pooling_mode_cls_token is not supported"),
    ({"pooling_mode": "cls"}, "pooling_mode='cls' is not supported; effjax has 'mean'"),
  ],
)
def test_sentences_that_are_no_means_are_refused(pooling, message, saved, tmp_path):
  path = _changed(saved, tmp_path, "BertModel")
  (path / "1_Pooling").mkdir()
  (path / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
  if message is None:
    assert folder.open_folder(path).model.config.pooling == "mean"
    return
  with pytest.raises(errors.InputError, match=message):
    folder.open_folder(path)


def _config(**changes):
  values = {
    "vocab_size": VOCAB,
    "embed_dim": WIDTH,
    "num_layers": 2,
    "mixer_options": {"attention": {"num_heads": 4, "head_dim": 8}},
  }
  return encoder_config.EncoderConfig(**(values | changes))


@pytest.mark.parametrize(
  ("changes", "model_type"),
  [
    # The width of the MLP and that of the embeddings follow from the model's.
    ({}, "bert"),
    ({"embedding_dim": WIDTH}, "bert"),
    # Without a head for tokens, its activation is none of the function.
    ({"num_classes": 2, "head_approximate": True}, "bert"),
    ({"pooling": "mean", "head_approximate": True}, "bert"),
    ({"init_std": 0.1, "scan": False, "remat": "full"}, "bert"),
    ({"embedding_dim": 8}, "albert"),
    ({"embedding_dim": 8, "share": 2, "pooling": "mean"}, "albert"),
  ],
)
def test_a_model_from_here_finds_its_architecture(changes, model_type):
  assert architecture.fitting(_config(**changes)).model_type == model_type


@pytest.mark.parametrize(
  ("changes", "named"),
  [
    ({"norm": "pre"}, "model.norm"),
    ({"embedding_norm": False}, "model.embedding_norm"),
    ({"position": "none"}, "model.position"),
    ({"num_token_types": 0}, "type_vocab_size=0"),
    ({"head_approximate": True}, "model.head_approximate"),
  ],
)
def test_what_an_architecture_cannot_say_is_named(changes, named):
  with pytest.raises(errors.InputError, match=named):
    architecture.fitting(_config(**changes), "bert")


def test_encoders_and_decoders_are_not_mixed_up(saved):
  path, _ = saved("AlbertForMaskedLM")
  config = folder.open_folder(path).model.config
  with pytest.raises(errors.InputError, match="it is a EncoderConfig, not a DecoderC"):
    architecture.fitting(config, "llama")
  with pytest.raises(errors.InputError, match="the nearest is bert, .* model.share"):
    architecture.fitting(config, "bert")


def test_every_class_is_tested():
  kinds = ("ForMaskedLM", "ForSequenceClassification", "Model")
  every = {family + kind for family in ("Albert", "Bert") for kind in kinds}
  assert {_class_name(name) for name in MODELS} == every
