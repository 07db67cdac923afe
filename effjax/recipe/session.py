"""What the stages of one run share: the plan, the opened data, the run folder."""

import dataclasses
import pathlib
import sys
import time
from collections.abc import Mapping
from typing import Any

import jax

from effjax.core import compiling
from effjax.data import evaluation, pipeline
from effjax.data.tasks import base
from effjax.measure import tasks
from effjax.models import encoder_config
from effjax.parallel import spread as spread_lib
from effjax.recipe import folder
from effjax.recipe import plan as plan_lib
from effjax.train import stages


@dataclasses.dataclass(frozen=True, kw_only=True)
class Session:
  """A run under way.

  Attributes:
    plan: what is to be done.
    data: the opened corpus.
    root: the run folder.
    profile: whether each training traces some of its steps.
  """

  plan: plan_lib.Plan
  data: pipeline.TextData
  root: pathlib.Path
  profile: bool = False

  @property
  def config(self) -> Any:
    """The root config."""
    return self.plan.config

  @property
  def corpus(self) -> str:
    """Name and hash of what is scored, as the table shows them."""
    return scored_on(self.config, self.data)

  @property
  def questions(self) -> tasks.Questions | None:
    """The task that every stage answers, if there is one."""
    return questions_of(self.config, self.data.tokenizer)

  def folder(self, index: int) -> pathlib.Path:
    """Folder of stage number `index` (from 0)."""
    return folder.stage_folder(self.root, index, self.config.stages[index].name)

  def start(
    self, index: int, spread: spread_lib.Spread | None = None
  ) -> tuple[Any, dict[str, Any], Mapping[str, Any]]:
    """Model, parameters and specs that stage `index` starts from.

    They are read from the parent's folder also when it was made a moment ago, so a
    resumed run computes with exactly what the first one had.

    Args:
      index: number of the stage.
      spread: the devices they go to; None for those of the plan.
    """
    parent = self.config.parent(index)
    if parent is None:
      return self.plan.model, self.fresh_params(spread=spread), self.plan.specs
    stage = stages.load_stage(self.folder(parent), spread or self.plan.spread)
    return stage.model, stage.params, stage.specs

  def fresh_params(
    self, seed: int | None = None, spread: spread_lib.Spread | None = None
  ) -> dict[str, Any]:
    """Freshly initialized parameters, each where it belongs on the mesh.

    Args:
      seed: None for that of the config.
      spread: the devices they go to; None for those of the plan.
    """
    model = self.plan.model
    init = lambda key: model.init(key, *model.example_inputs())["params"]
    spread = spread or self.plan.spread
    shardings = spread.params(self.plan.specs, self.plan.fresh)
    compiled = compiling.jit_once(init, out_shardings=shardings)
    return compiled(jax.random.key(self.config.seed if seed is None else seed))

  def eval_set(self, max_bytes: int | None = None) -> evaluation.EvalSet:
    """What is scored: the validation text, or its first `max_bytes`; all examples."""
    eval_set = self.data.eval_set
    num_bytes = eval_set.num_bytes
    if max_bytes is None or num_bytes is None or max_bytes >= num_bytes:
      return eval_set
    return evaluation.choose(
      self.data.corpus,
      self.data.tokenizer,
      max_bytes,
      eval_set.context,
      eval_set.stride,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Made:
  """What a stage made.

  Attributes:
    model: the model, as it is to be measured and saved.
    params: its parameter tree.
    specs: tree of its ParamSpecs.
    secs: wall time it took, over all starts.
    bytes_on_disk: of what it wrote, if not those of the parameters packed.
  """

  model: Any
  params: dict[str, Any]
  specs: Mapping[str, Any]
  secs: float
  bytes_on_disk: int | None = None


def questions_of(config: Any, tokenizer: Any) -> tasks.Questions | None:
  """The task of a root config, asked through a tokenizer."""
  if config.measure.task is None:
    return None
  return tasks.Questions(
    task=config.measure.task,
    tokenizer=tokenizer,
    limit=config.measure.task_limit,
    manual_dir=config.data.manual_dir,
  )


def scored_on(config: Any, data: pipeline.TextData | None) -> str:
  """Names and hashes of the texts that a row's quality is about."""
  found = []
  if not isinstance(config.model, encoder_config.EncoderConfig):
    found.append(f"{data.corpus.name} {data.corpus.facts['hash'][:12]}")
  if config.measure.task is not None:
    artefact = base.find(config.measure.task).artefact
    found.append(f"{config.measure.task} {artefact.sha256[:12]}")
  return ", ".join(found)


class Stopwatch:
  """Seconds since it was made."""

  def __init__(self):
    self._start = time.monotonic()

  def read(self) -> float:
    """Seconds since the start."""
    return time.monotonic() - self._start


def say(text: str) -> None:
  """One line of progress, on stderr, from process 0."""
  if jax.process_index() == 0:
    sys.stderr.write(text + "\n")
    sys.stderr.flush()
