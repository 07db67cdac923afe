"""Log-likelihoods of continuations, and the accuracy of choosing by them."""

import dataclasses
import json
import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.core import errors
from effjax.data import pretrained_tokenizer
from effjax.interop.hf import folder
from effjax.measure import choices
from tests.data import families

LETTERS = "abcdefghijkl"
NAMES = ["?", "bos", "eos", *LETTERS, *(f" {c}" for c in LETTERS), " "]


@dataclasses.dataclass(frozen=True)
class Letters:
  """Ids of letters; a letter and the space before it are one id, as in BPE."""

  bos_id: int | None = 1
  start_id: int | None = 1
  add_bos: bool = False

  def encode(self, text):
    return [NAMES.index(piece) for piece in re.findall(r" ?[a-l]| ", text)]


@dataclasses.dataclass(frozen=True)
class Config:
  vocab_size: int = len(NAMES)
  max_len: int = 64


@dataclasses.dataclass(frozen=True)
class Bigrams:
  """A model whose logits are a row of a table, chosen by the last id."""

  config: Config = Config()

  def apply(self, variables: Any, tokens_BL: Any, segments: Any):
    return variables["params"]["table"][tokens_BL], None


@pytest.fixture
def table():
  return np.random.default_rng(1).normal(size=(len(NAMES),) * 2).astype(np.float32)


def _by_table(table, ids):
  rows = np.asarray(table, np.float64)
  logp = rows - np.log(np.exp(rows).sum(axis=1, keepdims=True))
  return sum(logp[a, b] for a, b in zip(ids, ids[1:], strict=False))


# Contexts of one id to more than the 64 that the model was trained for; continuations
# of which one begins with another.
ITEMS = [
  ("a", " b"),
  ("a b c", " d"),
  ("a b c", " def g"),
  ("a b c ", "d"),
  ("", "abc"),
  ("  ", "ab"),
  ("abcdefghij" * 4, " lk"),
  ("abcdefghij" * 4, "kl"),
  ("lkjihgfedc" * 8, " a b"),
  ("b" * 63, " ab"),
  ("b" * 64, " ab"),
]


def _ids(context, continuation, max_len=64):
  """What lm-evaluation-harness gives the model, and how many ids are scored."""
  spaces = len(context) - len(context.rstrip())
  if spaces:
    context, continuation = context[:-spaces], context[-spaces:] + continuation
  before = Letters().encode(context)
  rest = Letters().encode(context + continuation)[len(before) :]
  return (([*before] or [1]) + rest)[-(max_len + 1) :], len(rest)


def test_likelihoods_equal_a_naive_loop(model, params):
  found = choices.log_likelihoods(model, params, Letters(), ITEMS, batch_size=4)
  assert found.shape == (len(ITEMS),)
  assert found.dtype == np.float64
  apply = jax.jit(model.apply)
  for item, value in zip(ITEMS, found, strict=True):
    ids, num = _ids(*item)
    inputs = jnp.asarray([ids[:-1]], jnp.int32)
    logits = np.asarray(apply({"params": params}, inputs)[0][0], np.float64)
    total = 0.0
    for position in range(len(ids) - 1 - num, len(ids) - 1):
      row = logits[position]
      total += row[ids[position + 1]] - np.log(np.exp(row).sum())
    assert value == pytest.approx(total, rel=1e-5, abs=1e-5), item


def test_batches_padding_and_company_do_not_matter(model, params, monkeypatch):
  expected = choices.log_likelihoods(model, params, Letters(), ITEMS, batch_size=4)
  found = choices.log_likelihoods(model, params, Letters(), ITEMS, batch_size=1)
  np.testing.assert_allclose(found, expected, rtol=1e-5)
  turned = choices.log_likelihoods(model, params, Letters(), ITEMS[::-1], batch_size=4)
  np.testing.assert_allclose(turned[::-1], expected, rtol=1e-5)
  # Every row as long as the longest, and batches as small as memory may make them.
  monkeypatch.setattr(choices, "_MIN_LENGTH", 64)
  monkeypatch.setattr(choices, "_MAX_LOGITS_BYTES", 1)
  padded = choices.log_likelihoods(model, params, Letters(), ITEMS, batch_size=4)
  np.testing.assert_allclose(padded, expected, rtol=1e-5)


