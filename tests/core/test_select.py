"""`where` selects by kind and path, and says so when nothing is left."""

import pytest

from effjax.core import errors, select, specs

SPECS = {
  "embed": {"table": specs.ParamSpec(axes=("vocab", "embed"), kind="embedding")},
  "run_0": {
    "q": specs.ParamSpec(axes=("embed", "heads"), kind="matrix"),
    "o": specs.ParamSpec(axes=("heads", "embed"), kind="matrix"),
    "scale": specs.ParamSpec(axes=("embed",), kind="norm"),
  },
}


def _select(where):
  default = select.Where(kind=("matrix",))
  return select.select(SPECS, select.parse(where, default))


def test_kind_path_and_default():
  assert _select(None) == {"run_0/q", "run_0/o"}
  assert _select({"kind": "embedding"}) == {"embed/table"}
  assert _select({"path": "run_0"}) == {"run_0/q", "run_0/o", "run_0/scale"}
  assert _select({"kind": ["matrix"], "not_path": "/q$"}) == {"run_0/o"}


@pytest.mark.parametrize(
  ("where", "message"),
  [
    ({"path": "nothing"}, "selects no parameter"),
    ({"kind": "matrx"}, "did you mean 'matrix'"),
    ({"pth": "x"}, "did you mean 'path'"),
    ({"path": "("}, "not a regular expression"),
  ],
)
def test_mistakes(where, message):
  with pytest.raises(errors.InputError, match=message):
    _select(where)
