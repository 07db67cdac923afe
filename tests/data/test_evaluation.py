import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from effjax.data import evaluation, tokenizers
from effjax.data.builders import base

TOKENIZER = tokenizers.byte_tokenizer()


def corpus_of(texts) -> base.Corpus:
  records = [{"name": b"%d" % i, "text": t.encode()} for i, t in enumerate(texts)]
  return base.Corpus(
    name="c", kind="text", sources={"validation": records}, facts={"hash": "0"}
  )


def eval_set(texts, num_bytes=10**6, context=8, stride=4) -> evaluation.EvalSet:
  return evaluation.choose(corpus_of(texts), TOKENIZER, num_bytes, context, stride)


@st.composite
def cases(draw):
  texts = draw(st.lists(st.text("abé\n", min_size=1, max_size=40), min_size=1))
  context = draw(st.integers(1, 12))
  return texts, context, draw(st.integers(1, context)), draw(st.integers(1, 5))


@settings(deadline=None)
@given(cases())
def test_every_token_is_predicted_exactly_once_from_what_precedes_it(case):
  texts, context, stride, batch_size = case
  chosen = eval_set(texts, context=context, stride=stride)
  counts = [np.zeros(len(ids), int) for ids in chosen.ids]
  owners = [
    (document, start)
    for document, ids in enumerate(chosen.ids)
    for start in evaluation._starts(len(ids), context, stride)
  ]
  rows = [
    {name: values[i] for name, values in batch.items()}
    for batch in chosen.batches(batch_size)
    for i in range(batch_size)
  ]
  assert len(rows) % batch_size == 0
  assert len(owners) == chosen.num_windows <= len(rows)
  for row, (document, start) in zip(rows, owners, strict=False):
    ids = chosen.ids[document]
    used = row["segments"] == 1
    num = int(used.sum())
    assert used[:num].all()
    np.testing.assert_array_equal(row["inputs"][:num], ids[start : start + num])
    np.testing.assert_array_equal(
      row["targets"][:num], ids[start + 1 : start + 1 + num]
    )
    np.testing.assert_array_equal(row["positions"][:num], np.arange(num))
    counted = np.flatnonzero(row["weights"])
    assert (counted < num).all()
    counts[document][start + 1 + counted] += 1
    # All but a document's first targets see at least context - stride tokens before.
    if start:
      assert (counted >= context - stride).all()
  for values in counts:
    assert values[0] == 0 and (values[1:] == 1).all()
  for row in rows[len(owners) :]:
    assert not any(values.any() for values in row.values())
  assert chosen.num_tokens == sum(row["weights"].sum() for row in rows)
  decoded = b"".join(TOKENIZER.decode_bytes(ids.tolist()) for ids in chosen.ids)
  assert decoded == chosen.text
  assert all(ids[0] == TOKENIZER.bos_id for ids in chosen.ids)


@given(st.lists(st.text(min_size=1), min_size=1, max_size=6), st.integers(1, 60))
def test_text_is_cut_to_the_bytes_asked_on_a_character_boundary(texts, num_bytes):
  whole = eval_set(texts)
  assert sorted(whole.documents) == sorted(texts)
  assert whole.num_bytes == sum(len(text.encode()) for text in texts)
  cut = eval_set(texts, num_bytes)
  assert cut.num_bytes == len(cut.text) <= num_bytes
  text = "".join(whole.documents)
  assert text.startswith("".join(cut.documents))
  # The next character would have been too many.
  taken = len("".join(cut.documents))
  if taken < len(text):
    assert cut.num_bytes + len(text[taken].encode()) > num_bytes
  assert cut.documents[:-1] == whole.documents[: max(len(cut.documents) - 1, 0)]


def test_all_batches_have_one_shape_and_processes_share_them():
  chosen = eval_set(["abcdefghij" * 5, "xyz" * 9])
  whole = list(chosen.batches(4))
  assert {b["inputs"].shape for b in whole} == {(4, 8)}
  halves = [list(chosen.batches(4, process, 2)) for process in range(2)]
  for batch, first, second in zip(whole, *halves, strict=True):
    for name, values in batch.items():
      joined = np.concatenate([first[name], second[name]])
      np.testing.assert_array_equal(joined, values)


@pytest.mark.parametrize(
  ("num_ids", "expected"),
  [(2, [0]), (9, [0]), (10, [0, 4]), (13, [0, 4]), (14, [0, 4, 8])],
)
def test_starts_of_windows(num_ids, expected):
  assert list(evaluation._starts(num_ids, 8, 4)) == expected