def test_alone_and_in_shared_rows_is_the_same(model, params):
  expected = choices.log_likelihoods(model, params, Letters(), ITEMS, batch_size=4)
  alone = [
    choices.log_likelihoods(model, params, Letters(), [item], batch_size=4)[0]
    for item in ITEMS
  ]
  np.testing.assert_allclose(alone, expected, rtol=1e-5)


def test_a_uniform_model_gives_every_token_one_in_v(model, params):
  zeros = jax.tree.map(jnp.zeros_like, params)
  found = choices.log_likelihoods(model, zeros, Letters(), ITEMS, batch_size=4)
  lengths = np.array([_ids(*item)[1] for item in ITEMS])
  np.testing.assert_allclose(found, -lengths * math.log(40), rtol=1e-6)
  assert lengths.tolist() == [1, 1, 4, 1, 3, 3, 2, 2, 2, 2, 2]


def test_by_hand_with_a_table(table):
  params = {"table": jnp.asarray(table)}
  score = lambda items, tokenizer=Letters(): choices.log_likelihoods(
    Bigrams(), params, tokenizer, items
  )
  a, space_b, c = (NAMES.index(n) for n in ("a", " b", "c"))
  expected = [_by_table(table, [a, space_b]), _by_table(table, [a, space_b, c])]
  np.testing.assert_allclose(score([("a", " b"), ("a", " bc")]), expected, rtol=1e-5)
  # The space at the end of a context belongs to what follows.
  np.testing.assert_allclose(score([("a ", "b")]), expected[:1], rtol=1e-5)
  # Only what begins a text depends on the tokenizer's facts.
  begun = [_by_table(table, [1, a])]
  np.testing.assert_allclose(score([("", "a")]), begun, rtol=1e-5)
  np.testing.assert_allclose(score([("", "a")], Letters(add_bos=True)), begun, 1e-5)
  eos = Letters(bos_id=None, start_id=2)
  np.testing.assert_allclose(
    score([("", "a")], eos), [_by_table(table, [2, a])], rtol=1e-5
  )


@dataclasses.dataclass(frozen=True)
class Counts(Bigrams):
  """A model whose logits are a row of a table, chosen by how many ids it has seen."""

  def apply(self, variables: Any, tokens_BL: Any, segments: Any):
    seen_BL = jnp.cumsum(segments, axis=1)
    bos_BL = jnp.cumsum(tokens_BL == 1, axis=1)
    return variables["params"]["table"][seen_BL % 20 + 20 * bos_BL], None


def test_start_and_cut(table, caplog):
  """A start token counts as one id more, and the left is what is lost."""
  table = np.resize(table, (40, len(NAMES)))
  logp = table - np.log(np.exp(table).sum(axis=1, keepdims=True))
  model, params = Counts(), {"table": jnp.asarray(table)}
  a = NAMES.index("a")
  for add_bos in (False, True):
    tokenizer = Letters(add_bos=add_bos)
    items = [("b" * n, "a") for n in (1, 5, 62, 63, 64, 65, 200)]
    found = choices.log_likelihoods(model, params, tokenizer, items)
    expected = []
    for context, _ in items:
      seen = len(context) + add_bos
      kept_bos = add_bos and seen <= 64
      expected.append(logp[min(seen, 64) % 20 + 20 * kept_bos, a])
    np.testing.assert_allclose(found, expected, rtol=1e-5)
  cut = [r.getMessage() for r in caplog.records if "cut" in r.getMessage()]
  assert cut == [
    "2 of 7 contexts are cut to the last 64 ids",
    "3 of 7 contexts are cut to the last 64 ids",
  ]


