"""Times the kernels that effjax brings for GPUs beside what JAX has without them.

    python experiments/gpu_kernels/compare.py

Needs a CUDA device. Checks outputs and gradients first, then prints two tables of
milliseconds, forward and gradient: products of rows and experts, and Mamba-1's scan.
"""

import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from effjax.ops.moe import grouped_triton
from effjax.ops.ssm import selective, selective_triton

REPEATS, ROUNDS = 10, 3


def main() -> None:
  """Prints both tables."""
  print(f"JAX {jax.__version__}, {jax.devices()[0].device_kind}")
  for dtype, limit in ((jnp.bfloat16, 4e-3), (jnp.float32, 1e-3)):
    compare_products(8, 2048, 256, 512, dtype, limit)
  compare_scans(2, 300, 96, limit=1e-4)
  print("\n| rows, bfloat16 | experts | kernel | gradient | ragged_dot | gradient |")
  print("| --- | ---: | ---: | ---: | ---: | ---: |")
  for num_experts in (4, 64):
    args = products(num_experts, 16_384, 1024, 2048, jnp.bfloat16)
    cells = [both(grouped_triton.grouped_matmul, *args)]
    cells.append(both(jax.lax.ragged_dot, *args))
    print(f"| 16,384 of 1,024 times 2,048 | {num_experts} | {' | '.join(cells)} |")
  print("\n| scan of 512 channels, 16 states | kernel | gradient | loops | gradient |")
  print("| --- | ---: | ---: | ---: | ---: |")
  for rows in (1, 8):
    args = scans(rows, 4096, 512)
    cells = [scan_times(selective_triton.selective_scan, args)]
    slow = scan_times(selective.selective_scan, args, 1) if rows == 1 else "– | –"
    print(f"| {rows} x 4,096 tokens | {' | '.join([*cells, slow])} |")


def products(num_experts: int, rows: int, width: int, hidden: int, dtype: Any) -> tuple:
  """Rows, matrices, uneven group sizes and a cotangent."""
  keys = jax.random.split(jax.random.key(0), 3)
  rng = np.random.default_rng(0)
  sizes = rng.multinomial(rows, rng.dirichlet(np.full(num_experts, 2.0)))
  x_TD = jax.random.normal(keys[0], (rows, width))
  w_EDF = jax.random.normal(keys[1], (num_experts, width, hidden)) / width**0.5
  dy_TF = jax.random.normal(keys[2], (rows, hidden))
  x_TD, w_EDF, dy_TF = (a.astype(dtype) for a in (x_TD, w_EDF, dy_TF))
  return x_TD, w_EDF, jnp.asarray(sizes, jnp.int32), dy_TF


def compare_products(*sizes_and_dtype: Any) -> None:
  """Raises unless outputs and gradients are those of float32, in norm."""
  *sizes, dtype, limit = sizes_and_dtype
  args = products(*sizes, dtype)
  found = outputs(grouped_triton.grouped_matmul)(*args)
  with jax.default_matmul_precision("highest"):
    exact = [a.astype(jnp.float32) if a.dtype == dtype else a for a in args]
    expected = outputs(jax.lax.ragged_dot)(*exact)
  report(f"products in {jnp.dtype(dtype).name}", found, expected, limit)


def outputs(product: Callable) -> Callable:
  """`(y, dx, dw)` of a grouped product."""

  def run(x_TD, w_EDF, sizes_E, dy_TF):
    y_TF, pull = jax.vjp(lambda x, w: product(x, w, sizes_E), x_TD, w_EDF)
    return y_TF, *pull(dy_TF)

  return jax.jit(run)


def both(product: Callable, *args: jax.Array) -> str:
  """Milliseconds forward and of the gradient."""
  forward = jax.jit(lambda x, w, sizes, dy: product(x, w, sizes))
  gradient = jax.jit(lambda *args: outputs(product)(*args)[1:])
  return f"{timed(forward, *args):.2f} | {timed(gradient, *args):.2f}"


def scans(rows: int, length: int, channels: int, states: int = 16) -> tuple:
  """Arguments of the selective scan."""
  keys = jax.random.split(jax.random.key(0), 5)
  draw = lambda key, *shape: jax.random.normal(key, shape)
  return (
    draw(keys[0], rows, length, channels),
    jax.nn.softplus(draw(keys[1], rows, length, channels) - 3),
    -jnp.exp(draw(keys[2], states, channels)),
    draw(keys[3], rows, length, states),
    draw(keys[4], rows, length, states),
  )


def compare_scans(rows: int, length: int, channels: int, limit: float) -> None:
  """Raises unless outputs and gradients are those of the loops, in norm."""
  args = scans(rows, length, channels)
  with jax.default_matmul_precision("highest"):
    found, expected = (
      jax.jit(jax.value_and_grad(functools.partial(energy, scan), argnums=range(5)))(
        *args
      )
      for scan in (selective_triton.selective_scan, selective.selective_scan)
    )
  report("scan", found, expected, limit)


def energy(scan: Callable, *args: jax.Array) -> jax.Array:
  """A loss that all outputs and the last state enter."""
  y_BLI, state_BNI = scan(*args)
  return jnp.sum(jnp.sin(y_BLI)) + jnp.sum(state_BNI)


def scan_times(scan: Callable, args: tuple, repeats: int = REPEATS) -> str:
  """Milliseconds forward and of the gradient."""
  loss = functools.partial(energy, scan)
  gradient = jax.jit(jax.grad(loss, argnums=range(5)))
  times = (timed(fn, *args, repeats=repeats) for fn in (jax.jit(loss), gradient))
  return " | ".join(f"{ms:.1f}" for ms in times)


def report(name: str, found: Any, expected: Any, limit: float) -> None:
  """Prints the largest relative difference in norm; raises above the limit."""
  norm = lambda x: float(jnp.linalg.norm(x.astype(jnp.float32).ravel()))
  differences = jax.tree.map(
    lambda a, b: norm(a.astype(jnp.float32) - b) / norm(b), found, expected
  )
  worst = max(jax.tree.leaves(differences))
  print(f"{name}: outputs and gradients within {worst:.1e}")
  if not worst < limit:
    raise SystemExit(f"{name} is wrong: more than {limit:.0e} off")


def timed(fn: Callable, *args: jax.Array, repeats: int = REPEATS) -> float:
  """Best mean of some rounds, milliseconds."""
  jax.block_until_ready(fn(*args))
  best = float("inf")
  for _ in range(ROUNDS):
    start = time.perf_counter()
    for _ in range(repeats):
      out = fn(*args)
    jax.block_until_ready(out)
    best = min(best, (time.perf_counter() - start) / repeats)
  return 1e3 * best


if __name__ == "__main__":
  main()
