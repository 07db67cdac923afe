"""SparseGPT with a quantizer in its sweep, against NumPy float64 and its two halves.

Letters: I inputs, O outputs; the paper's matrices are W `[O, I]`.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.compress import registry, swept_grids
from effjax.compress.prune import sparsegpt
from effjax.core import errors, specs
from effjax.ops.matmul import column_sweep
from effjax.weights.formats import base
from effjax.weights.leaves import coded, masked, n_of_m, quantized
from tests.compress.hessian_problems import Grid, problem, stats_of

MATRIX = specs.ParamSpec(axes=("embed", "mlp"), kind="matrix")
EMBEDDING = specs.ParamSpec(axes=("vocab", "embed"), kind="embedding")
DAMPING = 0.01


def _then(w, hessian, *stages, spec=MATRIX):
  """The leaf after transforms `(name, options)`, with one Hessian for all."""
  params, stats = {"w": w}, {"w": stats_of(hessian)}
  where = {"kind": (spec.kind,)}
  for name, options in stages:
    change = registry.find(name)
    params = change(params, {"w": spec}, stats, where=where, options=options)
  return params["w"]


def _loss(w, leaf, h):
  error = np.asarray(leaf.dense(), np.float64) - np.asarray(w, np.float64)
  return np.sum(error * (h @ error))


def _paper(w_io, h, *, sparsity=0.5, block=16, n_of=None, bits=4, group=0, symmetric):
  """Algorithm 1 with a quantizer: a weight at a time, nothing put off.

  A grid is of what stays of its group; of all weights, if the choice is made later.
  """
  w, in_dim = w_io.T.copy(), len(w_io)
  h = h + DAMPING * np.mean(np.diag(h)) * np.eye(in_dim)
  inverse = np.linalg.cholesky(np.linalg.inv(h)).T
  mask, codes = np.ones(w.shape, bool), np.zeros(w.shape)
  grid = None if group else Grid(w, bits, symmetric)
  for j in range(in_dim):
    if n_of is None and j % block == 0:
      cost = w[:, j : j + block] ** 2 / np.diag(inverse)[j : j + block] ** 2
      lost = np.argsort(cost, axis=None, kind="stable")[: round(sparsity * cost.size)]
      chosen = np.ones(cost.size, bool)
      chosen[lost] = False
      mask[:, j : j + block] = chosen.reshape(cost.shape)
    if group and j % group == 0:
      known = n_of is None and block >= group
      kept = mask[:, j : j + group] if known else True
      grid = Grid(np.where(kept, w[:, j : j + group], 0), bits, symmetric)
    if n_of is not None and j % n_of[1] == 0:
      n, m = n_of
      cost = w[:, j : j + m] ** 2 / np.diag(inverse)[j : j + m] ** 2
      for o, order in enumerate(np.argsort(cost, axis=1)):
        mask[o, j + order[: m - n]] = False
    kept = np.where(mask[:, j], w[:, j], 0)
    codes[:, j] = grid.codes(kept)
    error = w[:, j] - np.where(mask[:, j], grid.values(codes[:, j]), 0)
    w[:, j:] -= np.outer(error / inverse[j, j], inverse[j, j:])
  return codes.T, mask.T


CASES = {
  "a channel": {},
  "groups inside a block": {"group": 8},
  "blocks inside a group": {"group": 32},
  "3 bits, most pruned": {"group": 16, "bits": 3, "sparsity": 0.8},
  "asymmetric": {"group": 16, "symmetric": False},
  "2:4, a channel": {"n_of": (2, 4)},
  "2:4 in groups": {"n_of": (2, 4), "group": 16},
}


@pytest.mark.parametrize("name", CASES)
def test_equals_the_paper(name):
  case = {"symmetric": True} | CASES[name]
  w, h = problem()
  codes, mask = _paper(w, h, **case)
  quantize = {"bits": 4} | {
    key: case[key] for key in ("bits", "group", "symmetric") if key in case
  }
  options = {"quantize": quantize}
  if "n_of" in case:
    options["pattern"] = "2:4"
  else:
    options |= {"block": 16, "sparsity": case.get("sparsity", 0.5)}
  with jax.enable_x64(True):
    leaf = _then(jnp.asarray(w), jnp.asarray(h), ("sparsegpt", options))
    np.testing.assert_array_equal(leaf.mask(), mask)
    np.testing.assert_array_equal(leaf.values.unpacked(), codes)
  single = _then(
    jnp.asarray(w, jnp.float32), jnp.asarray(h, jnp.float32), ("sparsegpt", options)
  )
  assert np.mean(np.asarray(single.mask()) == mask) >= 0.995
  assert np.mean(np.asarray(single.values.unpacked()) == codes) >= 0.995
  assert isinstance(single, masked.Masked)
  assert np.all(np.asarray(single.dense())[~np.asarray(single.mask())] == 0)


@pytest.mark.parametrize(
  "quantize",
  [
    {"bits": 4},
    {"bits": 3, "group": 16, "range": "mse"},
    {"bits": 4, "group": 32, "symmetric": False},
    {"format": "nf4", "group": 16},
    {"format": "nvfp4"},
  ],
  ids=str,
)
def test_with_nothing_pruned_it_is_gptq(quantize):
  w, h = problem(1, out_dim=8)
  with jax.enable_x64(True):
    w, h = jnp.asarray(w), jnp.asarray(h)
    options = {"sparsity": 0.0, "block": 32, "quantize": quantize}
    leaf = _then(w, h, ("sparsegpt", options))
    expected = _then(w, h, ("gptq", quantize))
    assert bool(jnp.all(leaf.mask()))
    assert jax.tree.structure(leaf.values) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, leaf.values, expected)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Exact(base.Format):
  """Floats as they are: every weight is its own code."""

  def fit(self, x, outer=None, shrink=1.0):
    return {"scale": jnp.ones_like(x[..., :1, :])}

  def encode(self, x, grid):
    return x

  def decode(self, codes, grid):
    return codes


@pytest.mark.parametrize("group", [0, 8, 32])
def test_with_nothing_rounded_it_is_plain_sparsegpt(group):
  w, h = problem(2, out_dim=8)
  options = sparsegpt.SparseGPTOptions(block=16)
  with jax.enable_x64(True):
    w, h = jnp.asarray(w), jnp.asarray(h)
    values, mask, report = sparsegpt.prune_matrix(
      w, h, jnp.asarray(True), jnp.asarray(0.5), options=options
    )
    factor = column_sweep.inverse_factor(h, DAMPING)

    def choose(block):
      # As the transform does, in other words.
      cost = jnp.square(block.rows / block.factor_diagonal[:, None]).reshape(-1)
      order = jnp.argsort(jnp.argsort(cost, stable=True))
      return (order >= cost.size // 2).reshape(block.rows.shape)

    choice = swept_grids.Choice(16, choose)
    swept = swept_grids.sweep(_Exact(group=group), w, factor.upper, choice=choice)
  np.testing.assert_array_equal(swept.mask, mask)
  np.testing.assert_allclose(swept.codes, values, atol=1e-10)
  np.testing.assert_allclose(swept.loss, report.loss)


@pytest.mark.parametrize("seed", range(3))
def test_it_loses_less_than_rounding_afterwards(seed):
  w, h = problem(seed, 64, 48)
  single = (jnp.asarray(w, jnp.float32), jnp.asarray(h, jnp.float32))
  quantize = {"bits": 3}
  loss = lambda *stages: _loss(w, _then(*single, *stages), h)
  joint = loss(("sparsegpt", {"quantize": quantize}))
  assert joint < 0.85 * loss(("sparsegpt", {}), ("rtn", quantize))
  # GPTQ afterwards makes up for rounding, too, and neither of the two always wins.
  assert joint < 1.25 * loss(("sparsegpt", {}), ("gptq", quantize))


def test_stacked_matrices_and_an_embedding_are_each_their_own():
  w, h = (jnp.asarray(a, jnp.float32) for a in problem(3, out_dim=8, stack=(2, 2)))
  spec = specs.ParamSpec(
    axes=("embed", "mlp"), kind="matrix", stack=("layers", "experts")
  )
  stage = ("sparsegpt", {"block": 16, "quantize": {"bits": 4, "group": 8}})
  stacked = _then(w, h, stage, spec=spec)
  for at in np.ndindex(2, 2):
    alone = _then(w[at], h[at], stage)
    np.testing.assert_array_equal(stacked.mask()[at], alone.mask())
    np.testing.assert_allclose(stacked.dense()[at], alone.dense(), rtol=1e-6)
  turned = _then(w[0, 0].T, h[0, 0], stage, spec=EMBEDDING)
  expected = _then(w[0, 0], h[0, 0], stage).dense()
  np.testing.assert_array_equal(turned.dense().T, expected)


@pytest.mark.parametrize("spec", [MATRIX, EMBEDDING], ids=["matrix", "embedding"])
@pytest.mark.parametrize("quantize", [{"bits": 4, "group": 16}, {"format": "nf4"}])
def test_packed_n_of_m_holds_the_codes_of_what_stays(spec, quantize):
  w, h = (jnp.asarray(a, jnp.float32) for a in problem(4, out_dim=8))
  w = w.T if spec is EMBEDDING else w
  options = {"pattern": "2:4", "quantize": quantize}
  held = _then(w, h, ("sparsegpt", options), spec=spec)
  packed = _then(w, h, ("sparsegpt", options | {"packed": True}), spec=spec)
  assert isinstance(packed, n_of_m.NOfM)
  assert isinstance(packed.values, quantized.Quantized | coded.Coded)
  np.testing.assert_array_equal(packed.mask(), held.mask())
  np.testing.assert_array_equal(packed.dense(), held.dense())
  # Codes of 4 bits and places of 2 for one half, and the scales.
  scales = packed.values.scale.nbytes
  assert packed.held_bytes() == 64 * 8 // 2 * (4 + 2) // 8 + scales


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"quantize": {"bits": 7}}, "bits=7 must be one of"),
    ({"quantize": {"activations": "int8"}}, "quantize it with activations='none'"),
    ({"quantize": {"group": 12}}, "w: group 12 does not divide .* legal group is 8"),
    (
      {"pattern": "8:16", "quantize": {"group": 8}, "packed": True},
      "w: groups of 8 .* pattern 8:16 each: packed needs a multiple of 16",
    ),
    (
      {"pattern": "4:16", "quantize": {"group": 24}},
      "w: groups of 24 .* pattern 4:16 do: one must be a multiple of the other",
    ),
  ],
)
def test_bad_options(options, message):
  in_dim = 96 if options.get("pattern") == "4:16" else 64
  w, h = (jnp.asarray(a, jnp.float32) for a in problem(in_dim=in_dim, out_dim=4))
  with pytest.raises(errors.InputError, match=message) as caught:
    _then(w, h, ("sparsegpt", options))
  assert "\n" not in str(caught.value)
