"""Recurrences on slices of a sequence against the whole of it, on one device.

All operations that carry a state along a sequence, wherever they are defined: outputs,
final states and every gradient, also against the naive forms.
"""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from effjax.core import shard
from effjax.ops.conv import api as conv
from effjax.ops.conv import reference as conv_reference
from effjax.ops.linear_attention import api as linear
from effjax.ops.linear_attention import reference as linear_reference
from effjax.ops.recurrence import (
  across_devices,
  reference,
  reference_delta,
  reference_gla,
)
from effjax.ops.recurrence import api as recurrence
from effjax.ops.ssm import api as ssm
from effjax.ops.ssm import reference as ssm_reference
from effjax.parallel import mesh as mesh_lib
from effjax.parallel import rules

ROWS, LENGTH, HEADS, CHANNELS = 5, 24, 4, 6
# Slices of 12, 8, 6 and 3 tokens: borders on, before and after those of slices, whole
# slices of one document and of padding, and padding between documents.
SEGMENTS = np.zeros((ROWS, LENGTH), np.int32)
SEGMENTS[0] = [1] * 12 + [2] * 5 + [3] * 1 + [1] * 4 + [0] * 2
SEGMENTS[1] = [4] * 11 + [0] * 13
SEGMENTS[2] = [2] * 13 + [5] * 11
SEGMENTS[3] = [7] * 1 + [8] * 23
SEGMENTS[4] = [1] * 5 + [0] * 4 + [2] * 15


def _normal(seed, *shape):
  return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def _tokens(seed, *shape):
  return _normal(seed, ROWS, LENGTH, *shape)


def _ssd(groups):
  return {
    "x_BLHP": _tokens(0, HEADS, 5),
    "dt_BLH": 0.1 * jax.nn.softplus(_tokens(1, HEADS)),
    "a_H": -jnp.exp(_normal(2, HEADS)),
    "b_BLGN": _tokens(3, groups, 3),
    "c_BLGN": _tokens(4, groups, 3),
    "initial_state_BHPN": _normal(5, ROWS, HEADS, 5, 3),
  }


def _gla():
  return {
    "q_BLHK": _tokens(0, HEADS, 4),
    "k_BLHK": _tokens(1, HEADS, 4),
    "v_BLHV": _tokens(2, HEADS, 5),
    "g_BLHK": -0.1 * jax.nn.softplus(_tokens(3, HEADS, 4)),
    "initial_state_BHKV": _normal(4, ROWS, HEADS, 4, 5),
  }


def _delta(groups, gated):
  arrays = {
    "q_BLGK": _tokens(0, groups, 4),
    "k_BLGK": recurrence.unit(_tokens(1, groups, 4)),
    "v_BLHV": _tokens(2, HEADS, 5),
    "beta_BLH": 0.5 * jax.nn.sigmoid(_tokens(3, HEADS)),
    "initial_state_BHKV": _normal(4, ROWS, HEADS, 4, 5),
  }
  if gated:
    arrays["g_BLH"] = -0.1 * jax.nn.softplus(_tokens(5, HEADS))
  return arrays


def _selective():
  return {
    "x_BLI": _tokens(0, CHANNELS),
    "dt_BLI": 0.1 * jax.nn.softplus(_tokens(1, CHANNELS)),
    "a_NI": -jnp.exp(_normal(2, 3, CHANNELS)),
    "b_BLN": _tokens(3, 3),
    "c_BLN": _tokens(4, 3),
    "initial_state_BNI": _normal(5, ROWS, 3, CHANNELS),
  }


def _s4d():
  real, imag = _normal(2, 2, 3, CHANNELS)
  return {
    "x_BLI": _tokens(0, CHANNELS),
    "dt_I": 0.1 * jnp.exp(0.3 * _normal(1, CHANNELS)),
    "a_2NI": jnp.stack([-jnp.exp(0.3 * real), 3 * imag]),
    "c_2NI": _normal(3, 2, 3, CHANNELS),
    "initial_state_B2NI": _normal(4, ROWS, 2, 3, CHANNELS),
  }


