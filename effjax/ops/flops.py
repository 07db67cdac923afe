"""FLOPs counted by walking the jaxpr: products and convolutions, loops multiplied out.

The compiler's own cost analysis counts a loop body once, so a scanned model would look
as cheap as one of its layers. Here a product of `[.., m, k]` and `[.., k, n]` costs
`2 m k n` for each batch entry, whatever the width of its operands, a convolution two
for each multiply-add, and a loop body as often as it runs. Elementwise work is not
counted. Of the branches of a `cond` the most expensive one counts, but for attention
that skips more where every row is one document: it counts as for such rows. Attention
by a kernel of an accelerator counts as `effjax.ops.attention.blockwise`, products of
experts as for even groups.

Every product is also credited to the parameter it multiplies by, found by following
values that depend on one parameter and on nothing else (dequantized, masked, sliced,
transposed).
"""

import collections
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from jax.extend import core as jex
from jax.interpreters import partial_eval

from effjax.core import counting
from effjax.ops.attention import blockwise

# What a value depends on: nothing (a constant), one parameter (its path), or more.
_CONSTANT = ""
_MIXED = None
_Source = str | None


def per_parameter(
  fn: Callable[..., Any], params: Mapping[str, Any], *args: Any
) -> dict[str, int]:
  """FLOPs of `fn(params, *args)` by the parameter multiplied with.

  Args:
    fn: traceable function of a flat mapping from path to leaf and of `args`.
    params: path to leaf, an array (or its shape) or a leaf dataclass.
    *args: arrays or ShapeDtypeStructs.

  Returns:
    FLOPs by path; products of two activations stand under "".
  """
  by_source = _count(fn, params, *args)
  rest = by_source.pop(_MIXED, 0) + by_source.pop(_CONSTANT, 0)
  return {**by_source, "": rest}


def dot_flops(fn: Callable[..., Any], *args: Any) -> int:
  """FLOPs of the products and convolutions of `fn(*args)`; nothing is computed.

  Args:
    fn: traceable function.
    *args: arrays, pytrees of them or ShapeDtypeStructs.

  Raises:
    ValueError: a `while` loop with products in it runs an unknown number of times.
  """
  jaxpr = _trace(fn, *args)
  _, flops = _walk(jaxpr, [_MIXED] * len(jaxpr.invars))
  return sum(flops.values())


def _count(
  fn: Callable[..., Any], params: Mapping[str, Any], *args: Any
) -> collections.Counter:
  jaxpr = _trace(fn, dict(params), *args)
  sources: list[_Source] = []
  # Flattened the way JAX flattens a dict: by sorted key.
  for path in sorted(params):
    sources += [path] * len(jax.tree.leaves(params[path]))
  sources += [_MIXED] * (len(jaxpr.invars) - len(sources))
  return _walk(jaxpr, sources)[1]


def _trace(fn: Callable[..., Any], *args: Any) -> Any:
  """The jaxpr of `fn`, without what its results do not need."""
  with counting.counting():
    jaxpr = jax.make_jaxpr(fn)(*args).jaxpr
  return partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars), instantiate=True)[0]


def _join(sources: Sequence[_Source]) -> _Source:
  named = set(sources) - {_CONSTANT}
  if not named:
    return _CONSTANT
  return named.pop() if len(named) == 1 else _MIXED


def _walk(
  jaxpr: Any, sources: Sequence[_Source]
) -> tuple[list[_Source], collections.Counter]:
  """Sources of a jaxpr's outputs and FLOPs by source, given those of its inputs."""
  known: dict[Any, _Source] = dict(zip(jaxpr.invars, sources, strict=True))
  flops: collections.Counter = collections.Counter()

  def source(var: Any) -> _Source:
    return _CONSTANT if isinstance(var, jex.Literal) else known.get(var, _CONSTANT)

  for eqn in jaxpr.eqns:
    inputs = [source(v) for v in eqn.invars]
    rule = _RULES.get(eqn.primitive.name, _call)
    outputs, inner = rule(eqn, inputs)
    flops.update(inner)
    known.update(zip(eqn.outvars, outputs, strict=True))
  return [source(v) for v in jaxpr.outvars], flops


def _product(
  eqn: Any, inputs: list[_Source], cost: int
) -> tuple[list[_Source], collections.Counter]:
  """Credits a product of an activation and a parameter to the parameter."""
  named = [s for s in inputs if s not in (_CONSTANT, _MIXED)]
  owner = named[0] if len(named) == 1 else _MIXED
  return [_join(inputs)] * len(eqn.outvars), collections.Counter({owner: cost})


def _dot_general(eqn: Any, inputs: list[_Source]) -> Any:
  (contracting, _), _ = eqn.params["dimension_numbers"]
  lhs = eqn.invars[0].aval
  depth = math.prod(lhs.shape[i] for i in contracting)
  return _product(eqn, inputs, 2 * depth * eqn.outvars[0].aval.size)


def _int8_dot(eqn: Any, inputs: list[_Source]) -> Any:
  """Rows [..., D] with a weight [F, D], whichever kernel runs it; scales are not it."""
  depth = eqn.invars[1].aval.shape[-1]
  return _product(eqn, inputs[:2], 2 * depth * eqn.outvars[0].aval.size)


