"""Softmax attention in ONNX, over the tokens at hand and those of a cache.

Letters as everywhere, and R query heads a key head, T tokens of the mask: those of the
cache and those at hand.
"""

import math
from typing import Any

import numpy as np

from effjax.interop.onnx import graph as graph_lib
from effjax.interop.onnx import matrices as matrices_lib
from effjax.interop.onnx import norms
from effjax.ops.attention import alibi, rope_scaling

# A score that no softmax gives any weight, and finite: a row of padding sees nothing.
_MASKED = float(np.finfo(np.float32).min)
_LAST = 2**63 - 1


class Places:
  """Where the tokens stand, and who sees whom: what all layers share.

  A token's position is the number of tokens before it that are not padding, so that
  padding may stand anywhere: right of a prompt, and after decoding on, in its middle.
  """

  def __init__(self, graph: graph_lib.Graph, ids: str, mask: str, has_cache: bool):
    """Counts positions.

    Args:
      graph: where the nodes go.
      ids: int64 `[B, L]`.
      mask: int64 `[B, T]`, 0 at padding.
      has_cache: whether there may be more tokens in the mask than in `ids`.
    """
    self._graph = graph
    self._rotations: dict[Any, tuple[str, str]] = {}
    self._seen: dict[int | None, str] = {}
    op = graph.op
    with graph.scope("places"):
      # In float32, exact to 2^24: TensorRT sums no integers.
      self._valid_BT = op("Cast", mask, to=1)
      counted_BT = op("CumSum", self._valid_BT, graph.constant(1, np.int64))
      kv_BT = q_BL = op("Sub", counted_BT, graph.constant(1.0))
      if has_cache:
        total, new = (
          op("Slice", op("Shape", x), graph.integers(1), graph.integers(2))
          for x in (mask, ids)
        )
        start = op("Sub", total, new)
        q_BL = op("Slice", kv_BT, start, graph.integers(_LAST), graph.integers(1))
      # Padding before the first token has no position; any will do.
      self.positions_BL = op("Max", q_BL, graph.constant(0.0))
      self._distance_BLT = op(
        "Sub",
        op("Unsqueeze", self.positions_BL, graph.integers(2)),
        op("Unsqueeze", kv_BT, graph.integers(1)),
      )

  def seen(self, window: int | None) -> str:
    """Bool `[B, 1, 1, L, T]`: may the query see the key?"""
    if window not in self._seen:
      graph = self._graph
      op = graph.op
      with graph.scope("places"):
        valid_B1T = op("Unsqueeze", self._valid_BT, graph.integers(1))
        seen = op(
          "And",
          op("Less", graph.constant(0.5), valid_B1T),
          op("Less", graph.constant(-0.5), self._distance_BLT),
        )
        if window is not None:
          near = op("Less", self._distance_BLT, graph.constant(float(window)))
          seen = op("And", seen, near)
        self._seen[window] = op("Unsqueeze", seen, graph.integers(1, 2))
    return self._seen[window]

  def distance(self) -> str:
    """Float32 `[B, 1, 1, L, T]`: how far back a key is."""
    return self._graph.op("Unsqueeze", self._distance_BLT, self._graph.integers(1, 2))

  def rotation(self, options: Any) -> tuple[str, str]:
    """The rotary embedding of a layer: cos and sin `[B, L, 1, K / 2]`."""
    key = (options.head_dim, options.rope_theta, repr(options.rope_scaling))
    if key not in self._rotations:
      graph = self._graph
      op = graph.op
      scaling = options.rope_scaling
      frequency = rope_scaling.frequencies(key[0], key[1], scaling)
      factor = graph.constant(rope_scaling.attention_factor(scaling))
      with graph.scope("places"):
        position_BL11 = op("Unsqueeze", self.positions_BL, graph.integers(2, 3))
        angle = op("Mul", position_BL11, graph.constant(frequency))
        cos, sin = (op(name, angle) for name in ("Cos", "Sin"))
        if rope_scaling.attention_factor(scaling) != 1:
          cos, sin = (op("Mul", part, factor) for part in (cos, sin))
      self._rotations[key] = cos, sin
    return self._rotations[key]


