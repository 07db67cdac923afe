import random
import time

import pytest

from effjax.core import errors
from effjax.data.builders import stdlib


def table(seed: int) -> str:
  """A conversion table: like every other one but for a few entries."""
  rng = random.Random(seed)
  lines = [f"  {i}: 'name of character {i}',\n" for i in range(200)]
  for place in rng.sample(range(200), 5):
    lines[place] = f"  {place}: 'other {seed}',\n"
  return "TABLE = {\n" + "".join(lines) + "}\n"


def module(seed: int) -> str:
  rng = random.Random(seed)
  return "".join(f"value_{rng.randrange(10**6)} = {i}\n" for i in range(60))


@pytest.fixture
def library(tmp_path):
  files = {f"encodings/cp{i}.py": table(i) for i in range(20)}
  files |= {f"module_{i}.py": module(i) for i in range(30)}
  files |= {
    "copied.py": module(3),
    "empty.py": "\n",
    "latin.py": "# -*- coding: latin-1 -*-\nname = 'é'\n",
    "test/test_module.py": module(100),
    "email/tests/test_email.py": module(101),
    "idlelib/idle_test/test_idle.py": module(102),
    "site-packages/other.py": module(103),
    "pydoc_data/topics.py": module(104),
    "__pycache__/module_1.py": module(105),
    "config-3.12-linux/python-config.py": module(106),
    "_sysconfigdata__linux_.py": module(107),
    "notes.txt": "not source",
  }
  for name, text in files.items():
    path = tmp_path / "lib" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode("latin-1"))
  return tmp_path / "lib"


def open_corpus(library, **options):
  return stdlib.TECHNIQUE.open(options, str(library))


def names(corpus, split):
  return [record["name"].decode() for record in corpus.sources[split]]


def test_takes_source_files_and_drops_near_duplicates(library, fresh_cache):
  corpus = open_corpus(library)
  kept = names(corpus, "train") + names(corpus, "validation")
  expected = ["latin.py", "encodings/cp0.py", "copied.py"]
  expected += [f"module_{i}.py" for i in range(30) if i != 3]
  assert sorted(kept) == sorted(expected)
  assert corpus.facts["dropped"] == {"blank": 1, "exact": 1, "near": 19}
  assert corpus.facts["python"] == "of manual_dir"
  assert "name = 'é'" in "".join(
    text for split in corpus.sources for text in corpus.texts(split)
  )


def test_each_file_is_whole_and_in_one_split(library, fresh_cache):
  corpus = open_corpus(library, duplicates="keep", validation_fraction=0.3)
  train, validation = names(corpus, "train"), names(corpus, "validation")
  assert not set(train) & set(validation)
  assert train and validation
  for split in corpus.sources:
    for name, text in zip(names(corpus, split), corpus.texts(split), strict=True):
      assert text.encode("latin-1") == (library / name).read_bytes()


def test_the_same_files_are_the_same_corpus_wherever_they_are(
  library, tmp_path, fresh_cache
):
  first = open_corpus(library)
  moved = library.rename(tmp_path / "elsewhere")
  second = open_corpus(moved)
  assert second.facts == first.facts
  assert names(second, "validation") == names(first, "validation")


def test_a_changed_file_is_another_corpus(library, fresh_cache):
  first = open_corpus(library)
  with open(library / "module_5.py", "a") as file:
    file.write("more = 1\n")
  assert open_corpus(library).facts["hash"] != first.facts["hash"]


def test_a_folder_without_source_is_refused(tmp_path):
  with pytest.raises(errors.InputError, match=r"no \.py files in"):
    stdlib.TECHNIQUE.check({}, str(tmp_path))


def test_the_running_python_has_a_large_clean_corpus(cache_folder):
  start = time.process_time()
  corpus = stdlib.TECHNIQUE.open({}, None)
  assert time.process_time() - start < 60
  assert 6_000_000 < corpus.facts["bytes"]["train"] < 20_000_000
  assert corpus.facts["bytes"]["validation"] > 200_000
  assert corpus.facts["dropped"]["near"] > 50
  kept = names(corpus, "train") + names(corpus, "validation")
  assert not [name for name in kept if "/test" in name or "site-packages" in name]
  tables = [name for name in kept if name.startswith("encodings/cp")]
  assert len(tables) < 12
  # Lines long enough to be telling hardly repeat between the splits.
  seen = {line for t in corpus.texts("train") for line in t.split("\n")}
  lines = [x for t in corpus.texts("validation") for x in t.split("\n") if len(x) > 50]
  assert len(lines) > 500
  assert sum(line in seen for line in lines) / len(lines) < 0.1
