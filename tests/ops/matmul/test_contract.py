"""The written gradient equals autodiff's, to any order."""

import re

import jax
import jax.numpy as jnp
import pytest

from effjax.ops.matmul import contract


def _autodiff(x, w, transpose):
  return x @ (w.T if transpose else w)


@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("lead", [(), (3,), (2, 5)])
def test_outputs_gradients_and_second_derivatives(lead, transpose):
  keys = jax.random.split(jax.random.key(0), 2)
  x = jax.random.normal(keys[0], (*lead, 6))
  w = jax.random.normal(keys[1], (4, 6) if transpose else (6, 4))

  def loss(product):
    return lambda x, w: jnp.sum(jnp.sin(product(x, w, transpose)))

  ours, plain = loss(contract.contract), loss(_autodiff)
  assert jnp.allclose(ours(x, w), plain(x, w), rtol=1e-6)
  for derivative in (
    lambda f: jax.grad(f, (0, 1)),
    lambda f: jax.grad(lambda x, w: jnp.sum(jax.grad(f, 1)(x, w) ** 2), (0, 1)),
    lambda f: lambda x, w: jax.jvp(jax.grad(f, 1), (x, w), (x, w))[1],
  ):
    got, expected = derivative(ours)(x, w), derivative(plain)(x, w)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
      assert jnp.allclose(a, b, rtol=1e-5, atol=1e-5)


def test_the_weight_gradient_copies_nothing():
  """No operand of a product is transposed in the compiled gradient."""
  x, w = jnp.ones((8, 16, 32)), jnp.ones((32, 64))
  grad = jax.grad(lambda w, x: jnp.sum(jax.nn.silu(contract.contract(x, w)) ** 2))
  text = jax.jit(grad).lower(w, x).compile().as_text()
  copies = re.findall(r"= f32\[\S+ (?:transpose|copy)\(|f32\[64,128\]", text)
  assert not copies
