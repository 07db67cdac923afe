"""Importing a model: how long, and how much more memory than the model holds.

A random model is written as a Hugging Face folder and as GGUF files, and each is
imported in a process of its own, which measures the peak of its resident memory over
what it had before. `peak_over_held` is that over the bytes of all parameters: 1 is a
model and nothing else.
"""

import json
import pathlib
import subprocess
import sys
import tempfile
import time
from typing import Any

import jax
import jax.numpy as jnp

from effjax.cli import timing
from effjax.core import specs as specs_lib
from effjax.interop import sources
from effjax.interop.gguf import export
from effjax.interop.hf import folder
from effjax.measure import bytes as bytes_lib
from effjax.measure import memory
from effjax.models import config as model_config
from effjax.models import decoder

# Name, what is written (a folder or file, its type, its width), and how it is imported.
# What stays quantized is wider, so that it holds about as many bytes.
LANES = (
  ("hf float32", ("hf", "float32", 1024), {}),
  ("hf bfloat16, kept", ("hf", "bfloat16", 1024), {"dtype": "keep"}),
  ("hf bfloat16, widened", ("hf", "bfloat16", 1024), {}),
  ("gguf F32", ("gguf", "F32", 1024), {}),
  ("gguf Q8_0, decoded", ("gguf", "Q8_0", 1024), {}),
  ("gguf Q8_0, kept", ("gguf", "Q8_0", 2048), {"keep_quantized": True}),
)
_PROGRAM = "from effjax.cli.benches import imports; imports.measure_one()"


def bench(quick: bool = False) -> timing.Table:
  """Imports each form once.

  Args:
    quick: a tiny model, to see that it works; the numbers mean nothing.
  """
  with tempfile.TemporaryDirectory() as made:
    root = pathlib.Path(made)
    for width in dict.fromkeys(form[-1] for _, form, _ in LANES):
      _write(root, width, quick)
    rows = [
      {"source": name, **_measured(_path(root, form), options)}
      for name, form, options in LANES
    ]
  return timing.Table(
    title="imports of random models, each in a process of its own",
    rows=rows,
    notes=[
      "files were just written, so reading is from memory",
      "peak: of resident memory, over what the process had before the import",
      f"device: {jax.devices()[0].device_kind}",
    ],
  )


def _path(root: pathlib.Path, form: tuple[str, str, int]) -> pathlib.Path:
  return root / "-".join(map(str, form))


def _write(root: pathlib.Path, width: int, quick: bool) -> None:
  """Writes the model of a width in every form that a lane reads."""
  embed_dim, num_layers, vocab = (width // 16, 2, 128) if quick else (width, 9, 32_768)
  model = decoder.Decoder(
    model_config.DecoderConfig(
      vocab_size=vocab,
      embed_dim=embed_dim,
      num_layers=num_layers,
      mixer_options={"attention": {"head_dim": embed_dim // 4, "num_heads": 4}},
    )
  )
  init = lambda key: model.init(key, *model.example_inputs())["params"]
  params, specs = jax.jit(init)(jax.random.key(0)), specs_lib.specs(model)
  for form in dict.fromkeys(form for _, form, _ in LANES if form[-1] == width):
    kind, type, _ = form
    if kind == "hf":
      folder.save(_path(root, form), model, params, specs, dtype=type)
    else:
      export.save(_path(root, form), model, params, specs, type=type)


def _measured(path: pathlib.Path, options: dict[str, Any]) -> dict[str, Any]:
  done = subprocess.run(
    [sys.executable, "-c", _PROGRAM, str(path), json.dumps(options)],
    check=True,
    stdout=subprocess.PIPE,
    text=True,
  )
  return json.loads(done.stdout)


def measure_one() -> None:
  """Imports `argv[1]` with the options in `argv[2]`; prints what it took as JSON."""
  path, options = sys.argv[1], json.loads(sys.argv[2])
  dtype = options.pop("dtype", "float32")
  opened = sources.open_source(path, **options)
  jax.block_until_ready(jnp.ones(1) + 1)  # The backend is not part of the import.
  before = _resident()
  peak, start = memory.Peak(), time.perf_counter()
  params = opened.load(None if dtype == "keep" else dtype)
  jax.block_until_ready(params)
  secs, held = time.perf_counter() - start, bytes_lib.held_bytes(params)
  found = peak.read()
  above = None if found is None or before is None else found - before
  row = {
    "held_mb": held / 1e6,
    "peak_mb": None if above is None else above / 1e6,
    "peak_over_held": None if above is None else above / held,
    "secs": secs,
  }
  print(json.dumps(row))


def _resident() -> int | None:
  """Resident bytes of this process now, or None on a system that does not say."""
  try:
    pages = pathlib.Path("/proc/self/statm").read_text().split()[1]
  except OSError:
    return None
  return int(pages) * 4096


TECHNIQUE = bench
