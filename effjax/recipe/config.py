"""The root config: everything a run needs, checked before anything happens.

A recipe is a tuple of stages, each starting from what an earlier one made: a tree.
"""

import dataclasses
import functools
import re
from collections.abc import Sequence
from typing import Any

from effjax.compress import api as compress
from effjax.compress import registry as transforms
from effjax.core import config as config_lib
from effjax.core import errors
from effjax.core import select as select_lib
from effjax.data import config as data_config
from effjax.interop import config as import_config
from effjax.interop import exports, sources
from effjax.interop import opened as opened_lib
from effjax.measure import config as measure_config
from effjax.models import config as model_config
from effjax.models import encoder_config
from effjax.parallel import mesh as mesh_lib
from effjax.recipe import files, overrides, rewinding
from effjax.train import config as train_config

TRAIN = "train"
IMPORT = "import"
EXPORT = "export"
REWIND = "rewind"
# What takes the whole model, and the options it has.
_WHOLE = {
  IMPORT: import_config.ImportOptions,
  EXPORT: exports.ExportOptions,
  REWIND: rewinding.RewindOptions,
}
# What `after` says to start from the freshly initialized model.
INIT = "init"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


@dataclasses.dataclass(frozen=True, kw_only=True)
class StageConfig:
  """One stage of a recipe.

  Attributes:
    name: unique; also names the stage's folder.
    technique: "train", "import" (a model from elsewhere, only as the first stage),
      "export" (writes a file or folder that others read), "rewind" (masks over the
      weights of an earlier stage), or a transform of `effjax list transforms`.
    after: the earlier stage it starts from; None for the one before it, "init" for the
      freshly initialized model (what the first stage starts from anyway).
    where: which parameters (see core.select); None for the technique's default, which
      for "train" is all of them.
    options: fields of the technique's options; missing ones get their defaults.
    calibration: the text that a transform runs the model on, where it needs any.
  """

  name: str
  technique: str
  after: str | None = None
  where: dict[str, Any] | None = None
  options: dict[str, Any] = dataclasses.field(default_factory=dict)
  calibration: compress.CalibrationConfig = compress.CalibrationConfig()

  def __post_init__(self):
    config_lib.require(
      bool(_NAME.fullmatch(self.name)) and self.name != INIT,
      f"name={self.name!r} must be letters, digits, '.', '_' or '-', and not {INIT!r}",
    )
    known = (TRAIN, *_WHOLE, *transforms.names())
    if self.technique not in known:
      raise errors.unknown("technique", self.technique, known)
    # Defaults are filled in, so that config.json says what really ran.
    resolved = config_lib.to_dict(self.build_options())
    object.__setattr__(self, "options", resolved)
    where = self.build_where()
    config_lib.require(
      self.technique not in _WHOLE or where == select_lib.Where(),
      f"{self.technique!r} takes the whole model: leave out where",
    )
    object.__setattr__(self, "where", config_lib.to_dict(where))

  def build_options(self) -> Any:
    """The options dataclass of the technique."""
    if self.technique == TRAIN:
      return config_lib.build(train_config.TrainConfig, self.options, "options")
    if self.technique in _WHOLE:
      return config_lib.build(_WHOLE[self.technique], self.options, "options")
    return transforms.find(self.technique).options(self.options)

  def build_where(self) -> select_lib.Where:
    """The selection."""
    default = select_lib.Where()
    if self.technique not in (TRAIN, *_WHOLE):
      default = transforms.find(self.technique).default_where
    return select_lib.parse(self.where, default)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
  """A run.

  Attributes:
    model: what is trained; None where the first stage imports one, whose config it
      becomes.
    stages: what happens to it, in this order.
    seed: of initialization and of each training's noise.
    data: what it is trained and scored on.
    mesh: how devices are used.
    measure: how every stage is measured.
  """

  model: model_config.DecoderConfig | encoder_config.EncoderConfig | None = None
  stages: tuple[StageConfig, ...] = ()
  seed: int = 0
  data: data_config.DataConfig = data_config.DataConfig()
  mesh: mesh_lib.MeshConfig = mesh_lib.MeshConfig()
  measure: measure_config.MeasureConfig = measure_config.MeasureConfig()

  def __post_init__(self):
    config_lib.require(self.seed >= 0, f"seed={self.seed} must not be negative")
    config_lib.require(bool(self.stages), "stages must hold at least one stage")
    self._check_tree()
    self._check_teachers()
    self._check_rewinds()
    self._resolve_import()
    self._check_lengths()
    config_lib.require(
      self.model.vocab_size >= self.data.vocab_size,
      f"model.vocab_size={self.model.vocab_size} is smaller than the "
      f"{self.data.vocab_size} of data.vocab_size; make them equal",
    )

  @property
  def imported(self) -> import_config.ImportOptions | None:
    """What the first stage imports, or None."""
    first = self.stages[0]
    return first.build_options() if first.technique == IMPORT else None

  @functools.cached_property
  def source(self) -> opened_lib.Opened:
    """What the first stage imports, its headers read and checked, once.

    Raises:
      InputError: it is gone, or not what it was.
    """
    try:
      options = self.imported
      found = sources.open_source(
        options.source, options.manual_dir, options.keep_quantized
      )
    except errors.InputError as error:
      raise errors.InputError(f"config.stages[0]: {error}") from None
    if self.model is not None and found.model.config != self.model:
      raise errors.InputError(
        f"config.stages[0]: {self.imported.source} is not the model of config.model; "
        "leave config.model out, then it is what the import brings"
      )
    return found

  def _resolve_import(self) -> None:
    """Fills in what only the imported model knows."""
    for i, stage in enumerate(self.stages):
      config_lib.require(
        stage.technique != IMPORT or i == 0,
        f"config.stages[{i}] ({stage.name}): only the first stage can be an import",
      )
    config_lib.require(
      self.model is not None or self.imported is not None,
      "config.model is missing; it has no default unless the first stage is an import",
    )
    if self.model is not None:
      return
    found = self.source
    object.__setattr__(self, "model", found.model.config)
    if self.data.tokenizer == "model":
      # A source may have no tokenizer: ids can be scored all the same.
      known = found.tokenizer or found.model.config
      data = dataclasses.replace(self.data, vocab_size=known.vocab_size)
      object.__setattr__(self, "data", data)

  def parent(self, index: int) -> int | None:
    """Number of the stage that stage `index` starts from, None for a fresh model."""
    after = self.stages[index].after
    if after == INIT or (after is None and index == 0):
      return None
    if after is None:
      return index - 1
    return [stage.name for stage in self.stages].index(after)

  def _check_tree(self) -> None:
    earlier: list[str] = []
    later = [stage.name for stage in self.stages]
    for i, stage in enumerate(self.stages):
      if stage.name in earlier:
        raise errors.InputError(
          f"config.stages[{i}]: name {stage.name!r} is taken by "
          f"config.stages[{earlier.index(stage.name)}]; stage names are unique"
        )
      if stage.after not in (None, INIT, *earlier):
        if stage.after in later:
          raise errors.InputError(
            f"config.stages[{i}] ({stage.name}): after={stage.after!r} is not an "
            "earlier stage; a stage starts from one that stands before it"
          )
        kind = f"stage in config.stages[{i}].after"
        raise errors.unknown(kind, stage.after, (*earlier, INIT))
      earlier.append(stage.name)

  def _check_teachers(self) -> None:
    for i, stage in enumerate(self.stages):
      name = stage.options["teacher"] if stage.technique == TRAIN else None
      earlier = [other.name for other in self.stages[:i]]
      config_lib.require(
        name is None or name in earlier,
        f"config.stages[{i}] ({stage.name}): teacher={name!r} is not an earlier stage; "
        f"those before it are: {', '.join(earlier) or 'none'}",
      )

  def _check_rewinds(self) -> None:
    for i, stage in enumerate(self.stages):
      if stage.technique != REWIND:
        continue
      to, earlier = stage.options["to"], [other.name for other in self.stages[:i]]
      if self.stages[0].technique != IMPORT:
        earlier.append(INIT)
      config_lib.require(
        to in earlier,
        f"config.stages[{i}] ({stage.name}): to={to!r} is not an earlier stage; there "
        f"are {', '.join(earlier) or 'none'}",
      )

  def teacher(self, index: int) -> int | None:
    """Number of the stage that teaches stage `index`, None where none does."""
    stage = self.stages[index]
    name = stage.options["teacher"] if stage.technique == TRAIN else None
    return None if name is None else [s.name for s in self.stages].index(name)

  def _check_lengths(self) -> None:
    max_len = self.model.max_len
    needs = {
      "data.sequence_length": self.data.sequence_length,
      "data.eval_context": self.data.eval_window[0],
    }
    if self.measure.latency and isinstance(self.model, encoder_config.EncoderConfig):
      needs["measure.prompt_tokens"] = self.measure.prompt_tokens
    elif self.measure.latency:
      needs["measure's prompt_tokens + warmup_tokens + decode_tokens"] = (
        self.measure.needed_len
      )
    for i, stage in enumerate(self.stages):
      if stage.technique == TRAIN and stage.options["sequence_length"]:
        name = f"stages[{i}].options.sequence_length"
        needs[name] = stage.options["sequence_length"]
    for name, length in needs.items():
      config_lib.require(
        length <= max_len,
        f"{name}: {length} tokens are more than model.max_len={max_len}, the longest "
        "sequence the model is meant for; shorten it or raise model.max_len",
      )


def load(reference: str, changes: Sequence[str] = ()) -> Config:
  """The config of `FILE[:arg]` with overrides applied, fully checked by itself.

  Args:
    reference: config file and argument, such as "configs/quickstart.py:smoke".
    changes: overrides such as "--config.stages[2].options.bits=3".

  Raises:
    InputError: any mistake, in one line.
  """
  return config_lib.build(Config, overrides.apply(files.read(reference), changes))


def from_dict(values: Any) -> Config:
  """The config written by `core.config.to_dict`, as in a run folder's config.json."""
  return config_lib.build(Config, values)