def test_rows_are_shared_where_one_begins_with_the_other():
  rng = np.random.default_rng(0)
  inputs = [tuple(rng.integers(0, 2, rng.integers(1, 7)).tolist()) for _ in range(80)]
  rows = choices._rows(inputs)
  assert sorted(n for row in rows for n in row.items) == list(range(80))
  for row in rows:
    assert all(row.inputs[: len(inputs[n])] == inputs[n] for n in row.items)
  contained = [
    (a, b)
    for a in rows
    for b in rows
    if a is not b and b.inputs[: len(a.inputs)] == a.inputs
  ]
  assert not contained


def test_few_programs_are_compiled(table):
  # A vocabulary of its own, so that no other test compiled the same.
  model = Bigrams(Config(vocab_size=len(NAMES), max_len=100))
  params = {"table": jnp.asarray(table)}
  items = [("a" * n, " b") for n in range(1, 100)]
  before = choices._chosen._cache_size()
  # Ends differ, so that no row begins with another.
  items = [(f"{context}{LETTERS[n % 12]}", b) for n, (context, b) in enumerate(items)]
  choices.log_likelihoods(model, params, Letters(), items)
  assert choices._chosen._cache_size() - before <= 5  # 32, 48, 64, 96, 100
  made = choices._chosen._cache_size()
  choices.log_likelihoods(model, params, Letters(), items[::-1])
  assert choices._chosen._cache_size() == made


def test_lengths_that_rows_are_padded_to():
  rows = [choices._Row((0,) * n, []) for n in (1, 32, 33, 48, 49, 97, 129, 190, 200)]
  found = {
    length: [len(row.inputs) for row in group]
    for length, group in choices._by_length(rows, 200).items()
  }
  assert found == {
    32: [1, 32],
    48: [33, 48],
    64: [49],
    128: [97],
    192: [129, 190],
    200: [200],
  }


def test_mistakes(table):
  params = {"table": jnp.asarray(table)}
  score = lambda items, tokenizer=Letters(), **config: choices.log_likelihoods(
    Bigrams(Config(**config)), params, tokenizer, items
  )
  with pytest.raises(errors.InputError, match="no token of its own"):
    score([("a", "")])
  with pytest.raises(errors.InputError, match="a continuation of 5 tokens is longer"):
    score([("a", "bcdef")], max_len=4)
  with pytest.raises(errors.InputError, match="they do not belong together"):
    score([("a", "b")], vocab_size=4)
  with pytest.raises(errors.InputError, match="no bos, eos or pad token"):
    score([("", "b")], Letters(bos_id=None, start_id=None))
  with pytest.raises(errors.InputError, match="batch_size=0"):
    choices.log_likelihoods(Bigrams(), params, Letters(), [("a", "b")], 0)


def test_accuracy_by_hand():
  answers = ("é", "long answer", "abc")
  scores = [
    [-4.0, -5.0, -9.0],  # é by the sum; by bytes (2, 11, 3) the long one.
    [-1.0, -5.0, -9.0],  # long by bytes: -0.45 against -0.5.
    [-1.0, -22.0, -9.0],  # é both ways.
    [-3.0, -3.0, -3.0],  # The first of equal ones; long by bytes.
    [-9.0, -8.0, -1.5],  # abc by the sum, and by bytes: -0.5 against -0.73.
  ]
  labels = [0, 1, 0, 0, 1]
  found = choices.accuracy(np.array(scores), labels, answers)
  assert found == {
    "accuracy": 3 / 5,
    "stderr": pytest.approx(math.sqrt(0.6 * 0.4 / 5)),
    "accuracy_norm": 2 / 5,
    "majority": 3 / 5,
    "num_examples": 5,
    "recall": {"é": 1.0, "long answer": 0.0, "abc": None},
  }


