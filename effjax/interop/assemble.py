"""Between the tensors of a foreign file and a parameter tree.

An import checks every name and shape first, then reads one tensor at a time, straight
into the (stacked, sharded) array it belongs to, so it never holds much more than the
model. An export goes the other way, one foreign tensor at a time.
"""

import dataclasses
import fnmatch
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import SingleDeviceSharding
from jax.typing import DTypeLike

from effjax.core import errors, layers
from effjax.core import specs as specs_lib
from effjax.core import tree as tree_lib
from effjax.interop import rules as rules_lib
from effjax.parallel import spread as spread_lib
from effjax.weights import leaf as leaf_lib
from effjax.weights.leaves import adapted

_MAX_SHOWN = 3


class Piece(NamedTuple):
  """One foreign tensor's share of a parameter.

  Attributes:
    name: of the foreign tensor.
    rule: where in it the share is.
    shape: of the share, as ours.
  """

  name: str
  rule: rules_lib.Rule
  shape: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Place:
  """A parameter and the foreign tensors it is made of.

  Attributes:
    path: of the parameter, stacked.
    spec: what it is.
    pieces: in order: of one layer after the other, of each one expert after the other.
  """

  path: str
  spec: specs_lib.ParamSpec
  pieces: tuple[Piece, ...]


def places(
  model: Any,
  specs: Mapping[str, Any],
  rules_of: Callable[[int | None], rules_lib.Rules],
) -> list[Place]:
  """Where every parameter of a model is.

  Args:
    model: a Layered model.
    specs: its specs.
    rules_of: rules of a layer's parameters by the path below the layer, given the
      number of its parameter set; of all others, given None.

  Raises:
    InputError: the rules leave out a parameter: the foreign format has no place for it.
  """
  stacks = {} if model.runs is None else layers.places(model.runs)
  found = []
  for path, spec in tree_lib.flatten(specs).items():
    members, below = _members(path, stacks)
    pieces: list[Piece] = []
    for layer in members:
      rule = rules_of(layer).get(below)
      if rule is None:
        raise errors.InputError(f"{path}: the format has no tensor for it")
      shape = tuple(spec.shape[len(spec.stack) :])
      name = rule.name.replace("{k}", str(layer))
      if rule.stacked:
        pieces += [
          Piece(name.replace("{e}", str(expert)), rule, shape[1:])
          for expert in range(shape[0])
        ]
      else:
        pieces.append(Piece(name, rule, shape))
    found.append(Place(path, spec, tuple(pieces)))
  return found


def check(
  found: Sequence[Place], source: rules_lib.Source, ignored: Sequence[str] = ()
) -> None:
  """Whether a source has exactly these tensors, before any is read.

  Args:
    found: from `places`.
    source: where the tensors are.
    ignored: patterns of names that no parameter needs.

  Raises:
    InputError: tensors are missing, of another shape, or more than there should be.
  """
  wanted = {
    piece.name: piece.rule.foreign_shape(piece.shape)
    for place in found
    for piece in place.pieces
  }
  shapes = source.shapes()
  missing = [name for name in wanted if name not in shapes]
  if missing:
    raise errors.InputError(f"{source.where}: missing {_list(missing, 'tensor')}")
  for name, shape in wanted.items():
    if tuple(shapes[name]) != shape:
      raise errors.InputError(
        f"{source.where}: {name} has shape {tuple(shapes[name])}, the config says "
        f"{shape}"
      )
  extra = [
    name
    for name in shapes
    if name not in wanted and not any(fnmatch.fnmatchcase(name, i) for i in ignored)
  ]
  if extra:
    raise errors.InputError(
      f"{source.where}: {_list(extra, 'tensor')} that the model has no place for"
    )


def read(
  found: Sequence[Place],
  source: rules_lib.Source,
  dtype: DTypeLike | None = jnp.float32,
  spread: spread_lib.Spread | None = None,
) -> dict[str, Any]:
  """The parameter tree, read tensor by tensor onto its devices.

  Args:
    found: from `places`, checked.
    source: where the tensors are.
    dtype: of the parameters; None keeps what each tensor has. Training wants float32.
    spread: where they go; None for one device.
  """
  if spread is None:
    shardings = dict.fromkeys(
      (place.path for place in found), SingleDeviceSharding(jax.devices()[0])
    )
  else:
    specs = tree_lib.unflatten({place.path: place.spec for place in found})
    shapes = abstract(specs, jnp.float32)
    shardings = tree_lib.flatten(spread.params(specs, shapes))
  arrays = {}
  # The largest first, while little else is held: a tensor is there twice for a moment.
  for place in sorted(found, key=lambda place: -place.spec.size):
    arrays[place.path] = _array(place, source, dtype, shardings[place.path])
    # Copies are made behind our back, and would pile up.
    arrays[place.path].block_until_ready()
  return tree_lib.unflatten({place.path: arrays[place.path] for place in found})


def abstract(specs: Mapping[str, Any], dtype: DTypeLike | None) -> dict[str, Any]:
  """Shapes of the tree that `read` returns; with no dtype, the specs' one."""
  return jax.tree.map(
    lambda spec: jax.ShapeDtypeStruct(spec.shape, jnp.dtype(dtype or spec.dtype)),
    specs,
    is_leaf=lambda node: isinstance(node, specs_lib.ParamSpec),
  )


