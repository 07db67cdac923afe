import json
import os

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from effjax.core import errors
from effjax.data.builders import jsonl, parquet, text_files

TEXTS = {f"part/{i:02d}.txt": f"text number {i}\nwith é\n" for i in range(40)}


@pytest.fixture
def folder(tmp_workdir, fresh_cache):
  for name, text in TEXTS.items():
    path = tmp_workdir / "texts" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
  (tmp_workdir / "texts" / "image.png").write_bytes(b"\x89PNG\xff")
  return tmp_workdir / "texts"


def read(corpus):
  return {
    split: {r["name"].decode(): r["text"].decode() for r in source}
    for split, source in corpus.sources.items()
  }


@pytest.mark.parametrize(
  ("paths", "manual_dir"),
  [
    (["texts"], None),
    (["texts/**/*.txt"], None),
    (["part/*.txt"], "texts"),
    (["part"], "texts"),
    ([], "texts"),
    (["texts/part", "texts/part/00.txt"], None),
  ],
)
def test_text_files_are_found(folder, paths, manual_dir):
  corpus = text_files.TECHNIQUE.open({"paths": paths}, manual_dir)
  found = read(corpus)
  texts = {os.path.basename(n): t for split in found.values() for n, t in split.items()}
  assert texts == {os.path.basename(name): text for name, text in TEXTS.items()}
  assert found["train"] and found["validation"]


def test_validation_files_of_ones_own(folder):
  options = {"paths": ["texts"], "validation_paths": ["texts/part/0*.txt"]}
  found = read(text_files.TECHNIQUE.open(options, None))
  assert len(found["validation"]) == 10 and len(found["train"]) == 30
  assert all("/0" in name for name in found["validation"])


def test_one_file_is_cut_in_two(tmp_workdir, fresh_cache):
  text = "".join(f"line {i}\n" for i in range(1000))
  (tmp_workdir / "book.txt").write_text(text)
  corpus = text_files.TECHNIQUE.open({"paths": ["book.txt"]}, None)
  (train,), (validation,) = corpus.texts("train"), corpus.texts("validation")
  assert train + validation == text
  assert corpus.facts["bytes"] == {"train": len(train), "validation": len(validation)}


def test_a_changed_file_is_read_again(folder):
  first = text_files.TECHNIQUE.open({"paths": ["texts"]}, None)
  path = folder / "part" / "03.txt"
  path.write_text(path.read_text().replace("3", "4"))
  os.utime(path, ns=(1, 1))
  second = text_files.TECHNIQUE.open({"paths": ["texts"]}, None)
  assert second.facts["hash"] != first.facts["hash"]


def test_bad_text_files(folder):
  def refused(options, manual_dir=None):
    with pytest.raises(errors.InputError) as info:
      text_files.TECHNIQUE.open(options, manual_dir)
    assert "\n" not in str(info.value)
    return str(info.value)

  assert "needs files" in refused({})
  assert "no file at" in refused({"paths": ["missing.txt"]})
  (folder.parent / "empty").mkdir()
  assert "no .txt/.md/.rst/.py files in" in refused({"paths": ["empty"]})
  (folder / "part" / "latin.txt").write_bytes("naïve".encode("latin-1"))
  message = refused({"paths": ["texts"]})
  assert "latin.txt is not UTF-8 text: byte 0xef at offset 2" in message
  blank = folder.parent / "blank.txt"
  blank.write_text(" \n")
  assert "is empty" in refused({"paths": ["blank.txt"]})
  assert "did you mean 'paths'" in refused({"path": ["texts"]})


ROWS = [{"body": f"row {i} é", "id": i} for i in range(50)]


def test_jsonl(tmp_workdir, fresh_cache):
  lines = [json.dumps(row) + "\n" for row in ROWS]
  (tmp_workdir / "a.jsonl").write_text("".join(lines[:30]) + "\n")
  (tmp_workdir / "b.jsonl").write_text("".join(lines[30:]), encoding="utf-8")
  found = read(jsonl.TECHNIQUE.open({"field": "body"}, str(tmp_workdir)))
  texts = found["train"] | found["validation"]
  assert sorted(texts.values()) == sorted(row["body"] for row in ROWS)
  assert texts["b.jsonl#1"] == "row 30 é"
  assert found["validation"]


@pytest.mark.parametrize(
  ("content", "message"),
  [
    (b'{"text": "a"}\n{"text": \n', "line 2 is not JSON"),
    (b'{"text": "a"}\n[1]\n', "line 2 is not a JSON object"),
    (b'{"txt": "a"}\n', "line 1: 'text'; did you mean 'txt'"),
    (b'{"text": 3}\n', "line 1: field 'text' must be a string, got int"),
    (b'{"text": "a"}\n{"text": "\xff"}\n', "byte 0xff at offset 24"),
    (b"\n\n", "is empty"),
  ],
)
def test_bad_jsonl(tmp_workdir, fresh_cache, content, message):
  (tmp_workdir / "a.jsonl").write_bytes(content)
  with pytest.raises(errors.InputError) as info:
    jsonl.TECHNIQUE.open({"paths": ["a.jsonl"]}, None)
  assert message in str(info.value)
  assert "\n" not in str(info.value)


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string()])
def test_parquet(tmp_workdir, fresh_cache, kind):
  texts = [row["body"] for row in ROWS] + [None]
  table = pa.table({"body": pa.array(texts, kind), "id": range(len(texts))})
  pq.write_table(table, tmp_workdir / "a.parquet", row_group_size=7)
  options = {"field": "body", "paths": ["a.parquet"]}
  found = read(parquet.TECHNIQUE.open(options, None))
  texts = found["train"] | found["validation"]
  assert texts == {f"a.parquet#{i}": row["body"] for i, row in enumerate(ROWS)}


def test_bad_parquet(tmp_workdir, fresh_cache):
  def refused(field="text"):
    with pytest.raises(errors.InputError) as info:
      parquet.TECHNIQUE.open({"field": field, "paths": ["a.parquet"]}, None)
    assert "\n" not in str(info.value)
    return str(info.value)

  path = tmp_workdir / "a.parquet"
  path.write_bytes(b"something else entirely")
  assert "is not a Parquet file" in refused()
  invalid = pa.Array.from_buffers(
    pa.string(), 1, [None, pa.py_buffer(b"\0\0\0\0\2\0\0\0"), pa.py_buffer(b"a\xff")]
  )
  pq.write_table(pa.table({"texts": ["a"], "id": [1], "bad": invalid}), path)
  assert "did you mean 'texts'" in refused()
  assert "must hold strings, got int64" in refused("id")
  assert "is not UTF-8 text: byte 0xff at offset 1" in refused("bad")
