"""effjax: what does making a model cheaper cost you?

The Python interface, for notebooks and scripts:

  import effjax
  run = effjax.load("runs/quickstart-smoke", stage="train")
  int4 = effjax.transform("rtn", run.params, run.specs, options={"bits": 4})
  effjax.evaluate(run, int4)["bits_per_byte"]
  effjax.measure(run, int4)["bytes_held"]
  effjax.generate(run, "def main(", params=int4)

Names are imported when first used, so that `import effjax` is instant.
"""

import importlib
import sys
import types
from typing import Any

# Name to the module that defines it.
_NAMES = {
  "Run": "effjax.recipe.api",
  "load": "effjax.recipe.api",
  "specs": "effjax.core.specs",
  "specs_from_linen": "effjax.interop.linen",
  "simulate": "effjax.interop.linen",
  "sizes": "effjax.recipe.api",
  "calibrate": "effjax.compress.calibrate",
  "transform": "effjax.recipe.api",
  "transform_model": "effjax.recipe.api",
  "evaluate": "effjax.recipe.api",
  "measure": "effjax.recipe.api",
  "generate": "effjax.recipe.api",
  "embed": "effjax.recipe.api",
}
__all__ = list(_NAMES)


class _Package(types.ModuleType):
  """This package, in which `measure` is both a subpackage and a function."""

  def __setattr__(self, name: str, value: Any) -> None:
    # The import system binds a subpackage here the moment it is first imported.
    if name == "measure" and isinstance(value, types.ModuleType):
      value.__class__ = _CallableModule
    super().__setattr__(name, value)


class _CallableModule(types.ModuleType):
  """`effjax.measure(run)` calls the function; `effjax.measure.<module>` stays."""

  def __call__(self, *args: Any, **kwargs: Any) -> Any:
    return importlib.import_module(_NAMES["measure"]).measure(*args, **kwargs)


def __getattr__(name: str) -> Any:
  if name == "measure":
    return importlib.import_module("effjax.measure")
  if name in _NAMES:
    return getattr(importlib.import_module(_NAMES[name]), name)
  raise AttributeError(f"module 'effjax' has no attribute {name!r}")


def __dir__() -> list[str]:
  return sorted({*globals(), *__all__})


sys.modules[__name__].__class__ = _Package
