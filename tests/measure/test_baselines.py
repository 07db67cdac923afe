import bz2
import gzip
import lzma
import random

import pytest

from effjax.measure import baselines


@pytest.fixture(autouse=True)
def cache_folder(tmp_path, monkeypatch):
  monkeypatch.setenv("EFFJAX_CACHE", str(tmp_path))
  return tmp_path


def _text(seed, size=20_000):
  rng = random.Random(seed)
  words = ["return", "self", "value", "for", "in", "range", "print", "lambda", "none"]
  return " ".join(rng.choice(words) for _ in range(size // 6)).encode()


def test_compressed_text_reads_back_at_the_reported_size():
  text = _text(0)
  found = {r["name"]: r["bits_per_byte"] for r in baselines.measure(text)}
  assert set(found) == {"gzip -9", "bzip2 -9", "xz -9e"}
  for name, read in (
    ("gzip -9", gzip.decompress),
    ("bzip2 -9", bz2.decompress),
    ("xz -9e", lzma.decompress),
  ):
    packed = baselines._COMPRESSORS[name](text)
    assert read(packed) == text
    assert found[name] == 8 * len(packed) / len(text)


def test_priming_with_the_same_text_leaves_almost_nothing():
  text = _text(0)
  other = baselines.primed_size(text, _text(1), 9)
  same = baselines.primed_size(text, text, 9)
  alone = len(lzma.compress(text, preset=9))
  assert same < 0.05 * alone
  assert same < other <= alone * 1.02


def test_result_is_cached_by_content(monkeypatch):
  first = baselines.measure(_text(0), _text(1), 1)
  monkeypatch.setattr(baselines, "_compute", lambda *args: [{"name": "computed"}])
  assert baselines.measure(_text(0), _text(1), 1) == first
  assert len(first) == 4 and first[-1]["name"].startswith("xz -1, primed")
  for other in ((_text(2), _text(1), 1), (_text(0), _text(2), 1), (_text(0), None, 1)):
    assert baselines.measure(*other) == [{"name": "computed"}]
