import ctypes
import pathlib

import numpy as np
import pytest

from effjax.interop.gguf import formats


@pytest.fixture(scope="session")
def ggml_encode():
  """ggml's own quantizers, out of the library inside xllamacpp: encode(x, type)."""
  package = pytest.importorskip("xllamacpp")
  library = next(pathlib.Path(package.__file__).parent.glob("xllamacpp*.so"))
  quantize = ctypes.CDLL(str(library)).ggml_quantize_chunk
  pointer, int64 = ctypes.c_void_p, ctypes.c_int64
  quantize.restype = ctypes.c_size_t
  quantize.argtypes = [ctypes.c_int, pointer, pointer, int64, int64, int64, pointer]

  def encode(x, type):
    x = np.ascontiguousarray(x, np.float32)
    raw = np.zeros(formats.raw_shape(formats.TYPES[type], x.shape), np.uint8)
    rows = x.size // x.shape[-1]
    number = formats.TYPES[type].number
    written = quantize(
      number, x.ctypes.data, raw.ctypes.data, 0, rows, x.shape[-1], None
    )
    assert written == raw.size
    return raw

  return encode
