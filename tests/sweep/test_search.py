"""Searches: points inside their ranges, the same every time, better than chance."""

import json

import optuna
import pytest

from effjax.core import errors
from effjax.sweep import points, search, store, worker


def _found(root) -> list[dict[str, str]]:
  content = json.loads((root / "sweep.json").read_text())
  return [trial["point"] for trial in content["trials"]]


def _searched(recipe, num_trials, **options):
  return points.searched(
    recipe(),
    sampler=options.pop("sampler", "tpe"),
    num_trials=num_trials,
    ranges=["model.num_layers=1:3", "model.norm_eps=1e-6:1e-3:log"],
    grids=["arg=a,wide"],
    **options,
  )


def test_a_search_stopped_and_resumed_finds_the_same_points(recipe, fake_run, tmp_path):
  command = fake_run()
  whole, parted = tmp_path / "whole", tmp_path / "parted"
  worker.work(_searched(recipe, 5), whole, command=command)
  worker.work(_searched(recipe, 2), parted, command=command)
  worker.work(_searched(recipe, 5), parted, command=command)
  assert _found(whole) == _found(parted)
  assert len(_found(whole)) == len({json.dumps(p) for p in _found(whole)}) == 5
  for point in _found(whole):
    assert point["arg"] in ("a", "wide")
    assert int(point["model.num_layers"]) in (1, 2, 3)
    assert 1e-6 <= float(point["model.norm_eps"]) <= 1e-3


def test_workers_choose_different_points(tmp_path):
  plan = search.Search(
    sampler="random",
    num_trials=6,
    ranges=(search.Range(field="x", low=0.0, high=1.0),),
    choices={},
  )
  one, two = (store.Store(tmp_path / "sweep") for _ in range(2))
  for own in (one, two):
    own.join({"config": "x"}, search=plan)
  claimed = [own.claim() for own in (one, two, one, two, one, two)]
  assert [trial.number for trial in claimed] == list(range(6))
  assert len({trial.point["x"] for trial in claimed}) == 6
  assert one.claim() is None
  assert (len(one.state().open), one.state().num_missing) == (6, 0)


def test_tpe_comes_closer_to_the_lowest_loss_than_chance():
  plan = lambda sampler: search.Search(
    sampler=sampler,
    num_trials=40,
    ranges=(search.Range(field="x", low=1e-4, high=1.0, log=True),),
    choices={"y": ("3", "1", "2")},
  )

  def losses(sampler: str) -> list[float]:
    study, found = optuna.create_study(), []
    for number in range(40):
      trial, point = plan(sampler).ask(study, number)
      found.append(abs(float(point["x"]) - 0.01) / 0.01 + float(point["y"]))
      study.tell(trial, found[-1])
    return found

  late = {sampler: sorted(losses(sampler)[20:])[10] for sampler in search.SAMPLERS}
  assert late["tpe"] < 0.7 * late["random"]


@pytest.mark.parametrize(
  ("text", "expected"),
  [
    ("config.a.b=1:8", search.Range(field="a.b", low=1, high=8)),
    ("a=1e-4:0.1:log", search.Range(field="a", low=1e-4, high=0.1, log=True)),
    ("a=-1:1.5", search.Range(field="a", low=-1, high=1.5)),
  ],
)
def test_ranges_are_read(text, expected):
  assert search.parse_range(text) == expected


@pytest.mark.parametrize(
  ("text", "message"),
  [
    ("a=1", "must be FIELD=LOW:HIGH"),
    ("a=1:2:ln", "must be FIELD=LOW:HIGH"),
    ("a=one:2", "must be FIELD=LOW:HIGH"),
    ("a=1:nan", "must be FIELD=LOW:HIGH"),
    ("a=2:1", "low end must be below"),
    ("a=0:1:log", "above 0 for a logarithm"),
  ],
)
def test_what_is_no_range_is_named(text, message):
  with pytest.raises(errors.InputError, match=message):
    search.parse_range(text)


def test_a_search_needs_a_sampler_trials_and_fields(recipe):
  with pytest.raises(errors.InputError, match="did you mean 'tpe'"):
    _searched(recipe, 2, sampler="tpee")
  with pytest.raises(errors.InputError, match="at least 1, got 0"):
    _searched(recipe, 0)
  with pytest.raises(errors.InputError, match="nothing to search"):
    points.searched(recipe(), sampler="tpe", num_trials=2)
  with pytest.raises(errors.InputError, match="swept twice"):
    points.searched(
      recipe(), sampler="tpe", num_trials=2, ranges=["a=1:2"], grids=["a=1"]
    )


def test_an_end_without_a_config_is_named(recipe, tmp_path):
  sweep = points.searched(
    recipe(), sampler="tpe", num_trials=2, ranges=["model.num_layers=0:2"]
  )
  with pytest.raises(errors.InputError, match="at model.num_layers=0"):
    worker.work(sweep, tmp_path / "sweep")
