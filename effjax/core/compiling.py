"""Compiling, where the defaults serve us badly."""

import functools
from collections.abc import Callable
from typing import Any

import jax

# Known to work on CPUs and NVIDIA GPUs; never tried on a TPU, which keeps its defaults.
_ONCE = {"xla_backend_optimization_level": 0}


def jit_once(fn: Callable[..., Any], **kwargs: Any) -> Callable[..., Any]:
  """`jax.jit` for programs that run once, whose compilation takes longest.

  Nothing is asked of a device before the first call.

  Args:
    fn: the function, of positional arguments.
    **kwargs: of `jax.jit`.
  """

  @functools.cache
  def jitted() -> Callable[..., Any]:
    options = None if jax.default_backend() == "tpu" else _ONCE
    return jax.jit(fn, compiler_options=options, **kwargs)

  @functools.wraps(fn)
  def call(*args: Any) -> Any:
    return jitted()(*args)

  return call
