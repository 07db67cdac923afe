"""Every leaf kind x every verb x every way JAX may run it, against the dense weight."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from effjax.core import partition, registry, specs
from effjax.parallel import mesh as mesh_lib
from effjax.parallel import rules, sharding
from effjax.weights import describe, leaf, verbs
from tests import selection
from tests.conformance import leaf_kinds

IN, OUT, TAPS, EXPERTS, LAYERS = 16, 8, 4, 3, 2
_KINDS = selection.quick(
  leaf_kinds.KINDS,
  [kind for kind in leaf_kinds.KINDS if kind not in leaf_kinds.VARIATIONS],
)
VERBS = ("contract", "transposed", "lookup", "grouped_contract", "conv", "dense")


# Made in one program: one operation at a time compiles tens of them.
_activations = jax.jit(lambda: jax.random.normal(jax.random.key(1), (2, 5, IN)))


def _made(make, key, shape, axis):
  return jax.jit(lambda key: make(key, shape, axis))(key)


def _case(verb, kind):
  """A weight, the function that uses it, and its activations."""
  make = functools.partial(_made, leaf_kinds.KINDS[kind])
  key = jax.random.key(7)
  x_BLI = _activations()
  match verb:
    case "contract":
      return make(key, (IN, OUT), -2), lambda w, x: verbs.contract(x, w), x_BLI
    case "transposed":
      fn = lambda w, x: verbs.contract(x, w, transpose=True)
      return make(key, (OUT, IN), -1), fn, x_BLI
    case "lookup":
      fn = lambda w, x: verbs.lookup(w, jnp.argmax(x, axis=-1))
      return make(key, (IN, OUT), -1), fn, x_BLI
    case "grouped_contract":
      sizes = jnp.array([4, 0, 6], jnp.int32)
      fn = lambda w, x, sizes=sizes: verbs.grouped_contract(x.reshape(10, IN), w, sizes)
      return make(key, (EXPERTS, IN, OUT), -2), fn, x_BLI
    case "conv":
      return make(key, (TAPS, IN), -2), lambda w, x: verbs.conv(x, w)[0], x_BLI
    case "dense":
      return make(key, (IN, OUT), -2), lambda w, x: verbs.dense(w), x_BLI


# Where activations are rounded; everything else is the same function.
ROUNDED = {
  "int8_dynamic": 2e-2,
  "fake_int8_dynamic": 2e-2,
  "int8_static": 3e-2,
  "int4_dynamic": 0.3,
  "fp8_dynamic": 0.06,
  "fp8_static": 0.06,
}


def _tolerance(name):
  return ROUNDED.get(name, 1e-5)


def _close(a, b, tolerance):
  a, b = np.asarray(a), np.asarray(b)
  limit = tolerance * max(1.0, float(np.max(np.abs(b))))
  assert float(np.max(np.abs(a - b))) <= limit


@pytest.fixture(params=_KINDS)
def kind(request):
  return request.param


_CONVOLVED = ("plain", "int8", "masked", "int3", "adapted", "masked_adapted")


def _cases():
  """Every kind with every verb; groups do not divide the few taps of a convolution."""
  for param in _KINDS:
    kind, marks = (
      (param, ()) if isinstance(param, str) else (param.values[0], param.marks)
    )
    for verb in VERBS:
      if verb != "conv" or kind in _CONVOLVED:
        yield pytest.param((kind, verb), marks=marks, id=f"{kind}-{verb}")


@pytest.fixture(params=_cases())
def case(request):
  kind, verb = request.param
  return kind, *_case(verb, kind)


def test_equals_the_dense_weight_and_jit(case):
  name, w, fn, x = case
  dense = verbs.dense(w)
  assert dense.shape == tuple(w.shape) and dense.dtype == w.dtype
  expected = fn(dense, x)
  _close(fn(w, x), expected, _tolerance(name))
  _close(jax.jit(fn)(w, x), fn(w, x), 1e-5)


# A lookup has no gradient to its ids; that of rounded activations is straight through.
@pytest.mark.parametrize("kind", _KINDS)
@pytest.mark.parametrize("verb", ["contract", "transposed", "grouped_contract"])
def test_gradient_to_activations(kind, verb):
  w, fn, x = _case(verb, kind)

  @jax.jit
  def gradients(w, x):
    def loss(x, w):
      y = fn(w, x)
      return jnp.sum(y * jax.random.normal(jax.random.key(3), y.shape))

    return jax.grad(loss)(x, w), jax.grad(loss)(x, verbs.dense(w))

  gradient, expected = gradients(w, x)
  assert float(jnp.max(jnp.abs(gradient))) > 0
  _close(gradient, expected, 1e-5)


def test_gradient_to_what_trains(case):
  _, w, fn, x = case
  trainable, frozen = partition.partition({"w": w}, {"w"})
  loss = lambda t: jnp.sum(fn(partition.merge(t, frozen)["w"], x) ** 2)
  grads = jax.device_get(jax.jit(jax.grad(loss))(trainable))
  for g in jax.tree.leaves(grads):
    assert np.all(np.isfinite(g))
  if isinstance(w, jax.Array):
    assert np.max(np.abs(grads["w"])) > 0


def test_scan_and_vmap_over_stacked_leaves(case):
  name, w, fn, x = case

  @jax.jit
  def three_ways(w, x):
    stacked = jax.tree.map(lambda a: jnp.stack([a, a[::-1]]), w)
    one = lambda i: jax.tree.map(lambda a: a[i], stacked)
    expected = jnp.stack([fn(one(i), x) for i in range(LAYERS)])
    scanned = jax.lax.scan(lambda c, w: (c, fn(w, x)), 0, stacked)[1]
    # jax.lax.ragged_dot maps over all of its arguments or none, sizes included.
    args = (stacked, *(jnp.stack([a, a]) for a in (x, *(fn.__defaults__ or ()))))
    return stacked, expected, scanned, jax.vmap(fn)(*args)

  stacked, expected, scanned, mapped = three_ways(w, x)
  _close(scanned, expected, 1e-5)
  _close(mapped, expected, max(1e-5, _tolerance(name) / 10))
  assert tuple(stacked.shape) == (LAYERS, *w.shape)


@pytest.mark.parametrize("preset", ["dp", "fsdp", "tp", "fsdp+tp"])
def test_eight_devices_equal_one(kind, preset):
  w = _made(leaf_kinds.KINDS[kind], jax.random.key(0), (64, 32), -2)
  x = jax.random.normal(jax.random.key(1), (8, 64))
  shape = {"tensor": 2} if "+" in preset else {}
  mesh = mesh_lib.make(mesh_lib.MeshConfig(preset=preset, shape=shape))
  spec = specs.ParamSpec(axes=("embed", "mlp"), kind="matrix", shape=(64, 32))
  table = rules.find(preset).params
  placed = sharding.tree_shardings(mesh, table, {"w": spec}, {"w": w})["w"]
  w8 = jax.device_put(w, placed)
  if preset != "dp":
    split = [not a.sharding.is_fully_replicated for a in jax.tree.leaves(w8)]
    assert any(split)
  x8 = jax.device_put(x, NamedSharding(mesh, PartitionSpec(("data", "fsdp"))))
  contract = jax.jit(lambda w, x: verbs.contract(x, w))
  _close(np.asarray(contract(w8, x8)), contract(w, x), 1e-5)


def test_description_restores_the_structure(kind):
  w = _made(leaf_kinds.KINDS[kind], jax.random.key(0), (IN, OUT), -2)
  target = describe.abstract(describe.describe(w))
  shapes = jax.eval_shape(lambda: w)
  assert jax.tree.structure(target) == jax.tree.structure(shapes)
  assert jax.tree.leaves(target) == jax.tree.leaves(shapes)


def test_bytes_are_those_held(kind):
  w = _made(leaf_kinds.KINDS[kind], jax.random.key(0), (IN, OUT), -2)
  if isinstance(w, jax.Array):
    assert w.nbytes == 4 * IN * OUT
    return
  assert w.held_bytes() == sum(a.nbytes for a in jax.tree.leaves(w))
  if kind == "int4_groups":
    assert w.held_bytes() == IN * OUT // 2 + 4 * OUT * 4


def test_every_registered_kind_is_tested():
  made = [make(jax.random.key(0), (IN, OUT), -2) for make in leaf_kinds.KINDS.values()]
  tested = {w.kind for w in made if leaf.is_leaf_kind(w)}
  assert tested == set(registry.names("effjax.weights.leaves"))