def _conv(taps):
  return {
    "x_BLD": _tokens(0, CHANNELS),
    "w_KD": _normal(1, taps, CHANNELS),
    "bias_D": _normal(2, CHANNELS),
    "state_BKD": _normal(3, ROWS, taps - 1, CHANNELS),
  }


def _features():
  return {
    "q_BLHN": jnp.exp(_tokens(0, HEADS, 3)),
    "k_BLHN": jnp.exp(_tokens(1, HEADS, 3)),
    "v_BLHP": _tokens(2, HEADS, 5),
  }


def _attention(fn, **options):
  """Linear attention with queries and keys for its numerator among the arrays."""

  def run(q_rotated=None, k_rotated=None, **arrays):
    rotated = None if q_rotated is None else (q_rotated, k_rotated)
    return fn(**arrays, rotated=rotated, **options)

  return run


_ROTATED = {"q_rotated": _tokens(3, HEADS, 3), "k_rotated": _tokens(4, HEADS, 3)}
_OLD_SUMS = {"initial_state_BHPN": jnp.exp(_normal(5, ROWS, HEADS, 6, 3))}
# What runs on devices, the naive form, and the arrays to differentiate.
OPS = {
  "ssd": (recurrence.ssd, reference.ssd, _ssd(2)),
  "ssd_one_group": (recurrence.ssd, reference.ssd, _ssd(1)),
  "gla": (recurrence.gla, reference_gla.gla, _gla()),
  "delta": (recurrence.delta_rule, reference_delta.delta_rule, _delta(4, False)),
  "gated_delta": (recurrence.delta_rule, reference_delta.delta_rule, _delta(2, True)),
  "selective": (ssm.selective_scan, ssm_reference.selective_scan, _selective()),
  "s4d": (ssm.s4d, ssm_reference.s4d, _s4d()),
  "conv": (
    functools.partial(conv.causal_conv, axis="inner"),
    conv_reference.causal_conv,
    _conv(4),
  ),
  "conv_longer_than_slices": (conv.causal_conv, conv_reference.causal_conv, _conv(9)),
  "retention": (
    linear.retention,
    linear_reference.retention,
    {
      "q_BLHK": _tokens(0, HEADS, 4),
      "k_BLHK": _tokens(1, HEADS, 4),
      "v_BLHP": _tokens(2, HEADS, 5),
    },
  ),
  "causal": (_attention(linear.linear_attention), None, _features() | _OLD_SUMS),
  "causal_rotated": (
    _attention(linear.linear_attention),
    _attention(linear_reference.linear_attention),
    _features() | _ROTATED,
  ),
  "bidirectional": (
    _attention(linear.linear_attention, is_causal=False),
    _attention(linear_reference.linear_attention, causal=False),
    _features(),
  ),
  "bidirectional_rotated": (
    _attention(linear.linear_attention, is_causal=False),
    _attention(linear_reference.linear_attention, causal=False),
    _features() | _ROTATED,
  ),
}
CHUNKED = [name for name in OPS if "conv" not in name]


def _close(got, wanted, tolerance):
  def leaf(a, b):
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    assert a.shape == b.shape and np.isfinite(a).all()
    assert np.abs(a - b).max() <= tolerance * max(1.0, np.abs(b).max())

  jax.tree.map(leaf, got, wanted)


def _outputs(fn, arrays, segments):
  """Outputs at real tokens, and the final state if there is one."""
  packed = {} if segments is None else {"segments_BL": segments}
  outs = fn(**arrays, **packed)
  y, *state = outs if isinstance(outs, tuple) else (outs,)
  if segments is not None:
    y = jnp.where(segments.reshape(ROWS, -1, *[1] * (y.ndim - 2)) != 0, y, 0)
  return [y, *(z for z in state if z is not None)]


