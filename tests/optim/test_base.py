import jax.numpy as jnp
import optax

from effjax.optim import base


def test_decay_mask_goes_by_kind(toy):
  mask = base.decay_mask(toy.specs)
  layer = mask["run_0"]["layer_0"]
  decayed = {name for name, decays in layer.items() if decays}
  assert decayed == {"conv", "o", "q"}
  assert mask["embed"]["table"]
  assert not base.decay_mask(toy.specs, decay_embedding=False)["embed"]["table"]


def test_holes_stay_and_a_leaf_of_several_arrays_shares_its_spec(toy):
  specs = {
    name: toy.make_spec("matrix", ("a", "b"), (2, 2)) for name in ("p", "q", "r", "s")
  }
  tree = {
    "p": None,
    "q": optax.MaskedNode(),
    "r": (jnp.ones((2, 1)), None),
    "s": jnp.ones((2, 2)),
  }
  rest = {"p": None, "q": optax.MaskedNode(), "r": (None, None), "s": jnp.ones(())}
  seen = []

  def fn(spec, array, other):
    seen.append((spec.kind, array.shape, other is None))
    return array.size

  mapped = base.map_with_specs(fn, specs, tree, rest)
  assert mapped == {"p": None, "q": optax.MaskedNode(), "r": (2, None), "s": 4}
  assert seen == [("matrix", (2, 1), True), ("matrix", (2, 2), False)]


def test_blocks_are_single_matrices_even_of_experts(toy):
  experts = toy.make_spec("matrix", ("experts", "embed", "mlp"), (4, 5, 6, 7))
  norm = toy.make_spec("norm", ("embed",), (4, 6))
  assert base.block_axes(experts, 4) == (2, 3)
  assert base.block_axes(norm, 2) == (1,)
