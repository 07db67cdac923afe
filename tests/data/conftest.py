import gzip
import pathlib
import struct

import numpy as np
import pytest

from effjax.data import config, pipeline


@pytest.fixture(scope="session", autouse=True)
def cache_folder(tmp_path_factory) -> pathlib.Path:
  """A cache of the tests' own; builders and tokenizers are made once a session."""
  folder = tmp_path_factory.mktemp("cache")
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv("EFFJAX_CACHE", str(folder))
    yield folder


@pytest.fixture
def fresh_cache(tmp_path, monkeypatch) -> pathlib.Path:
  """An empty cache for one test."""
  monkeypatch.setenv("EFFJAX_CACHE", str(tmp_path / "cache"))
  return tmp_path / "cache"


@pytest.fixture(scope="session")
def tiny_config() -> config.DataConfig:
  return config.DataConfig(
    corpus="synthetic",
    vocab_size=300,
    sequence_length=24,
    batch_size=8,
    eval_bytes=600,
    seed=3,
  )


@pytest.fixture(scope="session")
def tiny(cache_folder, tiny_config) -> pipeline.TextData:
  return pipeline.open_data(tiny_config)


@pytest.fixture
def fashion_mnist_dir(tmp_path) -> pathlib.Path:
  """The four IDX files with 20 and 10 random images."""
  rng = np.random.default_rng(0)
  for prefix, count in (("train", 20), ("t10k", 10)):
    images = rng.integers(0, 256, (count, 28, 28), np.uint8)
    labels = rng.integers(0, 10, count, np.uint8)
    arrays = {"images-idx3": images, "labels-idx1": labels}
    for name, values in arrays.items():
      header = struct.pack(f">I{values.ndim}I", 0x0800 + values.ndim, *values.shape)
      data = gzip.compress(header + values.tobytes(), mtime=0)
      (tmp_path / f"{prefix}-{name}-ubyte.gz").write_bytes(data)
  return tmp_path
