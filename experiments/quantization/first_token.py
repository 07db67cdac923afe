"""How far outputs of SmolLM2's matrices are off, at the first token and at all.

Of its first layers, each matrix rounded to int4 in groups of 64 by itself, on what
flows into it in the unrounded model: calibrated on 4,096 tokens of older addresses,
judged on four windows of newer ones. Explains a row of compare.py, see README.md.
"""

import pathlib
import sys

import jax.numpy as jnp
import numpy as np

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from effjax.compress import blocks, calibrate
from effjax.compress import registry as transforms
from effjax.core import layers, specs
from effjax.core import tree as tree_lib
from effjax.weights import verbs
from experiments import cells

LAYERS, ROWS = 5, 4
WAYS = {"nearest": ("rtn", {}), "gptq": ("gptq", {})}
WAYS["act_order"] = ("gptq", {"act_order": True})


def main() -> None:
  """Prints a line a layer and a line a matrix."""
  subject = cells.Language()
  model, flat = layers.unstack(subject.model, subject.params)
  parts = blocks.Blocks(model)
  used = [b["inputs"] for b in subject.draws[0][:2]]
  seen = parts.embed(flat, {"inputs": jnp.concatenate([jnp.asarray(x) for x in used])})
  rows = np.stack([row["inputs"] for row in subject.rows[:ROWS]])
  new = parts.embed(flat, {"inputs": jnp.asarray(rows)})
  for k in range(LAYERS):
    layer, own = parts.layer(k), flat[f"layer_{k}"]
    length = jnp.linalg.norm(new.x_BLD, axis=-1)
    first, rest = float(length[:, 0].mean()), float(length[:, 1:].mean())
    print(
      f"layer {k}: stream of length {first:.0f} at the first token, else {rest:.0f}"
    )
    about = tree_lib.flatten(specs.specs(model)[f"layer_{k}"])
    paths = frozenset(path for path, spec in about.items() if spec.kind == "matrix")
    found = blocks.observe(layer, own, {}, seen, ("hessian",), paths)
    stats, inputs = tree_lib.flatten(calibrate.finished(found)), []
    with blocks.watching(paths, inputs):
      layer.observed(own, {}, new)
    for path, x_BLD in inputs:
      report(path, tree_lib.flatten(own)[path], stats[path], x_BLD)
    seen, new = (blocks.run(layer, own, stream) for stream in (seen, new))


def report(path, w_DF, stats, x_BLD) -> None:
  """Relative errors of one matrix's outputs, in each way."""
  said = []
  spec = specs.ParamSpec(axes=("embed", "mlp"), kind="matrix", shape=w_DF.shape)
  for way, (name, options) in WAYS.items():
    options = {"bits": 4, "group": 64} | options
    told = {"w": stats} if name == "gptq" else None
    made = transforms.find(name)({"w": w_DF}, {"w": spec}, told, options=options)
    wrong_BLF, right_BLF = x_BLD @ (verbs.dense(made["w"]) - w_DF), x_BLD @ w_DF
    off = [
      float(jnp.linalg.norm(wrong_BLF[:, at]) / jnp.linalg.norm(right_BLF[:, at]))
      for at in (slice(None), 0)
    ]
    said.append(f"{way} {off[0]:.3f} ({off[1]:.3f})")
  print(f"  {path}, all tokens (first): {', '.join(said)}", flush=True)


if __name__ == "__main__":
  main()
