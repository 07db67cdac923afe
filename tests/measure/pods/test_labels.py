import jax
import jax.numpy as jnp
import pytest

from effjax.measure.pods import labels

B, L, D, H, K = 2, 3, 8, 4, 2
X = ("batch", "length", "embed")
shape = lambda *dims: jax.ShapeDtypeStruct(dims, jnp.float32)


def axes(fn, shapes, given):
  jaxpr = jax.make_jaxpr(fn)(*shapes).jaxpr
  return labels.Labels().walk(jaxpr, given)


@pytest.mark.parametrize(
  ("fn", "expected"),
  [
    (lambda x, w: x @ w, ("batch", "length", "heads")),
    (
      lambda x, w: (x @ w).reshape(B, L, H, K),
      ("batch", "length", "heads", None),
    ),
    (
      lambda x, w: (x @ w).reshape(B, L, H, K).transpose(0, 2, 1, 3),
      ("batch", "heads", "length", None),
    ),
    (lambda x, w: jax.nn.relu(x @ w).reshape(B * L, H * K), ("batch", "heads")),
    # D == H K: only the names tell the stream from the heads.
    (lambda x, w: (x @ w) @ w.T + x, ("batch", "length", "embed")),
    (lambda x, w: jnp.sum(x @ w, axis=1), ("batch", "heads")),
    (lambda x, w: jax.jit(jnp.tanh)(x @ w)[:, :1], ("batch", None, "heads")),
    (lambda x, w: jnp.take(w, jnp.zeros((B, L), int), axis=0), (None, None, "heads")),
  ],
)
def test_names_follow_values(fn, expected):
  found = axes(fn, (shape(B, L, D), shape(D, H * K)), (X, ("embed", "heads")))
  assert found == [expected]


def test_a_scan_names_what_it_carries_and_what_it_stacks():
  def fn(x, w_ND):
    def body(carry, w):
      y = x * w[None, None]
      return carry + y, y @ jnp.ones((D, 5))

    return jax.lax.scan(body, jnp.zeros((B, L, D)), w_ND)

  carried, stacked = axes(fn, (shape(B, L, D), shape(6, D)), (X, ("layers", "embed")))
  assert carried == X
  assert stacked == ("layers", "batch", "length", None)