def _results(fn, arrays, segments, num_outs=2):
  """Outputs, and gradients of a random function of them."""

  def loss(arrays):
    outs = _outputs(fn, arrays, segments)[:num_outs]
    weights = (_normal(10 + i, *z.shape) for i, z in enumerate(outs))
    return sum(jnp.sum(z * w) for z, w in zip(outs, weights, strict=True)), outs

  return jax.jit(jax.grad(loss, has_aux=True))(arrays)


def _fast(op, chunk):
  fn = OPS[op][0]
  return functools.partial(fn, chunk=chunk) if op in CHUNKED else fn


@functools.cache
def _whole(op, packed, chunk):
  segments = jnp.asarray(SEGMENTS) if packed else None
  return _results(_fast(op, chunk), OPS[op][2], segments)


def _on_mesh(preset, **config):
  mesh = mesh_lib.make(mesh_lib.MeshConfig(preset=preset, **config))
  return shard.use_rules(mesh, rules.find(preset).activations)


def _check(op, packed, chunk, preset="ring", **config):
  segments = jnp.asarray(SEGMENTS) if packed else None
  with _on_mesh(preset, **config):
    got = _results(_fast(op, chunk), OPS[op][2], segments)
  _close(got, _whole(op, packed, chunk), 1e-5)
  return got


def _cases():
  """S4D has two forms, which take long to compile."""
  for op in OPS:
    for devices in (2, 3, 4, 8):
      slow = op == "s4d" and devices in (2, 4)
      yield pytest.param(op, devices, marks=pytest.mark.slow if slow else ())


@pytest.mark.parametrize(("op", "devices"), list(_cases()))
def test_packed_slices_equal_the_whole(op, devices):
  _check(op, packed=True, chunk=2, num_devices=devices)


@pytest.mark.parametrize("op", OPS)
def test_slices_of_one_document_equal_the_whole(op):
  """In chunks that are longer than the slices."""
  _check(op, packed=False, chunk=64)


@pytest.mark.parametrize("op", OPS)
def test_heads_are_split_at_the_same_time(op):
  _check(op, packed=True, chunk=4, preset="ring+tp", shape={"context": 4, "tensor": 2})


@pytest.mark.parametrize("op", [op for op, (_, naive, _) in OPS.items() if naive])
def test_slices_equal_the_definition(op):
  """The naive linear attentions give outputs only, and take no state."""
  _, naive, arrays = OPS[op]
  segments = jnp.asarray(SEGMENTS)
  num_outs = len(jax.eval_shape(functools.partial(_outputs, naive), arrays, segments))
  wanted = _results(naive, arrays, segments)
  with _on_mesh("ring"):
    got = _results(_fast(op, 2), arrays, segments, num_outs)
  _close(got, wanted, 1e-4)


@pytest.mark.parametrize("op", ["ssd", "delta", "selective"])
def test_stages_of_a_pipeline_are_split_too(op):
  """Under vmap, with an axis of the mesh of its own."""
  arrays = jax.tree.map(lambda z: jnp.stack([z, z[..., ::-1]]), OPS[op][2])
  segments = jnp.asarray(SEGMENTS)

  def results():  # traced anew: what is traced remembers the rules it was traced under
    one = lambda z: _results(_fast(op, 2), z, segments)
    return jax.jit(jax.vmap(one, spmd_axis_name="stage"))

  wanted = results()(arrays)
  with _on_mesh("pp+ring", shape={"stage": 2, "context": 4}):
    split = results()
    assert "P('stage', None, 'context'" in str(jax.make_jaxpr(split)(arrays))
    _close(split(arrays), wanted, 1e-5)


def test_padding_in_front_and_between():
  """Which the recurrences allow: a state waits until the next token of any kind."""
  segments = np.roll(SEGMENTS, 4, axis=1)
  segments[3] = [0] * 8 + [1] * 3 + [0] * 9 + [1] * 4
  for op in ("ssd", "gla", "delta", "selective"):
    arrays = OPS[op][2]
    wanted = _results(_fast(op, 2), arrays, jnp.asarray(segments))
    with _on_mesh("ring"):
      got = _results(_fast(op, 2), arrays, jnp.asarray(segments))
    _close(got, wanted, 1e-5)


