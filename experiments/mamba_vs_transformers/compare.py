"""One Mamba layer on the CPU: effjax beside HF transformers, in one process.

Both run in float32 on the same threads, in turns; the fastest of each counts, since
noise only adds. HF's Mamba-2 gets the chunk size that suits it best. PyTorch and
transformers come with `make oracle`.

Command: .venv/bin/python experiments/mamba_vs_transformers/compare.py
"""

from effjax.core import allocator

allocator.keep_freed_memory()

import dataclasses
import os
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import torch
import transformers
from transformers.models.mamba import modeling_mamba
from transformers.models.mamba2 import modeling_mamba2

from effjax.cli import timing
from effjax.core import registry

CHUNKS = (64, 128, 256)
# mixer, width, tokens, whether the gradient is taken
CASES = (
  ("mamba2", 256, 2048, True),
  ("mamba2", 512, 2048, True),
  ("mamba1", 256, 2048, False),
  ("mamba1", 256, 512, True),
  ("mamba1", 512, 2048, False),
  ("mamba1", 512, 512, True),
)


def main() -> None:
  """Prints the table."""
  threads = os.cpu_count()
  torch.set_num_threads(threads)
  print(
    timing.Table(
      title="one layer, batch 1, float32",
      rows=[_compare(*case) for case in CASES],
      notes=[
        f"{threads} threads each, in turns; best of at least 4 runs",
        f"transformers {transformers.__version__}, torch {torch.__version__}, "
        f"jax {jax.__version__}",
        f"HF's chunk: the best of {CHUNKS}",
      ],
    ).markdown()
  )


def _compare(mixer: str, width: int, tokens: int, gradient: bool) -> dict:
  if mixer == "mamba2":
    theirs = {chunk: _hf_mamba2(width, chunk) for chunk in CHUNKS}
  else:
    theirs = {"": modeling_mamba.MambaMixer(_mamba1_config(width), 0)}
  calls = {
    f"hf {chunk}": _torch_call(module, width, tokens, gradient)
    for chunk, module in theirs.items()
  }
  calls["effjax"] = _jax_call(mixer, width, tokens, gradient)
  secs = _race(calls)
  ours = secs.pop("effjax")
  best = min(secs, key=secs.get)
  return {
    "mixer": mixer,
    "width": width,
    "tokens": tokens,
    "pass": "forward+backward" if gradient else "forward",
    "hf_ms": 1e3 * secs[best],
    "hf_chunk": best.removeprefix("hf "),
    "effjax_ms": 1e3 * ours,
    "speedup": secs[best] / ours,
  }


def _race(calls: dict[str, Callable[[], None]]) -> dict[str, float]:
  """The fastest of several runs of each, taking turns."""
  for call in calls.values():
    call()
  secs = {name: [] for name in calls}
  for _ in range(8):
    for name, call in calls.items():
      if len(secs[name]) >= 4 and sum(secs[name]) > 20:
        continue
      start = time.perf_counter()
      call()
      secs[name].append(time.perf_counter() - start)
  return {name: min(values) for name, values in secs.items()}


def _mamba1_config(width: int) -> transformers.MambaConfig:
  return transformers.MambaConfig(
    hidden_size=width, state_size=16, expand=2, conv_kernel=4, num_hidden_layers=1
  )


def _hf_mamba2(width: int, chunk: int) -> torch.nn.Module:
  config = transformers.Mamba2Config(
    hidden_size=width,
    num_heads=2 * width // 64,
    head_dim=64,
    state_size=128,
    n_groups=1,
    chunk_size=chunk,
    num_hidden_layers=1,
  )
  return modeling_mamba2.Mamba2Mixer(config, 0)


def _torch_call(
  module: torch.nn.Module, width: int, tokens: int, gradient: bool
) -> Callable[[], None]:
  x = torch.randn(1, tokens, width, requires_grad=gradient)

  def forward() -> None:
    with torch.no_grad():
      module(x)

  def both() -> None:
    module.zero_grad()
    x.grad = None
    module(x).sum().backward()

  return both if gradient else forward


def _jax_call(
  mixer: str, width: int, tokens: int, gradient: bool
) -> Callable[[], None]:
  cls = registry.find("effjax.nn.mixers", mixer)
  options = cls.options_cls()
  if mixer == "mamba2":
    options = dataclasses.replace(options, chunk=64)
  module = cls(options, width)
  x_BLD = jax.random.normal(jax.random.key(0), (1, tokens, width))
  positions, segments = jnp.arange(tokens)[None], jnp.ones((1, tokens), jnp.int32)
  apply = lambda p, x: module.apply(p, x, positions=positions, segments=segments)[0]
  params = jax.jit(
    lambda x: module.init(jax.random.key(1), x, positions=positions, segments=segments)
  )(x_BLD)
  fn = jax.grad(lambda p, x: apply(p, x).sum(), argnums=(0, 1)) if gradient else apply
  compiled = jax.jit(fn).lower(params, x_BLD).compile()
  return lambda: jax.block_until_ready(compiled(params, x_BLD))


if __name__ == "__main__":
  main()
