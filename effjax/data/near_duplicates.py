"""Near-duplicate detection by MinHash and locality-sensitive hashing.

Source: Broder 1997, "On the resemblance and containment of documents": the resemblance
of two texts is the Jaccard similarity of their shingle sets, estimated from the minima
of random permutations; the `datasketch` library does the permutations and the banding.
Deviations: shingles are five consecutive words or punctuation marks, hashed with CRC-32
a word and a polynomial over the five, so a whole text is hashed by array operations.
"""

import re
import zlib

import datasketch
import numpy as np

_WORD = re.compile(r"\w+|[^\w\s]")
_SHINGLE_WORDS = 5
_NUM_PERMUTATIONS = 128
_BLOCK = 8192  # Shingles permuted at once: bounds the memory, not the result.
_POLYNOMIAL = np.uint64(0x100000001B3)
_MIXER = np.uint64(0x9E3779B97F4A7C15)


class Index:
  """The texts seen so far, to be asked whether a new one is much like one of them.

  Attributes:
    similarity: estimated Jaccard similarity from which two texts are near-duplicates;
      the estimate's standard error is below 0.045.
  """

  def __init__(self, similarity: float):
    self.similarity = similarity
    self._index = datasketch.MinHashLSH(
      threshold=similarity, num_perm=_NUM_PERMUTATIONS
    )
    self._sketches: list[datasketch.MinHash] = []
    self._word_hashes: dict[str, int] = {}

  def add(self, text: str) -> int | None:
    """Adds a text, unless it resembles an earlier one.

    Returns:
      The number (in the order added) of the most similar earlier text, or None if
      there is none at or above `similarity`; only then the text is added.
    """
    sketch = self._sketch(text)
    found = sorted(self._index.query(sketch))
    scores = [self._sketches[i].jaccard(sketch) for i in found]
    if scores and max(scores) >= self.similarity:
      return found[int(np.argmax(scores))]
    self._index.insert(len(self._sketches), sketch)
    self._sketches.append(sketch)
    return None

  def _sketch(self, text: str) -> datasketch.MinHash:
    shingles = self._shingles(text)
    sketch = datasketch.MinHash(
      num_perm=_NUM_PERMUTATIONS, seed=1, hashfunc=int, scheme="affine32"
    )
    for start in range(0, len(shingles), _BLOCK):
      sketch.update_batch(shingles[start : start + _BLOCK].tolist())
    return sketch

  def _shingles(self, text: str) -> np.ndarray:
    """The distinct 32-bit hashes of the shingles of a text."""
    words = _WORD.findall(text)
    known = self._word_hashes
    for word in set(words):
      if word not in known:
        known[word] = zlib.crc32(word.encode())
    hashes = np.fromiter((known[word] for word in words), np.uint64, len(words))
    num_words = min(_SHINGLE_WORDS, len(hashes))
    count = len(hashes) - num_words + 1 if num_words else 0
    mixed = np.zeros(count, np.uint64)
    for k in range(num_words):
      mixed = mixed * _POLYNOMIAL + hashes[k : k + count]
    return np.unique((mixed * _MIXER) >> np.uint64(32))
