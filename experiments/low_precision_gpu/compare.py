"""Products with int8 and fp8 activations on a GPU, beside bfloat16: what runs.

Activations are bfloat16 and quantized in the time measured. A product is looked for in
the compiled program, so that a name is not taken for the thing. Needs a CUDA device of
compute capability 8.9 or more.
"""

import dataclasses
import pathlib
import re
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import jax
import jax.numpy as jnp

from effjax.weights import verbs
from effjax.weights.formats import base

WIDTH, ROWS = 4096, (16, 512, 4096)
ROUNDS, CALLS = 5, 50
KINDS = {
  "bfloat16": None,
  "int8, a scale a token": {"bits": 8, "activations": "int8"},
  "int8, static scale": {"bits": 8, "activations": "int8", "static": True},
  "fp8, a scale a token": {"format": "fp8", "activations": "fp8"},
  "fp8, static scale": {"format": "fp8", "activations": "fp8", "static": True},
}


def weight(told: dict | None) -> jax.Array:
  """A random matrix as the leaf of a format, or in bfloat16."""
  w = 0.02 * jax.random.normal(jax.random.key(0), (WIDTH, WIDTH))
  if told is None:
    return w.astype(jnp.bfloat16)
  options = {name: value for name, value in told.items() if name != "static"}
  fmt = base.FormatOptions(**options).build()
  x = base.split(w, WIDTH)
  grid = fmt.fit(x, fmt.outer(x))
  leaf = fmt.leaf(base.merge(fmt.encode(x, grid)), grid)
  if not told.get("static"):
    return leaf
  top = {"int8": 127, "fp8": 448}[told["activations"]]
  return dataclasses.replace(leaf, x_scale=jnp.full((1, 1), 4 / top, jnp.float32))


def product_of(program: str) -> str:
  """What multiplies in a compiled program."""
  if "__cublas$lt$matmul$f8" in program:
    return "cublasLt, f8"
  for line in program.splitlines():
    if "__cublas$" in line or "gemm_fusion" in line:
      name = "cublasLt" if "__cublas$lt" in line else "Triton"
      integers = re.search(r"\bs8\[", program) and re.search(r"\bs32\[", program)
      return f"{name}, {'s8' if integers else 'bf16'}"
  return "?"


def main() -> None:
  """Prints the table."""
  print(jax.devices()[0].device_kind, "JAX", jax.__version__)
  print("| rows | activations and weights | us | over bfloat16 | product | error |")
  print("| ---: | --- | ---: | ---: | --- | ---: |")
  leaves = {name: weight(told) for name, told in KINDS.items()}
  for rows in ROWS:
    x = jax.random.normal(jax.random.key(1), (rows, WIDTH), jnp.bfloat16)
    runs, texts, least = {}, {}, dict.fromkeys(KINDS, float("inf"))
    for name, leaf in leaves.items():
      compiled = jax.jit(verbs.contract).lower(x, leaf).compile()
      runs[name], texts[name] = compiled, compiled.as_text()
      jax.block_until_ready(compiled(x, leaf))
    for _ in range(ROUNDS):
      for name, run in runs.items():
        start = time.perf_counter()
        for _ in range(CALLS):
          y = run(x, leaves[name])
        jax.block_until_ready(y)
        least[name] = min(least[name], (time.perf_counter() - start) / CALLS)
    exact = runs["bfloat16"](x, leaves["bfloat16"]).astype(jnp.float32)
    for name in KINDS:
      off = runs[name](x, leaves[name]).astype(jnp.float32) - exact
      error = float(jnp.linalg.norm(off) / jnp.linalg.norm(exact))
      print(
        f"| {rows:,} | {name} | {1e6 * least[name]:.0f} | "
        f"{least['bfloat16'] / least[name]:.2f} | {product_of(texts[name])} | "
        f"{error:.4f} |",
        flush=True,
      )


if __name__ == "__main__":
  main()
