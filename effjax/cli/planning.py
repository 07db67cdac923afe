"""Plans made in a process of its own, where a compiler that dies takes nothing along.

The process reads a request from its standard input and answers on its standard output,
both JSON. It pins JAX to the CPU first: with libtpu installed it would look for a TPU.
"""

import dataclasses
import json
import os
import subprocess
import sys
from typing import Any

from effjax.core import errors

_LINES_OF_A_CRASH = 3


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
  """One thing to compile.

  Attributes:
    config: the recipe, as given to --config.
    overrides: of it, as given on the command line.
    topology: the slice.
    stage: whose step; see recipe.pods.
    decode: rows and tokens of a prefill and a decoding step; None for a training step.
  """

  config: str
  overrides: tuple[str, ...]
  topology: str
  stage: str | None = None
  decode: tuple[int, int] | None = None


def run(request: Request) -> dict[str, dict[str, Any]]:
  """Plans in another process.

  Returns:
    Fields of `planned.Planned` by what was compiled: "train", or "prefill" and
    "decode".

  Raises:
    InputError: something does not fit together.
    EffjaxError: the compiler died.
  """
  ended = subprocess.run(
    [sys.executable, "-m", "effjax.cli.planning"],
    input=json.dumps(dataclasses.asdict(request)),
    capture_output=True,
    text=True,
    env={**os.environ, "JAX_PLATFORMS": "cpu"},
    check=False,
  )
  if ended.returncode == 0:
    answer = json.loads(ended.stdout.splitlines()[-1])
    if "error" in answer:
      raise errors.InputError(answer["error"])
    return answer
  last = " ".join(ended.stderr.split("\n")[-_LINES_OF_A_CRASH - 1 :]).strip()
  raise errors.EffjaxError(
    f"the process that compiles for {request.topology} ended with code "
    f"{ended.returncode}: {last[-500:]}"
  )


def _answer(request: Request) -> dict[str, Any]:
  from effjax.measure.pods import compiled
  from effjax.recipe import config as config_lib
  from effjax.recipe import pods

  compiled.forget_locations()
  config = config_lib.load(request.config, list(request.overrides))
  if request.decode is not None:
    made = pods.plan_serving(config, request.topology, request.stage, *request.decode)
  else:
    made = {"train": pods.plan_training(config, request.topology, request.stage)}
  return {name: dataclasses.asdict(one) for name, one in made.items()}


def _main() -> None:
  given = json.loads(sys.stdin.read())
  given["overrides"] = tuple(given["overrides"])
  given["decode"] = tuple(given["decode"]) if given.get("decode") else None
  try:
    answer = _answer(Request(**given))
  except errors.InputError as error:
    answer = {"error": str(error)}
  print(json.dumps(answer))


if __name__ == "__main__":
  _main()
