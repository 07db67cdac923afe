"""Imports a model into a run folder of its own, without measuring it.

The folder is that of a recipe whose one stage is the import, so whatever reads run
folders (`generate`, `score`, `export`, `effjax.load`) reads it as any other.
"""

import pathlib
from typing import Any

import jax

from effjax.core import config as core_config
from effjax.core import tree as tree_lib
from effjax.interop import sources
from effjax.measure import config as measure_config
from effjax.measure import rows
from effjax.recipe import committing, environment, folder
from effjax.recipe import config as config_lib
from effjax.recipe import session as session_lib

STAGE = "import"
# Scored in windows of this many tokens, or of what the model was trained on.
_CONTEXT = 1024


def import_model(
  source: str,
  root: pathlib.Path,
  *,
  dtype: str = "float32",
  keep_quantized: bool = False,
  manual_dir: str | None = None,
  fresh: bool = False,
) -> dict[str, Any]:
  """Reads a model from elsewhere into the run folder `root`.

  Args:
    source: see interop.sources.
    root: the run folder; an import that was interrupted starts over.
    dtype, keep_quantized, manual_dir: see interop.config.
    fresh: deletes an earlier run in that folder first.

  Returns:
    The row of the results table, without quality and times.

  Raises:
    InputError: nothing that can be imported, or the folder holds something else.
    OSError: the disk is full (ENOSPC); nothing is half-written.
  """
  found = sources.open_source(source, manual_dir, keep_quantized)
  length = min(_CONTEXT, found.model.config.max_len)
  values = {
    "stages": (
      {
        "name": STAGE,
        "technique": config_lib.IMPORT,
        "options": {
          "source": str(source),
          "dtype": dtype,
          "keep_quantized": keep_quantized,
          "manual_dir": manual_dir,
        },
      },
    ),
    "data": {"tokenizer": "model", "sequence_length": length},
    "measure": {"latency": False},
  }
  config = config_lib.from_dict(values)
  plain = core_config.to_dict(config)
  with folder.opened(root, plain, (), fresh):
    target = folder.stage_folder(root, 0, STAGE)
    if target.exists():
      return folder.read_json(target / folder.ROW)
    folder.write_json(root / "env.json", environment.describe() | found.origin)
    watch = session_lib.Stopwatch()
    params = jax.block_until_ready(found.load(config.imported.kept_dtype))
    made = session_lib.Made(
      model=found.model, params=params, specs=found.specs, secs=watch.read()
    )
    row = _row(made, config.measure)
    committing.commit(target, made, found.tokenizer, row)
  return row


def _row(
  made: session_lib.Made, config: measure_config.MeasureConfig
) -> dict[str, Any]:
  about = rows.Stage(
    name=STAGE,
    technique=config_lib.IMPORT,
    after=None,
    num_weights=sum(spec.size for spec in tree_lib.flatten(made.specs).values()),
    seed=0,
    corpus="",
    stage_secs=made.secs,
  )
  return rows.measure_stage(made.model, made.params, None, config, about)