def _ragged_dot(eqn: Any, inputs: list[_Source]) -> Any:
  """What native kernels execute: each row by the matrix of its own group."""
  dims = eqn.params["ragged_dot_dimension_numbers"].dot_dimension_numbers
  lhs, rhs = eqn.invars[0].aval, eqn.invars[1].aval
  (lhs_contracting, rhs_contracting), (_, rhs_batch) = dims
  used = set(rhs_contracting) | set(rhs_batch)
  used |= set(eqn.params["ragged_dot_dimension_numbers"].rhs_group_dimensions)
  free = math.prod(d for i, d in enumerate(rhs.shape) if i not in used)
  return _product(eqn, inputs[:2], 2 * lhs.size * free)


def _conv(eqn: Any, inputs: list[_Source]) -> Any:
  rhs = eqn.invars[1].aval
  out_axis = eqn.params["dimension_numbers"].rhs_spec[0]
  per_output = rhs.size // rhs.shape[out_axis]
  return _product(eqn, inputs, 2 * per_output * eqn.outvars[0].aval.size)


def _scan(eqn: Any, inputs: list[_Source]) -> Any:
  num_consts, num_carry = eqn.params["num_consts"], eqn.params["num_carry"]
  consts = inputs[:num_consts]
  carry = inputs[num_consts : num_consts + num_carry]
  xs = inputs[num_consts + num_carry :]
  outputs, flops = _fixed_point(eqn.params["jaxpr"].jaxpr, consts, carry, xs)
  length = eqn.params["length"]
  return outputs, collections.Counter({k: length * v for k, v in flops.items()})


def _while(eqn: Any, inputs: list[_Source]) -> Any:
  num_cond, num_body = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
  consts = inputs[num_cond : num_cond + num_body]
  carry = inputs[num_cond + num_body :]
  outputs, flops = _fixed_point(eqn.params["body_jaxpr"].jaxpr, consts, carry, [])
  if not sum(flops.values()):
    return outputs, flops
  trips = _num_trips(eqn)
  if trips is None:
    raise ValueError(
      "a while loop with products in it runs an unknown number of times; its FLOPs "
      "cannot be counted (a fori_loop with constant bounds can)"
    )
  return outputs, collections.Counter({k: trips * v for k, v in flops.items()})


def _cond(eqn: Any, inputs: list[_Source]) -> Any:
  branches = [_walk(b.jaxpr, inputs[1:]) for b in eqn.params["branches"]]
  outputs = [_join(column) for column in zip(*(o for o, _ in branches), strict=True)]
  for branch, (_, flops) in zip(eqn.params["branches"], branches, strict=True):
    if any(e.params.get("name") == blockwise.ONE_DOCUMENT for e in branch.jaxpr.eqns):
      return outputs, flops
  return outputs, max((f for _, f in branches), key=lambda f: sum(f.values()))


def _shard_map(eqn: Any, inputs: list[_Source]) -> Any:
  """The body is what one device runs; the axes it is manual over repeat it."""
  outputs, flops = _call(eqn, inputs)
  mesh, axes = eqn.params["mesh"], eqn.params["newly_manual_axes"]
  num_devices = math.prod(mesh.shape[axis] for axis in axes)
  return outputs, collections.Counter({k: num_devices * v for k, v in flops.items()})


def _call(eqn: Any, inputs: list[_Source]) -> Any:
  """Any other equation: walks the function it calls, if it calls one."""
  for name in ("jaxpr", "call_jaxpr", "fun_jaxpr"):
    inner = eqn.params.get(name)
    if inner is not None:
      inner = getattr(inner, "jaxpr", inner)
      if len(inner.invars) != len(inputs):
        raise ValueError(f"FLOPs inside {eqn.primitive.name} cannot be counted")
      return _walk(inner, inputs)
  return [_join(inputs)] * len(eqn.outvars), collections.Counter()


def _fixed_point(
  body: Any, consts: list[_Source], carry: list[_Source], xs: list[_Source]
) -> tuple[list[_Source], collections.Counter]:
  """Walks a loop body until the sources of its carry no longer change."""
  while True:
    outputs, flops = _walk(body, [*consts, *carry, *xs])
    joined = [_join(pair) for pair in zip(carry, outputs[: len(carry)], strict=True)]
    if joined == carry:
      return [*carry, *outputs[len(carry) :]], flops
    carry = joined


def _num_trips(eqn: Any) -> int | None:
  """Trips of `while i < n: i += step` with literal start, bound and step, or None."""
  cond, body = eqn.params["cond_jaxpr"].jaxpr, eqn.params["body_jaxpr"].jaxpr
  skip = eqn.params["cond_nconsts"] + eqn.params["body_nconsts"]
  if len(cond.eqns) != 1 or cond.eqns[0].primitive.name != "lt":
    return None
  index, bound = cond.eqns[0].invars
  if index not in cond.invars or not isinstance(bound, jex.Literal):
    return None
  place = cond.invars.index(index) - eqn.params["cond_nconsts"]
  if place < 0 or not isinstance(eqn.invars[skip + place], jex.Literal):
    return None
  start = eqn.invars[skip + place].val
  carried = body.invars[eqn.params["body_nconsts"] + place]
  for step in body.eqns:
    if step.outvars[0] is body.outvars[place]:
      operands = [v.val for v in step.invars if isinstance(v, jex.Literal)]
      if step.primitive.name != "add" or carried not in step.invars or not operands:
        return None
      return max(0, math.ceil((int(bound.val) - int(start)) / int(operands[0])))
  return None


_RULES = {
  "dot_general": _dot_general,
  "int8_dot": _int8_dot,
  "ragged_dot_general": _ragged_dot,
  "conv_general_dilated": _conv,
  "scan": _scan,
  "while": _while,
  "cond": _cond,
  "shard_map": _shard_map,
}
