"""Embeddings of texts: those of transformers, whatever they are batched with."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from effjax.core import errors
from effjax.core import specs as specs_lib
from effjax.data import pretrained_tokenizer, tokenizers
from effjax.infer import embed
from effjax.interop.hf import folder
from effjax.models import config as decoder_config
from effjax.models import decoder, encoder, encoder_config
from tests.data import families

TEXTS = [
  "The quick brown fox",
  "jumps",
  "",
  "It's café time, naïve one! " * 3,
  "The lazy dog; number 7",
  "def function_3(self, value): return self.name " * 5,
]
# The last text is longer than that, so it is cut.
MAX_LEN = 64


def _tokenizer():
  _, facts = families.FAMILIES["word_piece"]
  return pretrained_tokenizer.Pretrained(json.loads(families.word_piece()), **facts)


def _encoder(**changes):
  values = {
    "vocab_size": 300,
    "embed_dim": 32,
    "num_layers": 2,
    "mixer_options": {"attention": {"num_heads": 4, "head_dim": 8}},
    "max_len": MAX_LEN,
    "pooling": "mean",
  }
  model = encoder.Encoder(encoder_config.EncoderConfig(**(values | changes)))
  rng = np.random.default_rng(0)
  shapes = jax.eval_shape(model.init, jax.random.key(0), *model.example_inputs())
  params = jax.tree.map(
    lambda s: (0.3 * rng.normal(size=s.shape)).astype(np.float32), shapes["params"]
  )
  return model, params


@pytest.fixture(scope="module")
def sentences():
  return _encoder()


@pytest.mark.oracle
def test_equal_to_transformers(sentences, tmp_path):
  torch = pytest.importorskip("torch")
  transformers = pytest.importorskip("transformers")
  model, params = sentences
  folder.save(tmp_path / "m", model, params, specs_lib.specs(model), _tokenizer())
  theirs = transformers.AutoModel.from_pretrained(tmp_path / "m")
  fast = transformers.AutoTokenizer.from_pretrained(tmp_path / "m")
  batch = fast(
    TEXTS, padding=True, truncation=True, max_length=MAX_LEN, return_tensors="pt"
  )
  assert batch["input_ids"].shape == (len(TEXTS), MAX_LEN)
  with torch.no_grad():
    hidden = theirs(**batch).last_hidden_state
  mask = batch["attention_mask"][..., None]
  means = torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1)).numpy()
  found = embed.embed(model, params, _tokenizer(), TEXTS, batch_size=4)
  assert found.dtype == np.float32
  assert np.abs(found - means).max() <= 1e-4 * means.std()


def test_a_text_does_not_depend_on_its_neighbours(sentences):
  model, params = sentences
  together = embed.embed(model, params, _tokenizer(), TEXTS, batch_size=4)
  for text, expected in zip(TEXTS, together, strict=True):
    alone = embed.embed(model, params, _tokenizer(), [text], batch_size=4)[0]
    np.testing.assert_allclose(alone, expected, atol=1e-6)
    assert np.linalg.norm(alone) == pytest.approx(1, abs=1e-5)
  assert embed.embed(model, params, _tokenizer(), []).shape == (0, 32)


@pytest.mark.parametrize("head", [{"num_classes": 3}, {}])
def test_below_a_head_is_the_same_encoder(sentences, head):
  model, params = sentences
  headed, with_head = _encoder(pooling=None, **head)
  assert with_head.keys() > params.keys()
  own = {name: params.get(name, value) for name, value in with_head.items()}
  found = embed.embed(headed, own, _tokenizer(), TEXTS[:2], batch_size=4)
  expected = embed.embed(model, params, _tokenizer(), TEXTS[:2], batch_size=4)
  np.testing.assert_array_equal(found, expected)


def test_our_own_tokenizers_begin_a_text_with_their_start():
  tokenizer = tokenizers.byte_tokenizer()
  assert (tokenizer.prefix_ids, tokenizer.suffix_ids) == ((tokenizer.bos_id,), ())


def test_bad_input(sentences):
  model, params = sentences
  small, of_small = _encoder(vocab_size=16)
  with pytest.raises(errors.InputError, match="the model knows 16 tokens"):
    embed.embed(small, of_small, _tokenizer(), TEXTS)
  bare = dataclasses.make_dataclass("Bare", ["prefix_ids", "suffix_ids"])((), ())
  bare.encode = lambda text: []
  with pytest.raises(errors.InputError, match="an empty text has no tokens"):
    embed.embed(model, params, bare, [""])
  config = decoder_config.DecoderConfig(vocab_size=16, embed_dim=8, num_layers=1)
  with pytest.raises(errors.InputError, match="only an encoder embeds texts"):
    embed.embed(decoder.Decoder(config), {}, _tokenizer(), TEXTS)
  with pytest.raises(errors.InputError, match="batch_size=0 must be positive"):
    embed.embed(model, params, _tokenizer(), TEXTS, batch_size=0)
