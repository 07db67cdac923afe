"""Lottery tickets as a recipe: masks of later stages over weights of earlier ones."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.compress import api as compress
from effjax.compress import registry
from effjax.core import config as core_config
from effjax.core import errors
from effjax.core import specs as specs_lib
from effjax.core import tree as tree_lib
from effjax.models import config as model_config
from effjax.models import decoder
from effjax.recipe import api, rewinding, runner
from effjax.recipe import config as config_lib
from effjax.recipe import plan as plan_lib
from effjax.weights.leaves import masked
from tests.recipe import tiny


def _stages():
  """Two rounds of iterative pruning with rewinding."""
  training = {"num_steps": 2, "optimizer": {"learning_rate": 0.01}}
  for name, technique, after, options in (
    ("early", "train", None, training),
    ("full", "train", None, training),
    ("first", "magnitude", None, _gone(0.4)),
    ("ticket", "rewind", None, {"to": "early"}),
    ("trained", "train", None, training),
    ("second", "magnitude", None, _gone(0.64)),
    ("ticket-2", "rewind", None, {"to": "early"}),
    ("other", "rewind", "second", {"to": "init", "seed": 1}),
  ):
    yield {"name": name, "technique": technique, "after": after, "options": options}


def _gone(share):
  return {"sparsity": share, "again": True, "budget": "uniform"}


def test_tickets_have_early_weights_under_ever_smaller_masks(tmp_path):
  reference = tiny.write(tmp_path, list(_stages()))
  root = runner.run(reference, workdir=tmp_path / "run")
  flat = {
    stage: tree_lib.flatten(api.load(root, stage).params)
    for stage in ("early", "full", "first", "ticket", "second", "ticket-2", "other")
  }
  for name, early in flat["early"].items():
    once, twice = flat["ticket"][name], flat["ticket-2"][name]
    if not isinstance(once, masked.Masked):
      np.testing.assert_array_equal(once, early)
      continue
    for leaf, share in ((once, 0.4), (twice, 0.64)):
      assert int(jnp.sum(~leaf.mask())) == round(share * early.size)
      np.testing.assert_array_equal(leaf.dense(), jnp.where(leaf.mask(), early, 0))
    assert not np.any(twice.mask() & ~once.mask())
    # The smallest of what training made of them went.
    full = np.abs(flat["full"][name])
    assert full[np.asarray(once.mask())].min() >= full[~np.asarray(once.mask())].max()
    other = flat["other"][name]
    np.testing.assert_array_equal(other.mask(), twice.mask())
    assert np.any(np.asarray(other.values) != np.asarray(early))


def _model():
  config = model_config.DecoderConfig(
    vocab_size=8,
    embed_dim=8,
    num_layers=1,
    mixer_options={"attention": {"num_heads": 2, "num_kv_heads": 1, "head_dim": 4}},
  )
  model = decoder.Decoder(config)
  return model, model.init(jax.random.key(0), *model.example_inputs())["params"]


def test_mistakes_get_one_line():
  model, params = _model()
  specs = specs_lib.specs(model)
  change = lambda name, **options: compress.transform(
    registry.find(name), model, params, specs, options=options
  )[1]
  with pytest.raises(errors.InputError, match="nothing is pruned"):
    rewinding.rewound(params, params)
  pruned = change("magnitude", sparsity=0.5)
  with pytest.raises(errors.InputError, match="is a quantized leaf; rewind takes"):
    rewinding.rewound(pruned, change("rtn"))
  flat = tree_lib.flatten(params)
  flat["final_norm/scale"] = jnp.ones(3)
  with pytest.raises(errors.InputError, match="in the stage to rewind to"):
    rewinding.rewound(pruned, tree_lib.unflatten(flat))
  with pytest.raises(errors.InputError, match="or prune it further with again=True"):
    compress.transform(registry.find("magnitude"), model, pruned, specs)
  with pytest.raises(errors.InputError, match="cannot be packed in the same stage"):
    change("magnitude", pattern="2:4", packed=True, again=True)


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"to": "later"}, "to='later' is not an earlier stage; there are pruned, init"),
    ({"to": "pruned", "seed": 3}, "seed=3 is of to='init'"),
  ],
)
def test_mistakes_in_a_recipe_name_the_stage(options, message):
  stages = (
    {"name": "pruned", "technique": "magnitude"},
    {"name": "back", "technique": "rewind", "options": options},
  )
  config = {
    "data": {"corpus": "synthetic", "tokenizer": "bytes", "vocab_size": 257},
    "model": {"vocab_size": 257, "embed_dim": 32, "num_layers": 1},
    "stages": stages,
  }
  with pytest.raises(errors.InputError, match="stages") as caught:
    plan_lib.make(core_config.build(config_lib.Config, config))
  assert message in str(caught.value)
