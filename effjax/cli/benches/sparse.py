"""Pruned weights and pruned layers: time and bytes beside the dense ones.

One matrix, pruned by magnitude to what each row says, and held in each way that there
is: dense, masked (which saves nothing), what stays and its places as a bitmap or as
compressed rows, N of M packed, and blocks. Then whole layers without some of their
groups, which are smaller layers, and what of the saved FLOPs is saved time.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from effjax.cli import timing
from effjax.compress import registry
from effjax.core import specs
from effjax.models import config as model_config
from effjax.models import decoder
from effjax.ops import flops
from effjax.ops.matmul import places
from effjax.weights import leaf as leaf_lib
from effjax.weights import verbs

TOKENS = (1, 16, 128)
SHARES = (0.25, 0.5, 0.75)
_NONE = "0%"
_SPEC = specs.ParamSpec(axes=("embed", "mlp"), kind="matrix")
_BLOCKS = {"within": "output", "budget": "uniform", "packed": True}


def bench(quick: bool = False) -> list[timing.Table]:
  """Times a matrix held in each way, and layers without some of their groups.

  Args:
    quick: small shapes, to see that it works; the numbers mean nothing.
  """
  return [_matrix(quick), _layers(quick)]


def _matrix(quick: bool) -> timing.Table:
  """A product of rows with the matrix held in each way."""
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


def _layers(quick: bool) -> timing.Table:
  """Layers of a decoder with groups removed, all parts of a layer included."""
  lengths = (4,) if quick else (1, 128, 512)
  kinds = (("neurons", 1024), ("kv_groups", 1024), ("kv_groups", 2048))
  rows = []
  for groups, width in kinds:
    width = 32 if quick else width
    whole = _one_layer(groups, width)
    models = {_NONE: whole}
    models |= {f"{s:.0%}": _without(*whole, groups, s) for s in SHARES}
    for length in lengths:
      x = jax.random.normal(jax.random.key(0), (1, length, width))
      runs = {share: _runner(*pair, length) for share, pair in models.items()}
      # A single token takes so little that calls have to overlap to show it.
      rounds, calls = (1, 1) if quick else (11, 20 if length == 1 else 3)
      took = timing.interleaved(runs, x, rounds, calls)
      cost = {share: flops.dot_flops(run, x) for share, run in runs.items()}
      for share in runs:
        faster, fewer = took[_NONE] / took[share], cost[_NONE] / cost[share]
        rows.append(
          {
            "groups": groups,
            "width": width,
            "gone": share,
            "tokens": length,
            "bytes": _bytes(models[share][1]) / _bytes(whole[1]),
            "us": 1e6 * took[share],
            "FLOPs over": fewer,
            "times as fast": faster,
            "share of that": faster / fewer,
          }
        )
  return timing.Table(
    title="a layer without some of its groups, float32",
    rows=rows,
    notes=[
      "neurons: of a SwiGLU four times as wide; kv_groups: of attention with heads of "
      "64, a layer without an MLP",
      "FLOPs over: those of the whole layer over those of the smaller one",
      "share of that: times as fast, over FLOPs over",
      "us: the least of several turns, all sizes one after the other in each",
      f"device: {jax.devices()[0].device_kind}",
    ],
  )


def _one_layer(groups: str, width: int) -> tuple[Any, dict[str, Any]]:
  """A decoder of one layer in which almost all is of these groups."""
  neurons = groups == "neurons"
  heads = 1 if neurons else max(4, width // 64)
  attention = {"num_heads": heads, "num_kv_heads": heads, "head_dim": 64}
  config = model_config.DecoderConfig(
    vocab_size=8,
    embed_dim=width,
    num_layers=1,
    mlp="swiglu" if neurons else "none",
    mixer_options={"attention": attention},
    mlp_options={"swiglu": {"hidden_dim": 4 * width}} if neurons else {},
    scan=False,
  )
  model = decoder.Decoder(config)
  init = jax.jit(lambda key: model.init(key, *model.example_inputs())["params"])
  return model, init(jax.random.key(0))


def _without(
  model: Any, params: dict[str, Any], groups: str, share: float
) -> tuple[Any, dict[str, Any]]:
  options = {"groups": groups, "sparsity": share, "score": "random"}
  if groups == "neurons":
    options["multiple_of"] = 16
  tree = specs.specs(model)
  return registry.find("structured")(model, params, tree, options=options)


def _runner(model: Any, params: dict[str, Any], length: int) -> Any:
  """The layer as a function of its input; its weights are arguments."""
  layer = model.layer(0)
  places = jnp.arange(length)[None], jnp.ones((1, length), jnp.int32)
  own = params["layer_0"]
  apply = jax.jit(lambda own, x: layer.apply({"params": own}, x, None, *places, None))
  return lambda x: apply(own, x)[0]


def _bytes(params: dict[str, Any]) -> int:
  return sum(a.nbytes for a in jax.tree.leaves(params["layer_0"]))


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
