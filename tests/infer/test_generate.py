"""Generation equals the naive loop over whole sequences, and stops where it should."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from effjax.core import errors
from effjax.data import pretrained_tokenizer, tokenizers
from effjax.infer import engine, generate, sampling, score
from effjax.models import decoder
from tests.data import families
from tests.models.conftest import small_config


class Letters:
  """A tokenizer of 63 letters; 0 begins a text."""

  vocab_size, bos_id, start_id, add_bos = 64, 0, 0, True
  chat_template = "b{{ messages[-1].content }}{{ eos_token }}"

  def __init__(self, eos_ids=(0,)):
    self.eos_ids = eos_ids

  def encode(self, text, special=False):
    return [ord(c) - ord("a") + 1 for c in text]

  def decode(self, ids):
    return "".join(chr(ord("a") + i - 1) for i in ids)

  def decode_bytes(self, ids):
    return self.decode(ids).encode()

  def name(self, index):
    return "" if index == 0 else self.decode([index])


class Silent(Letters):
  """One whose prompts begin with nothing."""

  add_bos = False


GREEDY = sampling.SamplingOptions(temperature=0.0)


@pytest.fixture(scope="module")
def model_and_params():
  model = decoder.Decoder(small_config(num_layers=2))
  tokens = jnp.zeros((1, 2), jnp.int32)
  return model, jax.jit(model.init)(jax.random.key(5), tokens)["params"]


def _naive(model, params, ids, num, ends=(), penalty=1.0):
  """New ids of a greedy loop that reads the whole sequence each time."""
  start = len(ids)
  for _ in range(num):
    # Right padding: one length to compile.
    padded_BL = np.zeros((1, 24), np.int64)
    padded_BL[0, : len(ids)] = ids
    logits_V = np.array(score.logits(model, params, padded_BL)[0, len(ids) - 1])
    for i in set(ids):
      logits_V[i] *= penalty if logits_V[i] < 0 else 1 / penalty
    ids = [*ids, int(np.argmax(logits_V))]
    if ids[-1] in ends:
      return ids[start:-1]
  return ids[start:]


def _text(model, params, tokenizer, prompt, **changes):
  options = {"max_tokens": 12, "options": GREEDY} | changes
  return "".join(generate.stream(model, params, tokenizer, prompt, **options))


def test_greedy_equals_the_naive_loop(model_and_params):
  expected = _naive(*model_and_params, [0, 1, 2, 3], 12, ends=(0,))
  assert _text(*model_and_params, Letters(), "abc") == Letters().decode(expected)


def test_any_end_ends_the_text(model_and_params):
  new = _naive(*model_and_params, [0, 1, 2, 3], 12)
  ends = (new[7], new[4])
  expected = new[: min(new.index(end) for end in ends)]
  found = _text(*model_and_params, Letters(ends), "abc")
  assert found == Letters().decode(expected)
  assert len(found) < 8


def test_prompts_without_a_beginning(model_and_params):
  for prompt, ids in (("abc", [1, 2, 3]), ("", [0])):
    expected = _naive(*model_and_params, ids, 12, ends=(63,))
    found = _text(*model_and_params, Silent((63,)), prompt)
    assert found == Letters().decode(expected)
  nothing = Silent((63,))
  nothing.start_id = None
  with pytest.raises(errors.InputError, match="the prompt is empty"):
    _text(*model_and_params, nothing, "")


def test_repetition_penalty_counts_prompt_and_new_tokens(model_and_params):
  plain = _naive(*model_and_params, [0, 1, 2, 3], 12)
  expected = _naive(*model_and_params, [0, 1, 2, 3], 12, penalty=1.6)
  assert expected != plain
  options = sampling.SamplingOptions(temperature=0.0, repetition_penalty=1.6)
  found = _text(*model_and_params, Letters((99,)), "abc", options=options)
  assert found == Letters().decode(expected)


def test_stop_strings(model_and_params):
  letters = Letters((99,))
  whole = _text(*model_and_params, letters, "abc")
  stop = (whole[9:], whole[3:5], "nowhere")
  assert _text(*model_and_params, letters, "abc", stop=stop) == whole[:3]
  assert _text(*model_and_params, letters, "abc", stop=("nowhere",)) == whole


def test_chat_is_the_template_and_nothing_before_it(model_and_params):
  letters = Letters((3,))
  expected = _naive(*model_and_params, [2, 5, 3], 12, ends=(3,))
  assert _text(*model_and_params, letters, "e", chat=True) == letters.decode(expected)


def test_the_seed_decides(model_and_params):
  model, params = model_and_params
  run = lambda seed: "".join(
    generate.stream(model, params, Letters(), "", max_tokens=12, seed=seed)
  )
  assert run(1) == run(1)
  assert run(1) != run(2)


def test_another_prompt_and_other_numbers_compile_nothing(model_and_params):
  counted = (engine.prefill, engine.step, sampling._sample, sampling.mark_seen)
  for i, prompt in enumerate(("ab", "abcdef", "")):
    options = sampling.SamplingOptions(
      temperature=0.5 + i,
      top_k=9,
      top_p=0.9 - i / 10,
      min_p=0.01 + i / 100,
      repetition_penalty=1.2 + i,
    )
    _text(*model_and_params, Letters((99,)), prompt, options=options, max_tokens=3 + i)
    if i == 0:
      before = [function._cache_size() for function in counted]
  assert [function._cache_size() for function in counted] == before


def test_the_state_is_as_long_as_the_text_needs(model_and_params, monkeypatch):
  asked = []

  class Spy(engine.Decoding):
    def __init__(self, model, params, batch, max_len):
      asked.append(max_len)
      raise KeyError

  monkeypatch.setattr(engine, "Decoding", Spy)
  for limit, num in ((32, 5), (1 << 17, 5), (1 << 17, 5000), (5010, 5000)):
    model = decoder.Decoder(small_config(num_layers=2, max_len=limit))
    with pytest.raises(KeyError):
      _text(model, {}, Letters(), "a", max_tokens=num)
  assert asked == [32, 1024, 8192, 5010]


_STOPS = st.lists(st.text("abé😀", min_size=1, max_size=4), max_size=3)


@given(text=st.text("abé😀", max_size=12), stop=_STOPS)
def test_pieces_never_show_part_of_a_stop_string(text, stop):
  """One token a byte, so characters and stop strings straddle tokens."""
  made = tokenizers.byte_tokenizer()
  expected, found = text, []
  for length in range(len(text) + 1):  # The first one that is complete counts.
    found = [text[:length].find(end) for end in stop if end in text[:length]]
    if found:
      expected = text[: min(found)]
      break
  shown = ""
  tokens = iter(made.encode(text))
  for piece in generate._pieces(made, tokens, tuple(stop), starts=False):
    assert piece or found
    shown += piece
    assert expected.startswith(shown)
  assert shown == expected


def test_nothing_is_held_back_that_is_decided():
  made = tokenizers.byte_tokenizer()
  pieces = generate._pieces(made, iter(made.encode("aé😀ab")), ("abc",), starts=False)
  assert list(pieces) == ["aé", "😀", "ab"]


def test_continuations_keep_the_space_and_answers_do_not():
  content = json.loads(families.sentencepiece_bpe())
  made = pretrained_tokenizer.Pretrained(content, bos_id=1, eos_ids=(2,))
  ids = [*made.encode("quick é 😀 fox"), made.vocab_size + 3, 2]
  join = lambda starts: "".join(generate._pieces(made, iter(ids), (), starts=starts))
  assert join(False) == " quick é 😀 fox"
  assert join(True) == "quick é 😀 fox"


def test_bytes_that_form_no_character_are_shown_in_the_end():
  made = tokenizers.byte_tokenizer()
  ids = [made.encode("é")[0], *made.encode("a"), made.encode("é")[0]]
  pieces = list(generate._pieces(made, iter(ids), (), starts=False))
  assert pieces == ["\ufffda", "\ufffd"]


def test_mistakes(model_and_params):
  cases = [
    ({"max_tokens": 0}, "max_tokens=0"),
    ({"stop": ("a", "")}, "non-empty strings"),
    ({"system": "x"}, "a system message needs chat"),
    ({"prompt": "\udcff"}, "not Unicode text"),
    ({"prompt": "a\xa7"}, "gives id .*, the model knows 64 tokens"),
  ]
  for changes, message in cases:
    prompt = changes.pop("prompt", "abc")
    with pytest.raises(errors.InputError, match=message):
      _text(*model_and_params, Letters(), prompt, **changes)
  bare = Letters()
  bare.chat_template = None
  with pytest.raises(errors.InputError, match="no chat template"):
    _text(*model_and_params, bare, "abc", chat=True)


def test_too_long_is_refused_before_anything_runs(model_and_params):
  model, params = model_and_params
  with pytest.raises(errors.InputError, match="more than the 32"):
    next(generate.stream(model, params, Letters(), "abc", max_tokens=29))
  with pytest.raises(errors.InputError, match="longer than the 32"):
    score.logits(model, params, np.zeros((1, 33), np.int32))
  with pytest.raises(errors.InputError, match="token ids must be from 0 to 63"):
    score.logits(model, params, np.full((1, 3), 64))
  with pytest.raises(errors.InputError, match="more than the 32"):
    engine.Decoding(model, params, 1, 33)
