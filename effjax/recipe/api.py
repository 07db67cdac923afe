"""The Python interface: a finished stage, looked at, changed and measured."""

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from effjax.compress import api as compress
from effjax.compress import registry as transforms
from effjax.core import config as core_config
from effjax.core import errors, technique
from effjax.core import specs as specs_lib
from effjax.core import tree as tree_lib
from effjax.data import pipeline
from effjax.infer import embed as embed_lib
from effjax.infer import generate as generate_lib
from effjax.infer import sampling
from effjax.interop import linen
from effjax.measure import bytes as bytes_lib
from effjax.measure import leaves, rows
from effjax.models import encoder
from effjax.recipe import config as config_lib
from effjax.recipe import folder, session
from effjax.train import stages


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
  """A stage of a run, loaded.

  Attributes:
    model: the model.
    params: its parameters, with leaves as the stage made them.
    specs: tree of ParamSpecs of the same structure.
    tokenizer: text to ids and back.
    config: the root config of the run.
    stage: name of the stage.
    row: its row of the results table.
  """

  model: Any
  params: dict[str, Any]
  specs: dict[str, Any]
  tokenizer: Any
  config: config_lib.Config
  stage: str
  row: dict[str, Any]

  def data(self) -> pipeline.TextData:
    """The text the run was trained and scored on, opened.

    Raises:
      InputError: the corpus cannot be opened here.
    """
    return pipeline.open_data(self.config.data, tokenizer=self.tokenizer)


def load(workdir: str | pathlib.Path, stage: str | None = None) -> Run:
  """Loads a finished stage of a run.

  Args:
    workdir: the run folder.
    stage: name of the stage; the last finished one if None.

  Raises:
    InputError: not a run folder, no such stage, or it is not finished.
  """
  root = pathlib.Path(workdir)
  if not (root / folder.CONFIG).is_file():
    raise errors.InputError(f"{root} is not a run folder: it has no {folder.CONFIG}")
  config = config_lib.from_dict(folder.read_json(root / folder.CONFIG))
  names = [s.name for s in config.stages]
  finished = [
    name for i, name in enumerate(names) if folder.stage_folder(root, i, name).is_dir()
  ]
  if not finished:
    raise errors.InputError(f"{root} has no finished stage; run its recipe first")
  if stage is None:
    stage = finished[-1]
  if stage not in names:
    raise errors.unknown(f"stage of {root}", stage, names)
  if stage not in finished:
    raise errors.InputError(
      f"stage {stage!r} of {root} is not finished; finished: {', '.join(finished)}"
    )
  path = folder.stage_folder(root, names.index(stage), stage)
  loaded = stages.load_stage(path)
  return Run(
    model=loaded.model,
    params=loaded.params,
    specs=loaded.specs,
    tokenizer=loaded.tokenizer,
    config=config,
    stage=stage,
    row=folder.read_json(path / folder.ROW),
  )


def require_language_model(run: Run, needed: str) -> None:
  """Raises InputError unless a stage gives texts a probability.

  Args:
    run: a loaded stage.
    needed: what would have been done with it, as the end of a sentence.
  """
  if isinstance(run.model, encoder.Encoder):
    raise errors.InputError(
      f"stage {run.stage!r} is no language model but an encoder, which {needed}"
    )


def transform(
  name: str,
  params: Mapping[str, Any],
  specs: Mapping[str, Any],
  stats: Mapping[str, Any] | None = None,
  *,
  where: Any = None,
  options: Any = None,
) -> dict[str, Any]:
  """Applies a transform of `effjax list transforms` to a tree.

  Args:
    name: registry key, such as "rtn" or "magnitude".
    params: parameter tree, not changed. A parameter of another shape than its spec (a
      Linen kernel with axes of heads) is reshaped.
    specs: tree of ParamSpecs of the same structure.
    stats: what `effjax.calibrate` returned, for transforms that need it.
    where: which parameters, such as {"path": "mlp"}; None for the default.
    options: fields of the transform's options.

  Returns:
    The new tree.

  Raises:
    InputError: unknown transform, bad options, an empty selection, or missing stats.
  """
  change = transforms.find(name)
  if isinstance(change, technique.ModelTransform):
    raise errors.InputError(
      f"{name} works on a model, not on a tree alone: call "
      f"effjax.transform_model({name!r}, model, params, batches)"
    )
  options = change.options(options) if isinstance(options, Mapping) else options
  options = options or change.options(None)
  collect = change.collected(options)
  if collect and stats is None:
    raise errors.InputError(
      f"{name} needs statistics: pass stats=effjax.calibrate(model, params, batches, "
      f"collect={collect})"
    )
  params = linen.matrices(params, specs)
  return change(params, specs, stats, where=where, options=options)


def transform_model(
  name: str,
  model: Any,
  params: Mapping[str, Any],
  batches: Sequence[Mapping[str, Any]] = (),
  *,
  where: Any = None,
  options: Any = None,
  order: str = "one_shot",
) -> tuple[Any, dict[str, Any]]:
  """Applies any transform of `effjax list transforms` to a model and its parameters.

  Args:
    name: registry key, such as "gptq" or "awq".
    model: a decoder or an encoder, as a loaded stage has it.
    params: its parameters, not changed.
    batches: what the technique runs the model on, where it does: dicts of arrays, all
      of one shape, such as `next(run.data().train_iterator())`.
    where: which parameters, such as {"path": "mlp"}; None for the default.
    options: fields of the transform's options.
    order: how statistics are gathered: "one_shot", "sequential" (layer by layer) or
      "true_sequential" (also within a layer).

  Returns:
    The model, whose config a transform may change, and the new parameters.

  Raises:
    InputError: unknown transform, bad options, an empty selection, missing batches.
  """
  return compress.transform(
    transforms.find(name),
    model,
    params,
    specs_lib.specs(model),
    batches,
    where=where,
    options=options,
    order=order,
  )


