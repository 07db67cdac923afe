"""Programs that run once."""

import jax
import jax.numpy as jnp
import pytest

from effjax.core import compiling


def test_computes_what_the_function_computes():
  double = compiling.jit_once(lambda x, y: 2 * x + y)
  assert float(double(jnp.float32(3), jnp.float32(1))) == 7


def test_nothing_is_compiled_or_asked_before_the_first_call(monkeypatch):
  asked = []
  monkeypatch.setattr(jax, "default_backend", lambda: asked.append("backend") or "cpu")
  monkeypatch.setattr(jax, "jit", lambda fn, **_: asked.append("jit") or fn)
  double = compiling.jit_once(lambda x: 2 * x)
  assert asked == []
  assert double(3) == double(4) - 2 == 6
  assert asked == ["backend", "jit"]


@pytest.mark.parametrize(("platform", "plain"), [("cpu", False), ("tpu", True)])
def test_only_compilers_that_know_the_option_get_it(monkeypatch, platform, plain):
  given = {}

  def jit(fn, **kwargs):
    given.update(kwargs)
    return fn

  monkeypatch.setattr(jax, "default_backend", lambda: platform)
  monkeypatch.setattr(jax, "jit", jit)
  compiling.jit_once(lambda x: x, donate_argnums=0)(1)
  assert given["donate_argnums"] == 0
  assert (given["compiler_options"] is None) == plain
