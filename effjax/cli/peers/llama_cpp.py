"""llama.cpp itself, out of the library inside xllamacpp: tokens and logits of a file.

Its C functions are called directly, which gives all logits, the tokenizer and several
sequences a call. Structs of parameters are taken as they come (they are passed on the
stack, so one that is declared too large is read as far as it goes), and what is changed
in them is found by the default values around it.
"""

import ctypes
import functools
import importlib.util
import os
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from effjax.core import errors

PACKAGE = "xllamacpp"
_STRUCT_BYTES = 512
_SIZES = [512, 2048, 512, 1]  # n_ctx, n_batch, n_ubatch, n_seq_max
_FIRST_TYPE, _LAST_TYPE = 20, 40  # between them lies the only pair of ones
_F16, _F32 = 1, 0
_AUTO = 4 * [-1]  # RoPE scaling, pooling, attention and flash attention
_NO_FLASH = 0
# llama.cpp rounds the tokens of a sequence up to these.
_PADDING = 256


class _Struct(ctypes.Structure):
  _fields_ = [("fields", ctypes.c_int32 * (_STRUCT_BYTES // 4))]


class _Batch(ctypes.Structure):
  _fields_ = [
    ("num_tokens", ctypes.c_int32),
    ("token", ctypes.c_void_p),
    ("embedding", ctypes.c_void_p),
    ("position", ctypes.c_void_p),
    ("num_sequences", ctypes.c_void_p),
    ("sequence", ctypes.c_void_p),
    ("logits", ctypes.c_void_p),
  ]


@functools.cache
def library() -> ctypes.CDLL:
  """The functions of llama.cpp, with their types, silenced.

  Raises:
    InputError: the package is not installed.
  """
  package = importlib.util.find_spec(PACKAGE)
  if package is None or package.origin is None:
    raise errors.InputError(f"llama.cpp comes with {PACKAGE}, which is not installed")
  folder = pathlib.Path(package.origin).parent
  loaded = ctypes.CDLL(str(next(folder.glob(f"{PACKAGE}*.so"))))
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
    ("llama_n_ctx", ctypes.c_uint32, [pointer]),
    ("llama_n_batch", ctypes.c_uint32, [pointer]),
    ("llama_n_seq_max", ctypes.c_uint32, [pointer]),
    ("llama_set_n_threads", None, [pointer, integer, integer]),
    ("llama_get_memory", pointer, [pointer]),
    ("llama_memory_clear", None, [pointer, ctypes.c_bool]),
    ("llama_decode", integer, [pointer, _Batch]),
    ("llama_get_logits_ith", ctypes.POINTER(ctypes.c_float), [pointer, integer]),
    ("llama_print_system_info", ctypes.c_char_p, []),
    ("llama_log_set", None, [pointer, pointer]),
    (
      "llama_tokenize",
      integer,
      [pointer, ctypes.c_char_p, integer, pointer, integer]
      + [ctypes.c_bool, ctypes.c_bool],
    ),
  ):
    function = getattr(loaded, name)
    function.restype, function.argtypes = result, arguments
  loaded.llama_log_set(ctypes.cast(_quiet, pointer), None)
  return loaded


@ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
def _quiet(level, text, data):
  del level, text, data


class Model:
  """A file, loaded by llama.cpp; use it as a context.

  Attributes:
    vocab_size: V.
    add_bos: whether its tokenizer begins a text with a token.
  """

  def __init__(self, path: str | os.PathLike):
    """Loads a GGUF file; raises InputError if llama.cpp does not."""
    self._library = library()
    params = self._library.llama_model_default_params()
    self._model = self._library.llama_model_load_from_file(str(path).encode(), params)
    if not self._model:
      raise errors.InputError(f"llama.cpp does not load {path}")
    self._vocab = self._library.llama_model_get_vocab(self._model)
    self.vocab_size: int = self._library.llama_vocab_n_tokens(self._vocab)
    self.add_bos: bool = self._library.llama_vocab_get_add_bos(self._vocab)

  def __enter__(self):
    return self

  def __exit__(self, *error: Any):
    self._library.llama_model_free(self._model)

  def encode(self, text: str, *, special: bool = False) -> list[int]:
    """The ids of a text, none added."""
    raw = text.encode()
    ids = np.zeros(len(raw) + 16, np.int32)
    count = self._library.llama_tokenize(
      self._vocab, raw, len(raw), ids.ctypes.data, ids.size, False, special
    )
    if count < 0:
      raise errors.EffjaxError("llama.cpp needs more tokens than bytes for this text")
    return ids[:count].tolist()

  def ends(self) -> set[int]:
    """The ids that end a text."""
    is_end = functools.partial(self._library.llama_vocab_is_eog, self._vocab)
    return {index for index in range(self.vocab_size) if is_end(index)}

  def context(self, **settings: Any) -> "Context":
    """A KV cache to decode with; see Context."""
    return Context(self._model, self.vocab_size, **settings)

  def logits(self, tokens: Sequence[int]) -> np.ndarray:
    """float32 [L, V], with a KV cache of float32."""
    with self.context(wide=True, flash=False) as context:
      return context.decode(np.array([tokens]), 0, every=True)[0]

  def greedy(self, tokens: Sequence[int], count: int) -> list[int]:
    """The most likely continuation, with a KV cache of float32."""
    with self.context(wide=True, flash=False) as context:
      found: list[int] = []
      logits = context.decode(np.array([tokens]), 0)
      for k in range(count):
        found.append(int(logits[0, -1].argmax()))
        logits = context.decode(np.array([found[-1:]]), len(tokens) + k)
      return found


class Context:
  """Sequences that are decoded together, and their KV cache."""

  def __init__(
    self,
    model: int,
    vocab_size: int,
    *,
    rows: int = 1,
    length: int = 512,
    wide: bool = False,
    flash: bool = True,
    threads: int | None = None,
  ):
    """Allocates the cache.

    Args:
      model: pointer of the loaded model, which has to outlive this.
      vocab_size: V.
      rows: sequences.
      length: tokens each can hold.
      wide: keys and values are float32 in place of float16.
      flash: leave flash attention, which computes in float16, to llama.cpp's choice.
      threads: of every call; llama.cpp's default if None.

    Raises:
      EffjaxError: the library's structs are not laid out as known here.
    """
    self._library = library()
    self._vocab_size = vocab_size
    params = self._library.llama_context_default_params()
    fields = params.fields
    sizes = _place(fields, _SIZES, 0, _FIRST_TYPE)
    total = rows * (-(-length // _PADDING) * _PADDING)
    fields[sizes], fields[sizes + 3] = total, rows
    # A context takes no more tokens a call than this.
    fields[sizes + 1] = max(total, _SIZES[1])
    if wide:
      types = _place(fields, [_F16, _F16], _FIRST_TYPE, _LAST_TYPE)
      fields[types] = fields[types + 1] = _F32
    if not flash:
      fields[_place(fields, _AUTO, 0, _FIRST_TYPE) + 3] = _NO_FLASH
    self._context = self._library.llama_init_from_model(model, params)
    if not self._context:
      raise errors.EffjaxError("llama.cpp makes no context of these sizes")
    found = [
      getattr(self._library, f"llama_n_{name}")(self._context)
      for name in ("ctx", "seq_max")
    ]
    if found != [total, rows]:
      raise _changed()
    if threads is not None:
      self._library.llama_set_n_threads(self._context, threads, threads)

  def __enter__(self):
    return self

  def __exit__(self, *error: Any):
    self._library.llama_free(self._context)

  def clear(self) -> None:
    """Forgets every token."""
    memory = self._library.llama_get_memory(self._context)
    self._library.llama_memory_clear(memory, False)

  def decode(
    self, tokens_BL: np.ndarray, start: int, *, every: bool = False
  ) -> np.ndarray:
    """Reads tokens of every sequence, from position `start` on.

    Returns:
      float32 [B, L, V] with `every`, else of the last tokens [B, 1, V].
    """
    self.read(tokens_BL, start, every=every)
    rows, length = tokens_BL.shape
    places = range(length) if every else (length - 1,)
    # Copied, as the library reuses its buffer.
    return np.stack(
      [np.stack([self._row(b * length + l) for l in places]) for b in range(rows)]
    ).copy()

  def read(self, tokens_BL: np.ndarray, start: int, *, every: bool = False) -> None:
    """`decode`, with the logits left where `last` finds them."""
    rows, length = tokens_BL.shape
    token = np.ascontiguousarray(tokens_BL, np.int32)
    position = np.tile(np.arange(start, start + length, dtype=np.int32), rows)
    counts = np.ones(token.size, np.int32)
    sequence = np.arange(rows, dtype=np.int32)
    owner = sequence.ctypes.data + sequence.itemsize * np.repeat(
      np.arange(rows, dtype=np.uint64), length
    )
    wanted = np.full(tokens_BL.shape, every, np.int8)
    wanted[:, -1] = 1
    arrays = (token, None, position, counts, owner.astype(np.uint64), wanted)
    batch = _Batch(token.size, *(a if a is None else a.ctypes.data for a in arrays))
    code = self._library.llama_decode(self._context, batch)
    if code:
      raise errors.EffjaxError(f"llama_decode of {tokens_BL.shape} returned {code}")
    self._row(token.size - 1)  # waits until they are there

  def last(self, length: int, rows: int) -> np.ndarray:
    """float32 [B, V] after the last tokens of a `read` of `[rows, length]`."""
    return np.stack([self._row((b + 1) * length - 1) for b in range(rows)])

  def _row(self, index: int) -> np.ndarray:
    row = self._library.llama_get_logits_ith(self._context, index)
    return np.ctypeslib.as_array(row, (self._vocab_size,))


def system_info() -> str:
  """What the library was built to use of this machine, such as "AVX2, OPENMP"."""
  text = library().llama_print_system_info().decode()
  parts = [part.strip() for part in text.replace("CPU :", "|").split("|")]
  return ", ".join(p.removesuffix(" = 1") for p in parts if p.endswith(" = 1"))


def _place(fields: Any, wanted: list[int], start: int, stop: int) -> int:
  """Index of the only run of these values among fields `[start, stop)`."""
  found = [i for i in range(start, stop) if list(fields[i : i + len(wanted)]) == wanted]
  if len(found) != 1:
    raise _changed()
  return found[0]


def _changed() -> errors.EffjaxError:
  return errors.EffjaxError(
    f"llama_context_params of the installed {PACKAGE} is not laid out as known here; "
    "install a version that effjax's requirements-oracle.txt names"
  )
