"""A recipe of a model of one layer on a line of text, for what stages do."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

_CONFIG = '''"""A tiny model, and stages."""
import ml_collections


def get_config(arg=""):
  c = ml_collections.ConfigDict()
  c.data = {
    "corpus": "text_files",
    "options": {"paths": (TEXTS,)},
    "tokenizer": "bytes",
    "vocab_size": 257,
    "sequence_length": 32,
    "batch_size": 2,
    "eval_bytes": 200,
  }
  c.model = {
    "vocab_size": 257,
    "embed_dim": 16,
    "num_layers": 1,
    "mixer_options": {
      "attention": {"num_heads": 2, "num_kv_heads": 1, "head_dim": 8},
    },
    "max_len": 64,
  }
  c.measure = {"latency": False, "xz_preset": 0}
  c.mesh = {"num_devices": 1}
  c.stages = STAGES
  return c
'''


def write(folder: pathlib.Path, stages: Sequence[Mapping[str, Any]]) -> str:
  """Writes the config and its text; returns the config's path."""
  texts = folder / "texts"
  texts.mkdir(exist_ok=True)
  (texts / "a.txt").write_text("a little text to train on, again and again\n" * 60)
  path = folder / "tiny.py"
  text = _CONFIG.replace("TEXTS", repr(str(texts / "*.txt")))
  path.write_text(text.replace("STAGES", repr(tuple(stages))))
  return str(path)