def test_accuracy_is_null_where_nothing_is_finite():
  scores = np.array([[-1.0, -2.0], [np.nan, -1.0]])
  found = choices.accuracy(scores, [0, 1], ("a", "b"))
  assert found["accuracy"] is found["accuracy_norm"] is found["stderr"] is None
  assert found["recall"] == {"a": None, "b": None}
  assert found["majority"] == 0.5


def test_accuracy_refuses_what_does_not_fit():
  with pytest.raises(errors.InputError, match="do not fit 1 labels and 2 answers"):
    choices.accuracy(np.zeros((2, 2)), [0], ("a", "b"))
  with pytest.raises(errors.InputError, match="there are no examples"):
    choices.accuracy(np.zeros((0, 2)), [], ("a", "b"))
  with pytest.raises(errors.InputError, match="labels must be from 0 to 1"):
    choices.accuracy(np.zeros((1, 2)), [2], ("a", "b"))


@pytest.mark.oracle
@pytest.mark.parametrize("family", ["byte_level", "sentencepiece_bpe"])
def test_likelihoods_equal_those_of_transformers(family, tmp_path):
  transformers = pytest.importorskip("transformers")
  torch = pytest.importorskip("torch")
  source, facts = families.FAMILIES[family]
  tokenizer = pretrained_tokenizer.Pretrained(json.loads(source()), **facts)
  config = transformers.LlamaConfig(
    vocab_size=tokenizer.vocab_size,
    hidden_size=32,
    intermediate_size=56,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    attn_implementation="eager",
  )
  torch.manual_seed(0)
  oracle = transformers.LlamaForCausalLM(config).float().eval()
  with torch.no_grad():
    for values in oracle.parameters():
      if values.ndim == 2:
        values.copy_(0.2 * torch.randn(values.shape))
  oracle.save_pretrained(tmp_path)
  opened = folder.open_folder(tmp_path)
  names = {"byte_level": ("<|im_start|>", None), "sentencepiece_bpe": ("<s>", "<s>")}
  begins, added = names[family]
  (tmp_path / "tokenizer.json").write_text(source(), encoding="utf-8")
  theirs = transformers.PreTrainedTokenizerFast(
    tokenizer_file=str(tmp_path / "tokenizer.json"), bos_token=begins
  )
  prompt = "The quick brown fox number 7 jumps over the lazy dog; it's café time"
  items = [
    ("The quick brown fox", " jumps"),
    ("The quick brown fox", " jumps over the lazy dog"),
    ("The quick brown fox ", "naïve"),
    ("", "The fox"),
    (prompt, " positive"),
    (prompt, " negative, naïve one!"),
    (f"{prompt}\nSentiment:", " number"),
    (prompt * 5, " number 7"),
  ]
  found = choices.log_likelihoods(
    opened.model, opened.load(), tokenizer, items, batch_size=3
  )
  for (context, continuation), value in zip(items, found, strict=True):
    kept = context.rstrip()
    rest = context[len(kept) :] + continuation
    # The tokenizer of transformers adds what begins a text, in both.
    before, whole = theirs(kept)["input_ids"], theirs(kept + rest)["input_ids"]
    if not before:
      before, whole = [theirs.bos_token_id], [theirs.bos_token_id, *whole]
    assert (before[0] == theirs.bos_token_id) == (bool(added) or not kept)
    scored = len(whole) - len(before)
    whole = whole[-65:]
    with torch.no_grad():
      logits = oracle(torch.tensor([whole[:-1]]), use_cache=False).logits[0]
    logp = torch.log_softmax(logits.double(), dim=-1)
    places = range(len(whole) - 1 - scored, len(whole) - 1)
    total = sum(float(logp[place, whole[place + 1]]) for place in places)
    assert scored > 0
    assert abs(value - total) <= 1e-4 * max(1, abs(total)), (context, continuation)
