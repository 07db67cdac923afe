"""Several sequences at once in llama.cpp."""

import numpy as np
import pytest

from effjax.cli.peers import llama_cpp
from effjax.core import errors
from tests.interop.gguf import tiny

pytestmark = pytest.mark.oracle

pytest.importorskip(llama_cpp.PACKAGE)


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
  path = tmp_path_factory.mktemp("llama") / "m.gguf"
  tiny.saved(path, "llama")
  with llama_cpp.Model(path) as model:
    yield model


def test_rows_equal_each_by_itself(loaded):
  tokens_BL = np.random.default_rng(0).integers(0, tiny.VOCAB, (8, 12))
  expected = np.stack([loaded.logits(row.tolist()) for row in tokens_BL])
  settings = {"rows": 8, "length": 300, "wide": True, "flash": False, "threads": 1}
  with loaded.context(**settings) as context:
    context.read(tokens_BL[:, :2], 0)  # to be forgotten
    context.clear()
    first = context.decode(tokens_BL[:, :9], 0)
    context.read(tokens_BL[:, 9:11], 9)
    second = context.last(2, 8).copy()
    third = context.decode(tokens_BL[:, 11:], 11)
  found = np.stack([first[:, 0], second, third[:, 0]], axis=1)
  np.testing.assert_allclose(found, expected[:, [8, 10, 11]], atol=1e-5)


def test_another_layout_is_refused(loaded, monkeypatch):
  monkeypatch.setattr(llama_cpp, "_SIZES", [512, 2048, 511, 1])
  with pytest.raises(errors.EffjaxError, match="laid out"):
    loaded.context()


def test_a_file_it_does_not_load_is_named(tmp_path):
  path = tmp_path / "m.gguf"
  path.write_bytes(b"GGUF and nothing else")
  with pytest.raises(errors.InputError, match="m.gguf"):
    llama_cpp.Model(path)


def test_it_says_what_it_was_built_for():
  assert llama_cpp.system_info()