def sizes(params: Mapping[str, Any], specs: Mapping[str, Any]) -> dict[str, Any]:
  """What a tree holds, of any model: the bytes and counts of a results row.

  Args:
    params: leaves of any kind.
    specs: tree of ParamSpecs of the same structure.

  Returns:
    `num_params`, `num_nonzero`, `bits_per_weight`, `bytes_held`, `simulated`.
  """
  num_weights = sum(spec.size for spec in tree_lib.flatten(specs).values())
  return {
    "num_params": bytes_lib.num_params(params),
    "num_nonzero": bytes_lib.num_nonzero(params),
    "bits_per_weight": bytes_lib.bits_per_weight(params, num_weights),
    "bytes_held": bytes_lib.held_bytes(params),
    "simulated": leaves.simulated(params),
  }


def evaluate(run: Run, params: Mapping[str, Any] | None = None) -> dict[str, Any]:
  """Loss, perplexity and bits per byte on the run's validation text.

  With `measure.task` also the accuracy on it, which is all there is of an encoder.

  Args:
    run: a loaded stage.
    params: another tree for its model; the stage's own if None.

  Raises:
    InputError: an encoder, and the run has no task.
  """
  params = run.params if params is None else params
  batch_size = run.config.measure.eval_batch_size
  questions = session.questions_of(run.config, run.tokenizer)
  if isinstance(run.model, encoder.Encoder):
    if questions is None:
      raise errors.InputError(
        f"stage {run.stage!r} is an encoder, and its run has no measure.task to score "
        "it on; see effjax.embed, and effjax score --task"
      )
    return questions.quality(run.model, params, batch_size)
  eval_set = run.data().eval_set
  return rows.measure_quality(run.model, params, eval_set, questions, batch_size)


def measure(
  run: Run, params: Mapping[str, Any] | None = None, name: str = "here"
) -> dict[str, Any]:
  """A row of the results table, with everything that is measured after a stage.

  Args:
    run: a loaded stage.
    params: another tree for its model; the stage's own if None.
    name: name of the row.
  """
  is_encoder = isinstance(run.model, encoder.Encoder)
  data = None if is_encoder else run.data()
  about = rows.Stage(
    name=name,
    technique="python",
    after=run.stage,
    num_weights=sum(spec.size for spec in tree_lib.flatten(run.specs).values()),
    seed=run.config.seed,
    corpus=session.scored_on(run.config, data),
  )
  params = run.params if params is None else params
  return rows.measure_stage(
    run.model,
    params,
    None if data is None else data.eval_set,
    run.config.measure,
    about,
    session.questions_of(run.config, run.tokenizer),
  )


def embed(
  run: Run, texts: Sequence[str], params: Mapping[str, Any] | None = None
) -> np.ndarray:
  """The embedding of each text `[N, D]`, float32 and of length 1, by an encoder.

  Args:
    run: a loaded stage.
    texts: N texts; what is longer than the model was trained for loses its end.
    params: another tree for its model; the stage's own if None.

  Raises:
    InputError: the model is no encoder, or it came without a tokenizer.
  """
  if run.tokenizer is None:
    raise errors.InputError(
      f"stage {run.stage!r} has no tokenizer; import the model with its own"
    )
  params = run.params if params is None else params
  batch_size = run.config.measure.eval_batch_size
  return embed_lib.embed(run.model, params, run.tokenizer, texts, batch_size)


def generate(
  run: Run,
  prompt: str,
  *,
  params: Mapping[str, Any] | None = None,
  max_tokens: int = 128,
  seed: int = 0,
  chat: bool = False,
  system: str | None = None,
  stop: str | Sequence[str] = (),
  **sampling_options: Any,
) -> str:
  """The continuation of a prompt, or a chat model's answer to it.

  Args:
    run: a loaded stage.
    prompt: text to continue; with `chat`, a user's message.
    params: another tree for its model; the stage's own if None.
    max_tokens: most tokens to generate.
    seed: of the random choices.
    chat: write the prompt as the model's chat template does; only the answer returns.
    system: with `chat`, how to answer.
    stop: a string, or several, before the first of which the text ends.
    **sampling_options: temperature, top_k, top_p, min_p, repetition_penalty (see
      infer.sampling).

  Raises:
    InputError: an option is out of range, the text longer than trained for, or the
      model has no chat template that takes these messages.
  """
  require_language_model(run, "writes no text")
  options = core_config.build(sampling.SamplingOptions, sampling_options, "sampling")
  pieces = generate_lib.stream(
    run.model,
    run.params if params is None else params,
    run.tokenizer,
    prompt,
    max_tokens=max_tokens,
    options=options,
    seed=seed,
    stop=(stop,) if isinstance(stop, str) else tuple(stop),
    chat=chat,
    system=system,
  )
  return "".join(pieces)