def test_lengths_that_do_not_divide_are_not_split():
  x_BLI, *rest = OPS["selective"][2].values()
  short = lambda z: z[:, :23] if z.shape[:2] == (ROWS, LENGTH) else z
  args = [short(z) for z in (x_BLI, *rest[:-1])]
  with _on_mesh("ring"):
    y_BLI, _ = jax.jit(ssm.selective_scan)(*args)
  _close(y_BLI, ssm.selective_scan(*args)[0], 1e-5)


@pytest.mark.parametrize("op", ["ssd", "gla", "gated_delta", "selective", "s4d"])
def test_states_that_go_one_device_far_are_not_enough(op, monkeypatch):
  """What the comparisons here would see of a prefix that is not one."""

  def from_neighbour(decay, added, over, *, times=None, reverse=False):
    return across_devices.receive(added, 1, over, reverse=reverse)

  monkeypatch.setattr(across_devices, "arriving", from_neighbour)
  with pytest.raises(AssertionError):
    _check(op, packed=False, chunk=64)


def test_second_derivative():
  """Optimizers that use curvature differentiate the written gradients."""
  arrays, segments = OPS["ssd"][2], jnp.asarray(SEGMENTS)

  def product(fn):
    loss = lambda z: jnp.sum(jnp.tanh(_outputs(fn, z, segments)[0]) ** 2)
    direction = jax.tree.map(jnp.ones_like, arrays)
    return jax.jit(lambda z: jax.jvp(jax.grad(loss), (z,), (direction,)))(arrays)

  wanted = product(_fast("ssd", 2))
  with _on_mesh("ring", num_devices=4):
    _close(product(_fast("ssd", 2)), wanted, 1e-4)


def test_nothing_as_long_as_the_sequence_is_gathered():
  """Memory of a device is that of its slice; what it sends has the size of a state."""
  length, heads, head_dim, state_dim = 1024, 2, 8, 4
  shapes = {
    "x_BLHP": (1, length, heads, head_dim),
    "dt_BLH": (1, length, heads),
    "b_BLGN": (1, length, 1, state_dim),
    "c_BLGN": (1, length, 1, state_dim),
  }
  a_H = -jnp.ones(heads)
  whole = {name: jax.ShapeDtypeStruct(s, jnp.float32) for name, s in shapes.items()}
  gradient = jax.grad(lambda z: jnp.sum(recurrence.ssd(**z, a_H=a_H, chunk=32)[0] ** 2))
  alone = jax.jit(gradient).lower(whole).compile().memory_analysis()
  with _on_mesh("ring"):
    mesh = shard.current()[0]
    rows = NamedSharding(mesh, PartitionSpec(None, "context"))
    args = {
      name: jax.ShapeDtypeStruct(z.shape, z.dtype, sharding=rows)
      for name, z in whole.items()
    }
    split = jax.jit(gradient, out_shardings=rows).lower(args).compile()
  bytes_of_device = split.memory_analysis().temp_size_in_bytes
  assert bytes_of_device < 1.5 / 8 * alone.temp_size_in_bytes
  sent = [
    line.split(" = ")[1]
    for line in split.as_text().splitlines()
    if re.search(r" (all-|collective-permute|reduce-scatter)", line)
    # Sums over axes of one device, which the CPU's compiler leaves in.
    and "replica_groups={{0},{1}," not in line
  ]
  shapes = [re.findall(r"\[([\d,]+)\]", line.split("(%")[0]) for line in sent]
  sizes = [np.prod([int(n) for n in dims.split(",")]) for dims in sum(shapes, [])]
  assert len(sizes) >= 8 and max(sizes) == heads * head_dim * state_dim