class Attention:
  """One layer's attention.

  Attributes:
    options: its AttentionOptions.
    path: of its parameters.
  """

  def __init__(
    self, matrices: matrices_lib.Matrices, places: Places, options: Any, path: str
  ):
    """See the attributes."""
    self.options = options
    self.path = path
    self._matrices = matrices
    self._graph = matrices.graph
    self._places = places

  def keys(self, x_BLD: str) -> tuple[str, str]:
    """Own keys, rotated, and values of the tokens at hand: `[B, G, L, K]`."""
    groups = self.options.num_kv_heads
    k_BLGK = self._placed(self._heads(x_BLD, "k", groups), "k_norm")
    v_BLGK = self._heads(x_BLD, "v", groups)
    k_BGLK, v_BGLK = (
      self._graph.op("Transpose", part, perm=[0, 2, 1, 3]) for part in (k_BLGK, v_BLGK)
    )
    return k_BGLK, v_BGLK

  def mix(self, x_BLD: str, k_BGTK: str, v_BGTK: str) -> str:
    """`[B, L, D]` from all keys and values, the cached ones first."""
    opts, graph = self.options, self._graph
    op, integers = graph.op, graph.integers
    repeats = opts.num_heads // opts.num_kv_heads
    heads = (opts.num_kv_heads, repeats, opts.head_dim)
    q_BLHK = self._placed(self._heads(x_BLD, "q", opts.num_heads), "q_norm")
    q_BLGRK = op("Reshape", q_BLHK, integers(0, 0, *heads))
    q_BGRLK = op("Transpose", q_BLGRK, perm=[0, 2, 3, 1, 4])
    # Products broadcast over R: keys and values are not repeated in memory.
    k_BG1TK, v_BG1TK = (op("Unsqueeze", p, integers(2)) for p in (k_BGTK, v_BGTK))
    k_BG1KT = op("Transpose", k_BG1TK, perm=[0, 1, 2, 4, 3])
    q_BGRLK = op("Mul", q_BGRLK, graph.constant(opts.head_dim**-0.5))
    s_BGRLT = op("MatMul", q_BGRLK, k_BG1KT)
    if opts.logit_cap is not None:
      s_BGRLT = capped(graph, s_BGRLT, opts.logit_cap)
    if opts.position == "alibi":
      slopes = np.asarray(alibi.slopes(opts.num_heads))
      slopes_GR = graph.constant(slopes.reshape(*heads[:2], 1, 1))
      s_BGRLT = op("Sub", s_BGRLT, op("Mul", slopes_GR, self._places.distance()))
    seen = self._places.seen(opts.window)
    s_BGRLT = op("Where", seen, s_BGRLT, graph.constant(_MASKED))
    p_BGRLT = op("Softmax", s_BGRLT, axis=-1)
    y_BGRLK = op("MatMul", p_BGRLT, v_BG1TK)
    y_BLGRK = op("Transpose", y_BGRLK, perm=[0, 3, 1, 2, 4])
    y_BLF = op("Reshape", y_BLGRK, integers(0, 0, math.prod(heads)))
    return self._project(y_BLF, "o")

  def _heads(self, x_BLD: str, name: str, num_heads: int) -> str:
    """Projects to `[B, L, heads, K]`."""
    shape = self._graph.integers(0, 0, num_heads, self.options.head_dim)
    return self._graph.op("Reshape", self._project(x_BLD, name), shape)

  def _placed(self, x_BLHK: str, norm: str) -> str:
    """Queries or keys, normalized and rotated as the options say."""
    opts, graph = self.options, self._graph
    op = graph.op
    if opts.qk_norm:
      path = f"{self.path}/{norm}"
      x_BLHK = norms.rms(self._matrices, x_BLHK, path, opts.qk_norm_eps)
    if opts.position != "rope":
      return x_BLHK
    cos, sin = self._places.rotation(opts)
    half, last = graph.integers(opts.head_dim // 2), graph.integers(3)
    a = op("Slice", x_BLHK, graph.integers(0), half, last)
    b = op("Slice", x_BLHK, half, graph.integers(_LAST), last)
    left = op("Sub", op("Mul", a, cos), op("Mul", b, sin))
    right = op("Add", op("Mul", b, cos), op("Mul", a, sin))
    return op("Concat", left, right, axis=-1)

  def _project(self, x_BLF: str, name: str) -> str:
    """A product, and its bias if there is one."""
    y_BLF = self._matrices.product(x_BLF, f"{self.path}/{name}")
    if not self.options.has_bias(name):
      return y_BLF
    bias = self._matrices.array(f"{self.path}/{name}_bias")
    return self._graph.op("Add", y_BLF, bias)


def capped(graph: graph_lib.Graph, x: str, cap: float) -> str:
  """`cap * tanh(x / cap)`."""
  bound = graph.constant(cap)
  return graph.op("Mul", graph.op("Tanh", graph.op("Div", x, bound)), bound)
