import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from effjax.optim import newton_schulz


def matrices(shape, seed=0):
  return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def in_float64(x):
  """The iteration one matrix at a time, never through the Gram matrix."""
  a, b, c = 3.4445, -4.7750, 2.0315
  out = np.empty(x.shape)
  for index in np.ndindex(x.shape[:-2]):
    y = np.asarray(x[index], np.float64)
    y /= np.linalg.norm(y)
    for _ in range(5):
      gram = y.T @ y
      y = a * y + y @ (b * gram + c * gram @ gram)
    out[index] = y
  return out


# Square and nearly square ones are iterated as they are, long ones by their Gram
# matrix.
@pytest.mark.parametrize(
  "shape", [(24, 24), (3, 24, 32), (3, 16, 80), (2, 3, 80, 16), (1, 40), (40, 1)]
)
def test_equals_float64_matrix_by_matrix(shape):
  x = matrices(shape)
  actual = jax.jit(newton_schulz.orthogonalize)(x)
  np.testing.assert_allclose(actual, in_float64(x), atol=1e-4)


def test_equals_optax():
  x = matrices((48, 96))
  reference = optax.contrib.scale_by_muon(beta=0.0, nesterov=False)
  expected, _ = reference.update(x, reference.init(x))
  np.testing.assert_allclose(newton_schulz.orthogonalize(x), expected, atol=1e-4)


@pytest.mark.parametrize("shape", [(4, 64, 64), (4, 64, 192), (4, 192, 64)])
def test_singular_values_end_near_one(shape):
  y = np.asarray(newton_schulz.orthogonalize(matrices(shape)), np.float64)
  values = np.linalg.svd(y, compute_uv=False)
  # A square Gaussian matrix has singular values near zero, which need more steps.
  lowest = np.quantile(values, 0.05) if shape[-1] == shape[-2] else values.min()
  assert lowest > 0.6
  assert values.max() < 1.3


def test_long_matrices_survive_a_wide_spectrum():
  """Singular values over six decades: rounding must not blow up the Gram form."""
  rng = np.random.default_rng(0)
  u, _ = np.linalg.qr(rng.normal(size=(32, 32)))
  v, _ = np.linalg.qr(rng.normal(size=(128, 32)))
  x = jnp.asarray((u * np.logspace(0, -6, 32)) @ v.T, jnp.float32)
  actual, expected = newton_schulz.orthogonalize(x), in_float64(x)
  assert np.linalg.norm(actual - expected) < 1e-3 * np.linalg.norm(expected)


def test_zero_stays_zero_and_the_scale_does_not_matter():
  assert np.all(np.asarray(newton_schulz.orthogonalize(jnp.zeros((2, 4, 12)))) == 0)
  x = matrices((8, 32))
  small, large = (newton_schulz.orthogonalize(s * x) for s in (1e-3, 1e3))
  np.testing.assert_allclose(small, large, atol=1e-3)


def test_bfloat16_products_point_the_same_way():
  x = matrices((32, 96))
  exact = newton_schulz.orthogonalize(x)
  near = newton_schulz.orthogonalize(x, dtype="bfloat16")
  assert near.dtype == jnp.float32
  values = np.linalg.svd(np.asarray(near, np.float64), compute_uv=False)
  assert values.min() > 0.6
  assert values.max() < 1.3
  norms = jnp.linalg.norm(near) * jnp.linalg.norm(exact)
  cosine = float(jnp.vdot(near, exact) / norms)
  assert 0.99 < cosine < 0.99999  # nearer would mean float32 products


def test_long_matrices_take_fewer_products():
  def num_multiplications(dtype):
    ortho = lambda x: newton_schulz.orthogonalize(x, dtype=dtype)
    dots = [
      eqn
      for eqn in jax.make_jaxpr(ortho)(jnp.zeros((64, 256))).eqns
      if eqn.primitive.name == "dot_general"
    ]
    size = lambda eqn: eqn.outvars[0].aval.size * eqn.invars[0].aval.shape[-1]
    return sum(map(size, dots))

  m, n = 64, 256
  assert num_multiplications("bfloat16") == 5 * (2 * n + m) * m * m
  assert num_multiplications("float32") == (2 * n + 17 * m) * m * m
