import pytest

from effjax.cli import planning
from effjax.cli import pod_search as cli
from effjax.core import errors
from effjax.recipe import config as config_lib
from effjax.recipe import pod_search

CONFIG = "configs/lm_7b.py"
BATCH = "data.batch_size=64"


def test_the_best_are_compiled_and_compared(monkeypatch):
  pytest.importorskip("libtpu")
  found = pod_search.search(config_lib.load(CONFIG, [BATCH]), "v5e:4x4")
  asked = []

  def run(request):
    asked.append(request)
    if len(asked) == 1:
      raise errors.EffjaxError("the process that compiles ended with code 6")
    estimate = found[len(asked) - 1].estimate
    # The later, the faster; the third does not fit.
    return {
      "train": {
        "fits": len(asked) != 3,
        "step_secs": 10.0 - len(asked),
        "hbm_bytes": 2 * estimate.hbm_bytes,
      }
    }

  monkeypatch.setattr(planning, "run", run)
  request = planning.Request(
    config=CONFIG, overrides=(BATCH,), topology="v5e:4x4", decode=(1, 2)
  )
  checked = cli.compile_best(request, found, count=4)
  assert [one.candidate for one in checked] == [found[i] for i in (3, 1, 2, 0)]
  assert [one.overrides for one in asked] == [(BATCH, *c.overrides) for c in found[:4]]
  assert all(one.decode is None for one in asked)
  assert checked[0].hbm_error == pytest.approx(-0.5)
  secs = found[3].estimate.step_secs
  assert checked[0].secs_error == pytest.approx(secs / 6 - 1)
  assert checked[3].problem.endswith("code 6")
  assert checked[3].secs_error is None is checked[3].hbm_error