def _array(place: Place, source: rules_lib.Source, dtype: Any, to: Any) -> jax.Array:
  """One parameter, filled shard by shard."""
  shape = place.spec.shape
  dtype = jnp.dtype(dtype or source.read(place.pieces[0].name).dtype)
  lead = shape[: len(shape) - len(place.pieces[0].shape)]

  def fill(index: tuple[slice, ...]) -> np.ndarray:
    # All the leading axes together count pieces.
    number = np.arange(len(place.pieces)).reshape(lead)[index[: len(lead)]]
    rest = index[len(lead) :]
    if number.size == 1:
      piece = place.pieces[int(number.reshape(-1)[0])]
      array = piece.rule.read(source.read(piece.name), piece.shape)[rest]
      return np.ascontiguousarray(array, dtype).reshape(*number.shape, *array.shape)
    block = None
    for i, n in enumerate(number.ravel()):
      piece = place.pieces[n]
      array = piece.rule.read(source.read(piece.name), piece.shape)[rest]
      if block is None:
        block = np.empty((number.size, *array.shape), dtype)
      block[i] = array
    return block.reshape(*number.shape, *block.shape[1:])

  return jax.make_array_from_callback(shape, to, fill)


@dataclasses.dataclass(frozen=True)
class Foreign:
  """A foreign tensor to be written.

  Attributes:
    name: its name.
    shape: its shape.
    make: computes its values, of `dtype`.
    dtype: of the values.
  """

  name: str
  shape: tuple[int, ...]
  dtype: np.dtype
  make: Callable[[], np.ndarray]


def foreign(
  found: Sequence[Place], params: Mapping[str, Any], dtype: DTypeLike | None
) -> Iterator[Foreign]:
  """Every foreign tensor of a model, in the order of its parameters.

  Args:
    found: from `places`.
    params: plain arrays (see `require_plain`).
    dtype: to write; None keeps that of each parameter.
  """
  flat = tree_lib.flatten(params)
  shares: dict[str, list[tuple[Place, int]]] = {}
  for place in found:
    for number, piece in enumerate(place.pieces):
      shares.setdefault(piece.name, []).append((place, number))
  for name, parts in shares.items():
    first = parts[0][0].pieces[parts[0][1]]
    shape = first.rule.foreign_shape(first.shape)
    kind = jnp.dtype(dtype or flat[parts[0][0].path].dtype)

    def make(parts=parts, shape=shape, kind=kind) -> np.ndarray:
      whole = np.empty(shape, kind)
      for place, number in parts:
        piece = place.pieces[number]
        lead = place.spec.shape[: len(place.spec.shape) - len(piece.shape)]
        index = np.unravel_index(number, lead) if lead else ()
        array = np.asarray(flat[place.path][tuple(map(int, index))])
        piece.rule.write(whole, array.astype(kind))
      return whole

    yield Foreign(name, shape, kind, make)


def require_plain(
  params: Mapping[str, Any], what: str, dense: bool = False
) -> dict[str, Any]:
  """The tree with plain arrays only, for a format that holds nothing else.

  Args:
    params: leaves of any kind. Of a pruned array the zeros are values: it is plain.
    what: of the format, for messages.
    dense: whether to multiply out what is quantized or factorized.

  Raises:
    InputError: there are such leaves, and `dense` is not set.
  """
  flat = tree_lib.flatten(params)
  kinds: dict[str, str] = {}
  for path, leaf in flat.items():
    if leaf_lib.is_leaf_kind(leaf):
      if adapted.is_adapted(leaf):
        require_merged(path, what, dense)
      if not leaf.is_array:
        kinds.setdefault(leaf.kind, path)
      flat[path] = leaf.dense() if dense or leaf.is_array else leaf
  if kinds and not dense:
    kind, path = next(iter(kinds.items()))
    raise errors.InputError(
      f"{path} is {kind.replace('_', ' ')}, which {what} cannot hold; choose a format "
      "that can, or --dense to write what it stands for"
    )
  return tree_lib.unflatten(flat)


def require_merged(path: str, what: str, dense: bool) -> None:
  """Raises InputError for a parameter with adapters, unless sums are to be written.

  Args:
    path: of the parameter.
    what: of the format, for messages.
    dense: see `require_plain`.
  """
  if not dense:
    raise errors.InputError(
      f"{path} has adapters, which {what} cannot hold; merge them first (merge_lora), "
      "or use --dense to write the sums that they stand for"
    )


def _members(
  path: str, stacks: Mapping[tuple[str, str], list[int]]
) -> tuple[list[int | None], str]:
  """Numbers of the layers at a path, and the path below the layer."""
  run, _, rest = path.partition("/")
  body, _, name = rest.partition("/")
  if (run, body) in stacks:
    return list(stacks[run, body]), name
  if run.startswith("layer_") and run.removeprefix("layer_").isdigit():
    return [int(run.removeprefix("layer_"))], rest
  return [None], path


def _list(names: Sequence[str], what: str) -> str:
  shown = ", ".join(names[:_MAX_SHOWN])
  more = len(names) - _MAX_SHOWN
  plural = what if len(names) == 1 else f"{len(names)} {what}s"
  return f"{plural} {shown}" + (f" and {more} more" if more > 0 else "")
