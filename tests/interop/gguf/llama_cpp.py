"""llama.cpp itself, out of the library inside xllamacpp: tokens and logits of a file.

Its C functions are called directly, which gives all logits and the tokenizer. Structs
of parameters are taken as they come (they are passed on the stack, so one that is
declared too large is read as far as it goes), and what is changed in them is found by
the default values around it.
"""

import ctypes
import functools
import pathlib

import numpy as np
import pytest

_STRUCT_BYTES = 512
_FIRST_TYPE, _LAST_TYPE = 20, 40  # between them lies the only pair of ones
_F16, _F32 = 1, 0
_AUTO = 4 * [-1]  # RoPE scaling, pooling, attention and flash attention
_NO_FLASH = 0


class _Struct(ctypes.Structure):
  _fields_ = [("fields", ctypes.c_int32 * (_STRUCT_BYTES // 4))]


class _Batch(ctypes.Structure):
  _fields_ = [
    ("num_tokens", ctypes.c_int32),
    ("token", ctypes.POINTER(ctypes.c_int32)),
    ("embedding", ctypes.c_void_p),
    ("position", ctypes.POINTER(ctypes.c_int32)),
    ("num_sequences", ctypes.POINTER(ctypes.c_int32)),
    ("sequence", ctypes.POINTER(ctypes.POINTER(ctypes.c_int32))),
    ("logits", ctypes.POINTER(ctypes.c_int8)),
  ]


@functools.cache
def _library():
  package = pytest.importorskip("xllamacpp")
  folder = pathlib.Path(package.__file__).parent
  library = ctypes.CDLL(str(next(folder.glob("xllamacpp*.so"))))
  pointer, integer = ctypes.c_void_p, ctypes.c_int32
  for name, result, arguments in (
    ("llama_model_default_params", _Struct, []),
    ("llama_context_default_params", _Struct, []),
    ("llama_model_load_from_file", pointer, [ctypes.c_char_p, _Struct]),
    ("llama_init_from_model", pointer, [pointer, _Struct]),
    ("llama_model_free", None, [pointer]),
    ("llama_free", None, [pointer]),
    ("llama_model_get_vocab", pointer, [pointer]),
    ("llama_vocab_n_tokens", integer, [pointer]),
    ("llama_vocab_get_add_bos", ctypes.c_bool, [pointer]),
    ("llama_vocab_is_eog", ctypes.c_bool, [pointer, integer]),
    ("llama_batch_init", _Batch, [integer, integer, integer]),
    ("llama_batch_free", None, [_Batch]),
    ("llama_decode", integer, [pointer, _Batch]),
    ("llama_get_logits_ith", ctypes.POINTER(ctypes.c_float), [pointer, integer]),
    ("llama_log_set", None, [pointer, pointer]),
    (
      "llama_tokenize",
      integer,
      [pointer, ctypes.c_char_p, integer, pointer, integer]
      + [ctypes.c_bool, ctypes.c_bool],
    ),
  ):
    function = getattr(library, name)
    function.restype, function.argtypes = result, arguments
  library.llama_log_set(ctypes.cast(_quiet, pointer), None)
  return library


@ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
def _quiet(level, text, data):
  del level, text, data


def _exact(params):
  """Keys and values in float32, and no flash attention, which computes in float16."""
  fields = params.fields
  types = [
    i for i in range(_FIRST_TYPE, _LAST_TYPE) if fields[i : i + 2] == [_F16, _F16]
  ]
  auto = [i for i in range(_FIRST_TYPE) if fields[i : i + 4] == _AUTO]
  assert (len(types), len(auto)) == (1, 1), "llama_context_params has changed"
  fields[types[0]] = fields[types[0] + 1] = _F32
  fields[auto[0] + 3] = _NO_FLASH
  return params


class Model:
  """A file, loaded by llama.cpp; use it as a context."""

  def __init__(self, path):
    self._library = _library()
    params = self._library.llama_model_default_params()
    self._model = self._library.llama_model_load_from_file(str(path).encode(), params)
    assert self._model, f"llama.cpp does not load {path}"
    self._vocab = self._library.llama_model_get_vocab(self._model)
    self.vocab_size = self._library.llama_vocab_n_tokens(self._vocab)
    self.add_bos = self._library.llama_vocab_get_add_bos(self._vocab)

  def __enter__(self):
    return self

  def __exit__(self, *error):
    self._library.llama_model_free(self._model)

  def encode(self, text, *, special=False):
    """The ids of a text, none added."""
    raw = text.encode()
    ids = np.zeros(len(raw) + 16, np.int32)
    count = self._library.llama_tokenize(
      self._vocab, raw, len(raw), ids.ctypes.data, ids.size, False, special
    )
    assert count >= 0
    return ids[:count].tolist()

  def ends(self):
    """The ids that end a text."""
    is_end = functools.partial(self._library.llama_vocab_is_eog, self._vocab)
    return {index for index in range(self.vocab_size) if is_end(index)}

  def logits(self, tokens):
    """float32 [L, V], with a KV cache of float32."""
    return self._run(tokens, 0)[1]

  def greedy(self, tokens, count):
    """The most likely continuation."""
    return self._run(tokens, count)[0]

  def _run(self, tokens, count):
    library = self._library
    params = _exact(library.llama_context_default_params())
    context = library.llama_init_from_model(self._model, params)
    assert context
    try:
      logits = self._decode(context, tokens, 0)
      found = []
      for _ in range(count):
        found.append(int(logits[-1].argmax()))
        logits = self._decode(context, found[-1:], len(tokens) + len(found) - 1)
      return found, logits
    finally:
      library.llama_free(context)

  def _decode(self, context, tokens, start):
    library = self._library
    batch = library.llama_batch_init(len(tokens), 0, 1)
    batch.num_tokens = len(tokens)
    for i, token in enumerate(tokens):
      batch.token[i], batch.position[i] = int(token), start + i
      batch.num_sequences[i], batch.sequence[i][0], batch.logits[i] = 1, 0, 1
    assert library.llama_decode(context, batch) == 0
    row_of = functools.partial(library.llama_get_logits_ith, context)
    shape = (self.vocab_size,)
    # Copied, as the library reuses its buffer.
    logits = np.stack(
      [np.ctypeslib.as_array(row_of(i), shape) for i in range(len(tokens))]
    )
    library.llama_batch_free(batch)
    return logits
