"""Tiny random models as ONNX files, shared by the tests."""

import types

import pytest

from effjax.interop.onnx import export
from tests.interop.onnx import models


@pytest.fixture(scope="session")
def written(tmp_path_factory):
  """Writes a tiny random model, opens it, and computes our logits, once each."""
  made = {}

  def get(name):
    if name not in made:
      model, params, specs = models.build(name)
      path = tmp_path_factory.mktemp("onnx") / f"{name}.onnx"
      notes = export.save(path, model, params, specs)
      made[name] = types.SimpleNamespace(
        path=path,
        model=model,
        params=params,
        specs=specs,
        notes=notes,
        runtime=models.Runtime(path),
        logits=models.logits(model, params),
      )
    return made[name]

  return get
