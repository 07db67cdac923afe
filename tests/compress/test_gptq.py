"""GPTQ against the paper's algorithm in NumPy float64, and against rounding to nearest.

Letters: I inputs, O outputs; the papers' matrices are W `[O, I]`.
"""

import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend import core

from effjax.compress import calibrate, hessians, registry
from effjax.compress.quantize import gptq
from effjax.core import errors, specs
from effjax.core import registry as registry_lib
from effjax.weights.formats import base
from effjax.weights.leaves import low_rank, masked, quantized
from tests.compress.hessian_problems import Grid, problem, stats_of

MATRIX = specs.ParamSpec(axes=("embed", "mlp"), kind="matrix")
EMBEDDING = specs.ParamSpec(axes=("vocab", "embed"), kind="embedding")
DAMPING = 0.01


def _gptq(w, hessian, spec=MATRIX, **options):
  technique = registry.find("gptq")
  stats = {"w": stats_of(hessian)}
  where = {"kind": (spec.kind,)}
  return technique({"w": w}, {"w": spec}, stats, where=where, options=options)["w"]


def _objective(w, leaf, h):
  error = np.asarray(leaf.dense(), np.float64) - np.asarray(w, np.float64)
  return np.sum(error * (h @ error))


def _paper(
  w_io,
  h,
  *,
  bits=4,
  group=0,
  symmetric=True,
  static=False,
  act_order=False,
  mask_io=None,
):
  """Algorithm 1, with blocks of 32 columns; codes `[O, I]`.

  What a mask drops is zero, whatever is added to it, and the rest makes up for that.
  """
  mask = np.ones(w_io.T.shape, bool) if mask_io is None else mask_io.T
  w, (in_dim, out_dim) = np.where(mask, w_io.T, 0), w_io.shape
  group = group or in_dim
  starts = range(0, in_dim, group)
  grids = {k: Grid(w[:, k : k + group], bits, symmetric) for k in starts}
  order = np.argsort(-np.diag(h), kind="stable") if act_order else np.arange(in_dim)
  w, h, mask = w[:, order], h[np.ix_(order, order)], mask[:, order]
  h = h + DAMPING * np.mean(np.diag(h)) * np.eye(in_dim)
  inverse = np.linalg.cholesky(np.linalg.inv(h)).T
  codes, size = np.zeros((out_dim, in_dim)), 32
  for i in range(0, in_dim, size):
    errors_OB = np.zeros((out_dim, size))
    for j in range(i, i + size):
      if not (static or act_order) and j % group == 0:
        # Within the block, of what stays.
        kept = np.where(mask[:, j : j + group], w[:, j : j + group], 0)
        grids[j] = Grid(kept, bits, symmetric)
      grid = grids[order[j] // group * group]
      codes[:, order[j]] = grid.codes(np.where(mask[:, j], w[:, j], 0))
      rounded = np.where(mask[:, j], grid.values(codes[:, order[j]]), 0)
      error = (w[:, j] - rounded) / inverse[j, j]
      errors_OB[:, j - i] = error
      w[:, j : i + size] -= np.outer(error, inverse[j, j : i + size])
    w[:, i + size :] -= errors_OB @ inverse[i : i + size, i + size :]
  return codes


CASES = {
  "a channel": {},
  "groups of 16": {"group": 16},
  "groups of 32, 3 bits": {"group": 32, "bits": 3},
  "static": {"group": 16, "static_groups": True},
  "asymmetric": {"group": 16, "symmetric": False},
  "by activation": {"group": 16, "act_order": True},
  "a channel by activation": {"act_order": True, "symmetric": False},
}


@pytest.mark.parametrize("case", CASES)
def test_equals_the_paper(case):
  options = CASES[case]
  w, h = problem()
  renamed = {"static" if k == "static_groups" else k: v for k, v in options.items()}
  expected = _paper(w, h, **renamed).T
  with jax.enable_x64(True):
    leaf = _gptq(jnp.asarray(w), jnp.asarray(h), **options)
    np.testing.assert_array_equal(leaf.unpacked(), expected)
    objective = _objective(w, leaf, h)
  leaf = _gptq(jnp.asarray(w, jnp.float32), jnp.asarray(h, jnp.float32), **options)
  assert np.mean(np.asarray(leaf.unpacked()) == expected) >= 0.995
  np.testing.assert_allclose(_objective(w, leaf, h), objective, rtol=1e-3)


@pytest.mark.parametrize("case", ["a channel", "asymmetric", "by activation"])
def test_of_a_masked_weight_equals_the_paper(case):
  options = CASES[case]
  w, h = problem(2)
  mask = np.random.default_rng(3).random(w.shape) < 0.5
  expected = _paper(w, h, mask_io=mask, **options).T
  with jax.enable_x64(True):
    held = masked.Masked.create(jnp.asarray(w), jnp.asarray(mask))
    leaf = _gptq(held, jnp.asarray(h), **options)
    np.testing.assert_array_equal(leaf.values.unpacked(), expected)
    np.testing.assert_array_equal(leaf.mask(), mask)
    assert np.all(np.asarray(leaf.dense())[~mask] == 0)


FORMATS = [
  *({"format": name} for name in sorted(registry_lib.names(base.FORMATS))),
  {"format": "int", "bits": 3, "group": 16, "range": "mse"},
  {"format": "int", "bits": 2, "per_tensor": True},
  {"format": "nf4", "group": 16},
  {"format": "nf4", "group": 16, "double_group": 4},
  {"format": "nvfp4", "range": "mse"},
]


@pytest.mark.parametrize("options", FORMATS, ids=str)
def test_every_format_loses_less_than_with_rounding_to_nearest(options):
  w, h = problem(seed=1, out_dim=8)
  w = jnp.asarray(w, jnp.float32)
  leaf = _gptq(w, jnp.asarray(h, jnp.float32), **options)
  # Options with their defaults are those that ran.
  ran = gptq.GPTQOptions(**options)
  own = ("damping", "act_order", "static_groups", "block")
  values = {name: value for name, value in vars(ran).items() if name not in own}
  rounded = registry.find("rtn")({"w": w}, {"w": MATRIX}, options=values)["w"]
  assert jax.tree.structure(leaf) == jax.tree.structure(rounded)
  shapes = lambda leaf: [a.shape for a in jax.tree.leaves(leaf)]
  assert shapes(leaf) == shapes(rounded)
  assert _objective(w, leaf, h) < 0.7 * _objective(w, rounded, h)


@pytest.mark.parametrize("options", [{"format": "nvfp4"}, {"act_order": True}], ids=str)
def test_stacked_matrices_are_those_alone(options):
  w, h = (jnp.asarray(a, jnp.float32) for a in problem(stack=(2, 2), out_dim=8))
  stacked = _gptq(w, h, **options)
  for at in np.ndindex(2, 2):
    alone = _gptq(w[at], h[at], **options)
    np.testing.assert_allclose(stacked.dense()[at], alone.dense(), rtol=1e-6)


def test_an_embedding_is_the_transpose(rng):
  """A tied head contracts the last axis of a table, whose Hessian that is."""
  w, h = (jnp.asarray(a, jnp.float32) for a in problem(out_dim=8))
  table = _gptq(w.T, h, EMBEDDING, group=16)
  matrix = _gptq(w, h, group=16)
  assert table.shape == (8, 64) and table.axis == -1
  np.testing.assert_array_equal(table.dense(), matrix.dense().T)


@pytest.mark.parametrize("group", [0, 16])
def test_zeros_of_a_mask_stay_and_are_made_up_for(rng, group):
  w, h = (jnp.asarray(a, jnp.float32) for a in problem(out_dim=8))
  mask = jnp.asarray(rng.random(w.shape) < 0.5)
  leaf = _gptq(masked.Masked.create(w, mask), h, group=group)
  assert isinstance(leaf, masked.Masked)
  assert isinstance(leaf.values, quantized.Quantized)
  np.testing.assert_array_equal(leaf.mask(), mask)
  assert np.all(np.asarray(leaf.dense())[~np.asarray(mask)] == 0)
  pruned = {"w": masked.Masked.create(w, mask)}
  options = {"bits": 4, "group": group}
  rounded = registry.find("rtn")(pruned, {"w": MATRIX}, options=options)["w"]
  dense, h = np.where(mask, w, 0), np.asarray(h)
  assert _objective(dense, leaf, h) < 0.9 * _objective(dense, rounded, h)


def test_inputs_that_were_never_there_get_zeros():
  w, h = problem(out_dim=8)
  h[[3, 40]] = h[:, [3, 40]] = 0
  w[3] *= 100  # Would be most of the grid.
  for options in ({"group": 16}, {"act_order": True}):
    leaf = _gptq(jnp.asarray(w, jnp.float32), jnp.asarray(h, jnp.float32), **options)
    dense = np.asarray(leaf.dense())
    assert np.all(dense[[3, 40]] == 0) and np.max(np.abs(dense)) < 20
    assert np.all(np.max(np.abs(dense), axis=1)[[2, 4]] > 0)


def test_damping_that_is_raised_is_told(caplog):
  rng = np.random.default_rng(0)
  w, h = problem(out_dim=8, stack=(2,))
  x = rng.standard_normal((5, 64))
  h[1] = x.T @ x
  w, h = jnp.asarray(w, jnp.float32), jnp.asarray(h, jnp.float32)
  with caplog.at_level(logging.INFO, logger=hessians.__name__):
    leaf = _gptq(w, h, damping=0.0)
  assert np.all(np.isfinite(leaf.dense()))
  (warning,) = (r for r in caplog.records if r.levelno == logging.WARNING)
  assert "raised from 0 for w[1] to 0.0001" in warning.getMessage()
  caplog.clear()
  with caplog.at_level(logging.INFO, logger=hessians.__name__):
    _gptq(w, h)
  assert [r.getMessage() for r in caplog.records] == [
    "gptq: 1 parameters, damping 0.01"
  ]


def test_an_expert_without_tokens_is_rounded_to_nearest_and_named(caplog):
  w, h = (jnp.asarray(a, jnp.float32) for a in problem(out_dim=8, stack=(2,)))
  h = h.at[1].set(0)
  stats = {"w": stats_of(h)}
  count = jnp.asarray([100.0, 0.0])
  stats["w"] = calibrate.InputStats(None, None, count, h)
  made = registry.find("gptq")({"w": w}, {"w": MATRIX}, stats, options={"group": 16})
  options = {"bits": 4, "group": 16}
  rounded = registry.find("rtn")({"w": w}, {"w": MATRIX}, options=options)["w"]
  np.testing.assert_array_equal(made["w"].unpacked()[1], rounded.unpacked()[1])
  assert "no token seen, rounded to nearest: w[1]" in caplog.text


def _num_equations(jaxpr):
  inner = (core.jaxprs_in_params(eqn.params) for eqn in jaxpr.eqns)
  return len(jaxpr.eqns) + sum(_num_equations(j) for found in inner for j in found)


@pytest.mark.parametrize("options", [{}, {"group": 16}, {"act_order": True}], ids=str)
def test_programs_do_not_grow_with_the_width(options):
  options = gptq.GPTQOptions(**options)

  def count(width):
    w, h = jnp.zeros((width, 8)), jnp.zeros((width, width))
    used = jnp.bool_(True)
    one = lambda w, h: gptq.quantize_matrix(w, None, h, used, options)
    return _num_equations(jax.make_jaxpr(one)(w, h).jaxpr)

  assert count(64) == count(256) > 50


def test_options_are_recorded_as_they_ran():
  assert gptq.GPTQOptions().bits == 4
  assert gptq.GPTQOptions(bits=3).bits == 3
  assert gptq.GPTQOptions(format="nf4").bits is None
  assert registry.find("gptq").collect == ("hessian",)


W = jnp.ones((64, 8))
H = jnp.eye(64)


@pytest.mark.parametrize(
  ("stats", "options", "message"),
  [
    (None, {}, "w: gptq has no statistics of it"),
    (calibrate.InputStats(H[0], H[0], 1.0), {}, r'collect=\("hessian",\)'),
    (stats_of(H.at[3, 3].set(jnp.nan)), {}, "w: its Hessian is not finite"),
    (stats_of(-H), {}, "w: no damping up to 1000 of the mean"),
    (stats_of(H[:32, :32]), {}, r"has shape \(32, 32\), not \(64, 64\)"),
    (stats_of(H, count=0.0), {}, "w: calibration gave it no token"),
    (
      stats_of(H, count=63.0),
      {},
      "w: calibration gave it 63 tokens, fewer than its 64",
    ),
    (stats_of(H), {"group": 12}, "w: group 12 does not divide .* legal group is 8"),
    (stats_of(H), {"bits": 7}, "bits=7 must be one of"),
    (stats_of(H), {"damping": -1.0}, "damping=-1.0 must not be negative"),
    (stats_of(H), {"block": 0}, "block=0 must be positive"),
    (stats_of(H), {"format": "nf4", "bits": 4}, "format 'nf4' has no option bits"),
    (stats_of(H), {"range": "max"}, "unknown range"),
  ],
)
def test_mistakes(stats, options, message):
  tree = None if stats is None else {"w": stats}
  with pytest.raises(errors.InputError, match=message) as caught:
    registry.find("gptq")({"w": W}, {"w": MATRIX}, tree, options=options)
  assert "\n" not in str(caught.value)


def test_what_it_does_not_take():
  transform, stats = registry.find("gptq"), {"w": stats_of(H)}
  once = transform({"w": W}, {"w": MATRIX}, stats)
  with pytest.raises(errors.InputError, match="w is already a quantized leaf"):
    transform(once, {"w": MATRIX}, stats)
  thin = low_rank.LowRank.create(jnp.ones((64, 2)), jnp.ones((2, 8)))
  with pytest.raises(errors.InputError, match="not of the factors of a low-rank one"):
    transform({"w": thin}, {"w": MATRIX}, stats)
