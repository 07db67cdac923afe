"""Who reads and who writes which channels, by the specs alone.

The residual stream is the one instance "embed" of an axis. What touches it is a norm,
a reader (a matrix that contracts a norm's output), or a writer (a matrix, embedding or
bias that adds to it). Whatever else touches it works on its channels one by one, and
cannot be rotated.
"""

import dataclasses
from collections.abc import Mapping

from effjax.core import errors
from effjax.core.specs import ParamSpec

_STREAM = "embed"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stream:
  """The parameters of a residual stream, by path.

  Attributes:
    norms: the scale of each norm, and the matrices that read it.
    writers: what adds to the stream.
    table: the embedding of tokens, if there is one.
    unread: scale of the norm that no matrix reads: what a tied head reads; or None.
  """

  norms: dict[str, tuple[str, ...]]
  writers: tuple[str, ...]
  table: str | None
  unread: str | None

  @property
  def readers(self) -> tuple[str, ...]:
    """All matrices that read the stream, each through a norm."""
    return tuple(path for paths in self.norms.values() for path in paths)


def find(specs: Mapping[str, ParamSpec], tied: bool) -> Stream:
  """Sorts out the residual stream of a model.

  Args:
    specs: path to spec.
    tied: whether the output head is the embedding of the tokens.

  Raises:
    InputError: a parameter of the stream cannot be rotated, or it is not said who reads
      whom; it is named.
  """
  touching = {p: s for p, s in specs.items() if _STREAM in s.instances}
  norms = _norms(touching)
  readers: dict[str, list[str]] = {module: [] for module in norms}
  writers = []
  for path, spec in touching.items():
    if path in norms.values():
      continue
    if _writes(path, spec, specs):
      writers.append(path)
    elif not _contracts(spec):
      raise errors.InputError(
        f"rotation cannot rotate {path} ({spec.kind} over {', '.join(spec.axes)}): it "
        "works on the channels of the residual stream one by one; use stream=False"
      )
    elif spec.reads not in readers:
      raise errors.InputError(
        f"rotation cannot fold a norm into {path}: it reads {spec.reads or 'no norm'}, "
        "not a norm of the residual stream; use stream=False"
      )
    else:
      readers[spec.reads].append(path)
  unread = [module for module, paths in readers.items() if not paths]
  if len(unread) > int(tied):
    raise errors.InputError(
      f"rotation cannot fold {unread[0]}: no weight says that it reads it; use "
      "stream=False"
    )
  tables = [p for p, s in touching.items() if s.axes == ("vocab", _STREAM)]
  return Stream(
    norms={norms[module]: tuple(paths) for module, paths in readers.items()},
    writers=tuple(writers),
    table=tables[0] if tables else None,
    unread=norms[unread[0]] if unread else None,
  )


def value_pairs(specs: Mapping[str, ParamSpec]) -> dict[str, tuple[str, ...]]:
  """Matrices of values, and for each the matrices that read its heads.

  Between the two every head may be mixed over tokens, but not over channels: a matrix
  that reads heads past a norm or a gate does not say that it reads the values.
  """
  pairs: dict[str, tuple[str, ...]] = {}
  for path, spec in specs.items():
    values = specs.get(spec.reads or "")
    if values is None or spec.kind != "matrix" or values.kind != "matrix":
      continue
    if spec.head_dim is not None and spec.head_dim == values.head_dim:
      pairs[spec.reads] = (*pairs.get(spec.reads, ()), path)
  return pairs


def from_hidden(specs: Mapping[str, ParamSpec]) -> tuple[str, ...]:
  """Matrices from the hidden units of an MLP, experts' too, into the stream."""
  return tuple(
    path
    for path, spec in specs.items()
    if spec.kind == "matrix"
    and spec.axes[-2] == "mlp"
    and spec.instances[-1] == _STREAM
  )


def bias_of(path: str, specs: Mapping[str, ParamSpec]) -> str | None:
  """The bias that is added to what a matrix puts out, or None."""
  bias = f"{path}_bias"
  return bias if bias in specs and specs[bias].kind == "bias" else None


def _norms(touching: Mapping[str, ParamSpec]) -> dict[str, str]:
  """The path of each norm, and of its scale."""
  norms: dict[str, str] = {}
  for path, spec in touching.items():
    if spec.kind != "norm":
      continue
    module, _, name = path.rpartition("/")
    if name != "scale":
      raise errors.InputError(
        f"rotation cannot fold {module}: it has a {name}, as a layer norm, which "
        "subtracts the mean, and no rotation keeps means; use stream=False, or a model "
        "with norm='rms'"
      )
    norms[module] = path
  return norms


def _contracts(spec: ParamSpec) -> bool:
  """Whether it is a matrix that contracts the stream and nothing else of it."""
  on = [i - len(spec.axes) for i, a in enumerate(spec.instances) if a == _STREAM]
  return on == [-2] and spec.kind in ("matrix", "router")


def _writes(path: str, spec: ParamSpec, specs: Mapping[str, ParamSpec]) -> bool:
  """Whether it is added to the stream as it is."""
  on = [i - len(spec.axes) for i, a in enumerate(spec.instances) if a == _STREAM]
  if on != [-1]:
    return False
  if spec.kind == "bias":
    matrix = path.removesuffix("_bias")
    return matrix != path and matrix in specs and _writes(matrix, specs[matrix], specs)
  return spec.kind in ("matrix", "embedding")
