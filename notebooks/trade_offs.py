# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # What does making a model cheaper cost?
#
# This notebook loads a finished run, looks at its parameter tree, makes the model
# cheaper by hand, and plots what that costs. Make a run first:
#
# ```sh
# make quickstart
# ```
#
# or, in about a minute, `effjax run --config configs/quickstart.py:smoke` and set
# `EFFJAX_RUN=runs/quickstart-smoke`.

# %%
import os
import pathlib

import matplotlib.pyplot as plt
import treescope

import effjax

here = pathlib.Path.cwd()
root = here.parent if here.name == "notebooks" else here
workdir = os.environ.get("EFFJAX_RUN", root / "runs" / "quickstart")
run = effjax.load(workdir, stage="train")
run.row["quality"]

# %% [markdown]
# ## The tree
#
# Parameters are nested dicts; equal layers are stacked along a leading axis. The specs
# have the same structure and say what each parameter is.

# %%
treescope.basic_interactive_setup(autovisualize_arrays=True)
treescope.show(run.params)

# %%
treescope.show(run.specs)

# %% [markdown]
# ## A transform
#
# A compressed weight is another kind of leaf in the same place. The model does not
# change: it uses weights through verbs that every kind of leaf has.

# %%
int4 = effjax.transform(
  "rtn",
  run.params,
  run.specs,
  where={"kind": ("matrix", "embedding")},
  options={"bits": 4, "group": 32},
)
treescope.show(int4)

# %%
effjax.evaluate(run, int4)

# %% [markdown]
# ## The trade-off
#
# Bits and sparsity, alone and together. A mask saves nothing by itself: `bytes_held`
# counts the values and the mask.

# %%
everything = {"kind": ("matrix", "embedding")}
trees = {"float32": run.params}
for bits in (8, 4, 3):
  options = {"bits": bits, "group": 32}
  trees[f"int{bits}"] = effjax.transform(
    "rtn", run.params, run.specs, where=everything, options=options
  )
trees["pruned 50%"] = effjax.transform(
  "magnitude", run.params, run.specs, options={"sparsity": 0.5}
)
trees["pruned 50% + int4"] = effjax.transform(
  "rtn", trees["pruned 50%"], run.specs, options={"bits": 4, "group": 32}
)
rows = {name: effjax.measure(run, tree, name=name) for name, tree in trees.items()}

# %%
figure, axes = plt.subplots(figsize=(7, 4.5))
for name, row in rows.items():
  x, y = row["bits_per_weight"], row["quality"]["bits_per_byte"]
  axes.scatter(x, y, color="tab:red" if row["simulated"] else "tab:blue")
  axes.annotate(name, (x, y), xytext=(5, 5), textcoords="offset points")
axes.set_xlabel("bits per weight, scales and masks counted (red: simulated)")
axes.set_ylabel("bits per byte")
axes.grid(alpha=0.3)

# %% [markdown]
# ## Text
#
# The cheaper model, still writing.

# %%
print("def main(" + effjax.generate(run, "def main(", params=int4, max_tokens=40))
