"""Which weights of a matrix go together, and of several matrices which stay.

| pattern        | what is kept or pruned as one                | saves                |
|----------------|----------------------------------------------|----------------------|
| "unstructured" | each weight                                  | bytes, after `pack`  |
| "N:M"          | N of any M inputs in a row stay, per output  | bytes, if packed     |
| "BxC"          | a block of B inputs and C outputs            | bytes, time, packed  |
| "rows"         | all weights of an input                      | bytes, after `pack`  |
| "columns"      | all weights of an output                     | bytes, after `pack`  |

N counts what is *kept*, as in qwix and jaxpruner (in the code of Wanda and SparseGPT it
counts what is pruned; 2:4 and 4:8 are the same in both). The score of a unit is the
mean of the scores of its weights.

Letters: I inputs, O outputs of a matrix `[*stack, I, O]`.
"""

import dataclasses
import functools
import re
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from effjax.core import config, errors

WHOLE = ("unstructured", "rows", "columns")


@dataclasses.dataclass(frozen=True)
class Pattern:
  """A pattern of pruning.

  Attributes:
    name: as in the table.
    keep, of: N and M of "N:M", else 0.
    block: inputs and outputs of a unit; 0 stands for all of the matrix.
  """

  name: str
  keep: int = 0
  of: int = 0
  block: tuple[int, int] = (1, 1)

  @property
  def fixed_sparsity(self) -> float | None:
    """The share that "N:M" prunes, whatever the budget; None for other patterns."""
    return 1 - self.keep / self.of if self.of else None

  @property
  def is_blocks(self) -> bool:
    """Whether units are blocks of a size of their own."""
    return "x" in self.name

  @property
  def has_outputs(self) -> bool:
    """Whether several units serve one output, so that it can be looked at by itself."""
    return self.is_blocks or self.name == "unstructured"

  def unit(self, in_dim: int, out_dim: int) -> tuple[int, int]:
    """Inputs and outputs of a unit in a matrix of this size.

    Raises:
      InputError: the pattern does not divide the matrix.
    """
    if self.of:
      config.require(
        in_dim % self.of == 0,
        f"pattern {self.name} needs inputs in whole groups of {self.of}, not {in_dim}",
      )
      return 1, 1
    rows, cols = self.block[0] or in_dim, self.block[1] or out_dim
    config.require(
      in_dim % rows == 0 and out_dim % cols == 0,
      f"blocks of {rows}x{cols} (inputs x outputs) do not divide a matrix of "
      f"{in_dim}x{out_dim}",
    )
    return rows, cols


@functools.cache
def parse(text: str) -> Pattern:
  """A pattern by its name.

  Raises:
    InputError: there is none of that name, or N is not below M.
  """
  if text in WHOLE:
    block = {"rows": (1, 0), "columns": (0, 1)}.get(text, (1, 1))
    return Pattern(text, block=block)
  if match := re.fullmatch(r"(\d+):(\d+)", text):
    keep, of = map(int, match.groups())
    config.require(
      0 < keep < of,
      f"pattern {text!r} keeps {keep} of {of}; N:M keeps N of M, with 0 < N < M",
    )
    return Pattern(text, keep, of)
  if match := re.fullmatch(r"(\d+)x(\d+)", text):
    rows, cols = map(int, match.groups())
    config.require(rows > 0 and cols > 0, f"a block of {text} has no weights")
    return Pattern(text, block=(rows, cols))
  raise errors.unknown("pattern", text, (*WHOLE, "2:4", "16x16"))


def unit_scores(scores: jax.Array, pattern: Pattern) -> jax.Array:
  """Scores `[*stack, I, O]` of weights to `[*stack, I / rows, O / cols]` of units."""
  *stack, in_dim, out_dim = scores.shape
  rows, cols = pattern.unit(in_dim, out_dim)
  if (rows, cols) == (1, 1):
    return scores
  split = scores.reshape(*stack, in_dim // rows, rows, out_dim // cols, cols)
  return jnp.mean(split, axis=(-3, -1))


def spread(mask: jax.Array, shape: Sequence[int]) -> jax.Array:
  """A mask of units to one of the weights of a matrix of `shape`."""
  rows, cols = shape[-2] // mask.shape[-2], shape[-1] // mask.shape[-1]
  return jnp.repeat(jnp.repeat(mask, rows, axis=-2), cols, axis=-1)


def keep_n_of_m(scores: jax.Array, pattern: Pattern) -> jax.Array:
  """The mask `[*stack, I, O]` of an "N:M" pattern: in each group the N largest stay.

  Of equal scores the earlier go.
  """
  *stack, in_dim, out_dim = scores.shape
  pattern.unit(in_dim, out_dim)
  groups = scores.reshape(*stack, in_dim // pattern.of, pattern.of, out_dim)
  # Twice sorted are ranks; a stable sort leaves equal ones in their order.
  order = jnp.argsort(groups, axis=-2, stable=True)
  rank = jnp.argsort(order, axis=-2, stable=True)
  return (rank >= pattern.of - pattern.keep).reshape(scores.shape)
