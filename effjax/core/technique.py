"""The shapes a registered technique can have, as data the registry hands out."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from effjax.core import config, errors
from effjax.core import select as select_lib


@dataclasses.dataclass(frozen=True, kw_only=True)
class Transform:
  """A tree transform: parameters in, parameters of other leaf kinds or values out.

  Attributes:
    fn: `fn(params, specs, stats, paths, options) -> params`, pure; `paths` are the
      selected parameters, `stats` calibration statistics or None.
    options_cls: frozen dataclass of its options.
    default_where: what it applies to when the user does not say.
    collect: the calibration statistics that `stats` must hold, whatever the options;
      options may ask for more (see `collected`).
    equivalent: whether the outcome computes the same function.
    after: a transform that makes what this one works on, where a plain model has
      nothing for it; None where a plain model is enough.
    depends_on_values: whether only a run tells the shapes; of shapes `fn` then gives
      the largest.
  """

  fn: Callable[..., dict[str, Any]]
  options_cls: type
  default_where: select_lib.Where = select_lib.Where(kind=("matrix",))
  collect: tuple[str, ...] = ()
  equivalent: bool = False
  after: str | None = None
  depends_on_values: bool = False

  def collected(self, options: Any) -> tuple[str, ...]:
    """The calibration statistics that `stats` must hold; empty if it needs none.

    Args:
      options: an `options_cls`; what its attribute `collect` names is needed too.
    """
    return tuple(dict.fromkeys((*self.collect, *getattr(options, "collect", ()))))

  def options(self, values: Mapping[str, Any] | None, path: str = "options") -> Any:
    """Validated options; raises InputError with one line."""
    return config.build(self.options_cls, values or {}, path)

  def __call__(
    self,
    params: Mapping[str, Any],
    specs: Mapping[str, Any],
    stats: Mapping[str, Any] | None = None,
    *,
    where: Any = None,
    options: Any = None,
  ) -> dict[str, Any]:
    """Applies the transform.

    Args:
      params: parameter tree (not changed).
      specs: tree of ParamSpecs of the same structure.
      stats: calibration statistics, where the technique needs them.
      where: which parameters (see core.select); None for the technique's default.
      options: an `options_cls` or a mapping of its fields.

    Raises:
      InputError: bad options, an empty selection, or a shape that does not fit.
    """
    if not isinstance(options, self.options_cls):
      options = self.options(options)
    where = select_lib.parse(where, self.default_where)
    return self.fn(params, specs, stats, select_lib.select(specs, where), options)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelTransform:
  """A transform of a whole model, which may run it and may change its config.

  Attributes:
    fn: `fn(model, params, specs, batches, paths, options) -> (model, params)`, pure;
      `batches` are dicts of arrays as calibration takes them, and `paths` the selected
      parameters.
    options_cls: frozen dataclass of its options.
    default_where: what it applies to when the user does not say.
    needs_batches: whether it runs the model on text whatever its options, which may
      ask for it too (see `runs_on_text`); else `batches` is empty.
    equivalent: whether the outcome computes the same function.
    outcome: `outcome(model, params, specs, paths, options) -> (model, params)` on
      ShapeDtypeStructs, which also finds mistakes before anything runs; None where
      model and shapes stay what they are.
    depends_on_values: whether only a run tells the shapes, of which `outcome` then
      gives the largest.
  """

  fn: Callable[..., tuple[Any, dict[str, Any]]]
  options_cls: type
  default_where: select_lib.Where = select_lib.Where(kind=("matrix",))
  needs_batches: bool = False
  equivalent: bool = False
  outcome: Callable[..., tuple[Any, dict[str, Any]]] | None = None
  depends_on_values: bool = False

  def options(self, values: Mapping[str, Any] | None, path: str = "options") -> Any:
    """Validated options; raises InputError with one line."""
    return config.build(self.options_cls, values or {}, path)

  def __call__(
    self,
    model: Any,
    params: Mapping[str, Any],
    specs: Mapping[str, Any],
    batches: Sequence[Mapping[str, Any]] = (),
    *,
    where: Any = None,
    options: Any = None,
  ) -> tuple[Any, dict[str, Any]]:
    """Applies the transform.

    Args:
      model: the model, made of layers (core.layers).
      params: its parameters (not changed).
      specs: tree of ParamSpecs of the same structure.
      batches: all of one shape; where they are needed.
      where: which parameters (see core.select); None for the technique's default.
      options: an `options_cls` or a mapping of its fields.

    Returns:
      The model and its new parameters.

    Raises:
      InputError: bad options, an empty selection, or something that does not fit.
    """
    options, paths = self._parse(specs, where, options)
    if self.runs_on_text(options) and not batches:
      raise errors.InputError(
        f"{self.options_cls.__name__.removesuffix('Options').lower()} runs the model "
        "on text: pass batches"
      )
    return self.fn(model, params, specs, tuple(batches), paths, options)

  def runs_on_text(self, options: Any) -> bool:
    """Whether it needs batches, always or because its options say `needs_batches`."""
    return self.needs_batches or bool(getattr(options, "needs_batches", False))

  def shapes(
    self,
    model: Any,
    params: Mapping[str, Any],
    specs: Mapping[str, Any],
    *,
    where: Any = None,
    options: Any = None,
  ) -> tuple[Any, dict[str, Any]]:
    """What `__call__` would return, of ShapeDtypeStructs; nothing is computed."""
    options, paths = self._parse(specs, where, options)
    if self.outcome is None:
      return model, dict(params)
    return self.outcome(model, params, specs, paths, options)

  def _parse(
    self, specs: Mapping[str, Any], where: Any, options: Any
  ) -> tuple[Any, frozenset[str]]:
    if not isinstance(options, self.options_cls):
      options = self.options(options)
    where = select_lib.parse(where, self.default_where)
    return options, select_lib.select(specs, where)
