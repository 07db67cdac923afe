"""A decoder as an ONNX file that existing runtimes and their generation loops take.

Inputs `input_ids` int64 `[batch, length]` and `attention_mask` int64 `[batch, total]`;
with a cache also `past_key_values.<i>.key` and `.value` float32 `[batch, kv_heads,
past, head_dim]`, where total = past + length and past is 0 at first. Outputs `logits`
float32 `[batch, length, vocab]`, and `present.<i>.key` and `.value` `[batch, kv_heads,
total, head_dim]`, to be given as past the next time. Names and shapes are those of
Hugging Face's optimum. The mask is 0 at padding, which may stand on either side of a
row; positions count what is not padding. <i> counts the layers that have keys of their
own.

| type | matrices                               | operators                          |
|------|----------------------------------------|------------------------------------|
| fp32 | float32                                | ONNX's own, opset 17, IR version 8 |
| int4 | 4 bits in blocks, activations float32  | MatMulNBits of com.microsoft       |
| int8 | 8 bits, a scale an output; activations | ONNX's own: DynamicQuantizeLinear, |
|      | 8 bits, a scale a call                 | MatMulInteger                      |

Opset 17 is in the range of TensorRT 10's parser from its first release on (9 to 20).
A file of type fp32 has no other operators than these, which its table of operators
lists: Add, And, Cast, Concat, Cos, CumSum (of float32), Div, Erf, Gather, Identity,
LayerNormalization, Less, MatMul, Max, Mul, ReduceMean, ReduceSum, Reshape,
ScatterElements, Shape, Sigmoid, Sin, Slice, Softmax, Sqrt, Sub, Tanh, TopK, Transpose,
Unsqueeze, Where. The other types are for ONNX Runtime: TensorRT parses neither of their
products.

Differences from the model here: everything that is not a matrix is computed in float32;
a layer with a window gets the whole cache and masks it; all experts of a mixture run
for every token, and none drops one. In type int8 the activations of a call share one
asymmetric uint8 grid, padding included, where a token here has a symmetric one of its
own: batch and padding change the last digits of an answer. On x86 processors without
VNNI ONNX Runtime adds pairs of such products in 16 bits, which saturate, unless
`session.x64quantprecision` is "1".
"""

import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

from effjax.core import errors
from effjax.interop import caches
from effjax.interop.hf import tokenizer_files
from effjax.interop.onnx import decoder as decoder_graph
from effjax.interop.onnx import files, parameters
from effjax.interop.onnx import graph as graph_lib
from effjax.interop.onnx import matrices as matrices_lib
from effjax.models import decoder

TYPES = matrices_lib.TYPES
# What a file of type fp32 may hold; see above.
OPS = frozenset(
  "Add And Cast Concat Cos CumSum Div Erf Gather Identity LayerNormalization Less "
  "MatMul Max Mul ReduceMean ReduceSum Reshape ScatterElements Shape Sigmoid Sin Slice "
  "Softmax Sqrt Sub Tanh TopK Transpose Unsqueeze Where".split()
)


def save(
  path: str | os.PathLike,
  model: Any,
  params: Mapping[str, Any],
  specs: Mapping[str, Any] | None = None,
  tokenizer: Any = None,
  *,
  type: str = "fp32",
  cache: bool = True,
  dense: bool = False,
) -> list[str]:
  """Writes a file, and `<name>.data` beside it over 1.5 GB; whole or not at all.

  Leaves of 4 bits are written in type int4 as they are, and those of 8 bits with one
  symmetric scale an output in type int8: not one code changes. Plain matrices are
  rounded as `rtn` does, in groups of 32 inputs in type int4. Looked-up embeddings,
  norms, biases and routers are float32 in every type.

  Args:
    path: the file; it must not exist.
    model: a Decoder of attention layers.
    params: its parameters.
    specs: not needed; as every exporter is called.
    tokenizer: its tokenizer.json and the ids of its special tokens become metadata of
      the file, which runtimes show by name; or None.
    type: one of TYPES.
    cache: whether the graph takes past keys and values, to decode step by step.
    dense: multiply out compressed weights that the type cannot hold as they are; in
      types int4 and int8 they are rounded again.

  Returns:
    Notes, one line each: what was rounded or multiplied out, and what differs.

  Raises:
    InputError: the file exists, the package onnx is missing, a layer or a compressed
      weight that cannot be written.
  """
  del specs
  path = pathlib.Path(path)
  files.require_free(path)
  if type not in TYPES:
    raise errors.unknown("type of an ONNX file", type, TYPES)
  if not isinstance(model, decoder.Decoder):
    raise errors.InputError(
      f"an export to ONNX writes decoders, not a model of {model.__class__.__name__}"
    )
  caches.require_float(model.config, "an ONNX file")
  decoder_graph.check(model.config)
  graph = graph_lib.Graph()
  held = parameters.Parameters(model, params)
  matrices = matrices_lib.Matrices(graph, held, type, dense)
  made = decoder_graph.Decoder(model.config, matrices, cache)
  made.write()
  external = files.write(path, graph, _metadata(tokenizer, type, made.num_caches))
  notes = _notes(model, matrices, type, cache)
  if external:
    notes.append(f"the weights are in {files.data_path(path).name}: keep it beside it")
  return notes


def _metadata(tokenizer: Any, type: str, num_caches: int) -> dict[str, str]:
  """What the file says of itself."""
  texts = {"effjax.type": type, "effjax.num_caches": str(num_caches)}
  for name, value in tokenizer_files.special_ids(tokenizer).items():
    if value is not None:
      texts[name] = json.dumps(value)
  return texts | tokenizer_files.files(tokenizer)


def _notes(
  model: Any, matrices: matrices_lib.Matrices, type: str, cache: bool
) -> list[str]:
  """What a user should know of the file."""
  notes = []
  for paths, what in (
    (matrices.rounded, f"rounded to {type}, as no codes of that kind were there"),
    (matrices.unpacked, "multiplied out"),
  ):
    if paths:
      unique = list(dict.fromkeys(paths))
      plural = "matrix" if len(unique) == 1 else "matrices"
      notes.append(f"{len(unique)} {plural} {what}: {unique[0]}, ...")
  if type == "int8":
    notes.append(
      "activations share one uint8 scale a call, where the model here has one a token"
    )
  layers = model.config.layers
  if model.precision.compute != "float32":
    notes.append(f"computes in float32, the model in {model.precision.compute}")
  if any(layer.mlp == "moe" for layer in layers):
    notes.append("every expert runs for every token")
  windows = [layer.build_mixer_options().window for layer in layers]
  if cache and any(windows):
    notes.append("layers with a window take the whole cache, and mask it")
  if type != "fp32":
    notes.append("for ONNX Runtime; TensorRT does not parse its products")
  return notes
