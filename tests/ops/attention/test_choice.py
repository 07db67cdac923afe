"""Which implementation is taken where, and what each refuses."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import pytest

from effjax.core import errors
from effjax.ops import flops
from effjax.ops.attention import alibi, api, blockwise, choice, patterns


def _problem(platform, length=4096, **changes):
  heads, groups, head_dim = 8, 2, 128
  defaults = choice.Problem(
    platform=platform,
    q_shape=(2, length, heads, head_dim),
    k_shape=(2, length, groups, head_dim),
    v_shape=(2, length, groups, head_dim),
    dtype=jnp.bfloat16,
  )
  return dataclasses.replace(defaults, **changes)


def test_kernels_where_they_are_exact():
  assert api.choose(_problem("tpu")).name == "splash"
  assert api.choose(_problem("tpu", segments=True, logit_cap=True)).name == "splash"
  both_sides = patterns.Window(64, causal=False)
  assert api.choose(_problem("tpu", pattern=both_sides)).name == "splash"
  assert api.choose(_problem("cuda")).name == "cudnn"
  assert api.choose(_problem("cuda", pattern=patterns.Window(64))).name == "cudnn"
  packed = api.choose(_problem("cuda", segments=True))
  assert packed.name == "cudnn" and "packed rows take blockwise" in packed.reason


SHAPE = (2, 4096, 2, 128)


@pytest.mark.parametrize(
  ("platform", "changes", "reason"),
  [
    ("tpu", {"pattern": patterns.Longformer(64)}, "no Longformer pattern"),
    ("tpu", {"slopes": True}, "no linear biases"),
    ("tpu", {"positions": True}, "no explicit positions"),
    ("tpu", {"dtype": jnp.float16}, "not float16"),
    ("tpu", {"k_shape": (2, 512, 2, 128)}, "as many queries as keys, got 4096 and 512"),
    ("cuda", {"pattern": patterns.BigBird()}, "no BigBird pattern"),
    ("cuda", {"pattern": patterns.Window(64, causal=False)}, "look back only"),
    ("cuda", {"slopes": True}, "linear biases"),
    ("cuda", {"logit_cap": True}, "cannot cap"),
    ("cuda", {"positions": True}, "no explicit positions"),
    ("cuda", {"dtype": jnp.float32}, "not float32"),
    ("cuda", {"capability": (7, 5)}, "capability 8.0, this is 7.5"),
    ("cuda", {"v_shape": (*SHAPE[:3], 64)}, "size of key heads, got 64, 128"),
    ("cuda", {"q_shape": (2, 4096, 8, 192)}, "at most 128 in steps of 8, got 192"),
    ("cuda", {"q_shape": (2, 4096, 8, 84)}, "at most 128 in steps of 8, got 84"),
  ],
)
def test_what_a_kernel_cannot_do_goes_to_plain_xla(platform, changes, reason):
  problem = _problem(platform, **changes)
  found = api.choose(problem)
  assert found.name in ("xla", "blockwise") and reason in found.reason
  kernel = {"tpu": "splash", "cuda": "cudnn"}[platform]
  with pytest.raises(errors.InputError, match=f"implementation='{kernel}': it"):
    api.explain(kernel, problem)


def test_larger_heads_on_newer_devices():
  shapes = {f"{x}_shape": (2, 4096, 8, 256) for x in "qkv"}
  problem = _problem("cuda", capability=(9, 0), **shapes)
  assert api.choose(problem).name == "cudnn"


def test_plain_xla_by_length_and_by_what_is_skipped():
  short = api.choose(_problem("cpu", length=256))
  assert short.name == "xla" and "short" in short.reason
  long = api.choose(_problem("cpu", length=8192))
  assert long.name == "blockwise" and "long" in long.reason
  sparse = _problem("cpu", length=choice.SHORT * 2, pattern=patterns.Longformer(64))
  window = api.choose(sparse)
  assert window.name == "blockwise" and window.reason.endswith("% of all pairs")
  packed = dataclasses.replace(sparse, segments=True)
  assert "every row of a batch is one document" in api.choose(packed).reason
  assert api.choose(_problem("rocm", length=8192)).name == "blockwise"


def test_blocks_are_small_where_little_is_seen():
  size = functools.partial(blockwise.block_size, q_len=4096, kv_len=4096)
  sparse = size(pattern=patterns.BigBird(64, causal=True), platform="cpu")
  assert sparse < size(pattern=patterns.Window(512), platform="cpu")
  assert size(pattern=patterns.CAUSAL, platform="cpu") == 512
  assert size(pattern=patterns.CAUSAL, platform="cuda") == 512
  assert blockwise.block_size(patterns.CAUSAL, 5, 40, "cpu") == 40


def test_a_name_is_taken_or_refused():
  problem = _problem("cpu")
  for name in ("xla", "blockwise", "reference"):
    assert api.explain(name, problem) == (name, "it is asked for")
  for name, needs in (("splash", "a TPU"), ("cudnn", "a CUDA device")):
    with pytest.raises(errors.InputError, match=f"{name}.*needs {needs}, this is cpu"):
      api.explain(name, problem)
  with pytest.raises(errors.InputError, match="did you mean 'blockwise'"):
    api.explain("blokwise", problem)
  with pytest.raises(errors.InputError, match="unknown platform 'gpu'"):
    _problem("gpu")


def test_attention_refuses_a_kernel_that_is_not_here():
  x = jax.ShapeDtypeStruct((1, 8, 1, 8), jnp.float32)
  with pytest.raises(errors.InputError, match="needs a TPU, this is cpu"):
    jax.eval_shape(lambda x: api.attention(x, x, x, implementation="splash"), x)


def test_the_choice_of_a_call_is_that_of_its_facts(monkeypatch):
  """Every fact of a call reaches the choice."""
  seen = []
  monkeypatch.setattr(
    choice, "choose", lambda p: seen.append(p) or choice.Choice("xla", "")
  )
  q, kv = jnp.zeros((1, 8, 4, 8)), jnp.zeros((1, 8, 2, 8))
  ones = jnp.ones((1, 8), jnp.int32)
  call = lambda **options: jax.eval_shape(lambda: api.attention(q, kv, kv, **options))
  call()
  call(q_segments_BL=ones)
  call(q_positions_BL=ones)
  call(slopes_H=alibi.slopes(4), logit_cap=2.0, pattern=patterns.Window(3))
  plain, segments, positions, extras = seen
  assert plain == choice.Problem(
    platform="cpu",
    q_shape=(1, 8, 4, 8),
    k_shape=(1, 8, 2, 8),
    v_shape=(1, 8, 2, 8),
    dtype=jnp.dtype("float32"),
  )
  assert segments == dataclasses.replace(plain, segments=True)
  assert positions == dataclasses.replace(plain, positions=True)
  assert extras == dataclasses.replace(
    plain, slopes=True, logit_cap=True, pattern=patterns.Window(3)
  )


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_flops_of_a_kernel_are_those_of_blockwise(platform, monkeypatch):
  monkeypatch.setattr(api, "device_facts", lambda: {"platform": platform})
  x = jax.ShapeDtypeStruct((1, 300, 2, 8), jnp.bfloat16)
  ones = jnp.ones((1, 300), jnp.int32)
  call = functools.partial(api.attention, q_segments_BL=ones)
  block = blockwise.block_size(patterns.CAUSAL, 300, 300, "cpu")
  pairs = blockwise.computed_pairs(300, 300, patterns.CAUSAL, block)
  assert flops.dot_flops(call, x, x, x) == 4 * pairs * 2 * 8


def test_slopes_are_those_of_the_paper():
  eight = [2.0**-i for i in range(1, 9)]
  assert alibi.slopes(8).tolist() == eight
  # Not a power of two: the authors' code takes every second one of the next.
  twelve = eight + [2.0 ** (-0.5 * i) for i in (1, 3, 5, 7)]
  assert jnp.allclose(alibi.slopes(12), jnp.asarray(twelve), atol=1e-7)
  assert alibi.slopes(1).tolist() == [2.0**-8]
