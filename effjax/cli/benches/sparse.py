"""Pruned weights: time and bytes of every leaf beside the dense weight.

One matrix, pruned by magnitude to what each row says, and held in each way that there
is: dense, masked (which saves nothing), what stays and its places as a bitmap or as
compressed rows, N of M packed, and blocks.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from effjax.cli import timing
from effjax.compress import registry
from effjax.core import specs
from effjax.ops.matmul import places
from effjax.weights import leaf as leaf_lib
from effjax.weights import verbs

TOKENS = (1, 16, 128)
_SPEC = specs.ParamSpec(axes=("embed", "mlp"), kind="matrix")
_BLOCKS = {"within": "output", "budget": "uniform", "packed": True}


def bench(quick: bool = False) -> timing.Table:
  """Times a product of rows with the matrix held in each way.

  Args:
    quick: a small matrix, to see that it works; the numbers mean nothing.
  """
  size, block = (256, 16) if quick else (2048, 128)
  rounds, calls = (1, 1) if quick else (15, 10)
  rng = np.random.default_rng(0)
  w = jnp.asarray(rng.normal(size=(size, size)), jnp.float32)
  held = {"dense": w} | {
    name: _pruned(w, name, options) for name, options in _ways(block).items()
  }
  # Each holds its weight as an argument: as a constant it would be folded.
  product = jax.jit(lambda x, w: verbs.contract(x, w))
  rows = []
  for tokens in TOKENS:
    x = jnp.asarray(rng.normal(size=(tokens, size)), jnp.float32)
    runs = {name: lambda x, w=leaf: product(x, w) for name, leaf in held.items()}
    took = timing.interleaved(runs, x, rounds, calls)
    for name, leaf in held.items():
      rows.append(
        {
          "rows": tokens,
          "held": name,
          "nonzero": f"{float(jnp.mean(verbs.dense(leaf) != 0)):.1%}",
          "bytes": _held_bytes(leaf) / w.nbytes,
          "us": 1e6 * took[name],
          "times as fast": took["dense"] / took[name],
          "simulated": ", ".join(getattr(leaf, "simulated", ())) or None,
        }
      )
  return timing.Table(
    title=f"a product with [{size}, {size}] in float32, pruned by magnitude",
    rows=rows,
    notes=[
      "bytes: held, over those of the dense weight",
      "us: the least of several turns, all ways one after the other in each",
      "simulated: what a way does not really save",
      f"device: {jax.devices()[0].device_kind}",
    ],
  )


def _ways(block: int) -> dict[str, dict[str, Any]]:
  """Options of `magnitude` by the name of the way a weight is held."""
  blocks = f"{block}x{block}"
  return {
    "masked 50 %": {"sparsity": 0.5},
    "masked 90 %": {"sparsity": 0.9},
    "bitmap 50 %": {"sparsity": 0.5},
    "bitmap 90 %": {"sparsity": 0.9},
    "csr 97 %": {"sparsity": 0.97},
    "2:4": {"pattern": "2:4", "packed": True},
    "1:4": {"pattern": "1:4", "packed": True},
    f"blocks of {blocks} 50 %": {"pattern": blocks, "sparsity": 0.5, **_BLOCKS},
    f"blocks of {blocks} 75 %": {"pattern": blocks, "sparsity": 0.75, **_BLOCKS},
    f"blocks of {blocks} 94 %": {"pattern": blocks, "sparsity": 0.9375, **_BLOCKS},
  }


def _pruned(w: jax.Array, name: str, options: dict[str, Any]) -> Any:
  about = {"w": _SPEC}
  made = registry.find("magnitude")({"w": w}, about, options=options)
  layout = name.split()[0]
  if layout in places.LAYOUTS:
    made = registry.find("pack")(made, about, options={"layout": layout})
  return made["w"]


def _held_bytes(leaf: Any) -> int:
  return leaf.held_bytes() if leaf_lib.is_leaf_kind(leaf) else leaf.nbytes


TECHNIQUE = bench
