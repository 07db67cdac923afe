"""The shapes a registered technique can have, as data the registry hands out."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from effjax.core import config
from effjax.core import select as select_lib


@dataclasses.dataclass(frozen=True, kw_only=True)
class Transform:
  """A tree transform: parameters in, parameters of other leaf kinds or values out.

  Attributes:
    fn: `fn(params, specs, stats, paths, options) -> params`, pure; `paths` are the
      selected parameters, `stats` calibration statistics or None.
    options_cls: frozen dataclass of its options.
    default_where: what it applies to when the user does not say.
    collect: the calibration statistics that `stats` must hold; empty if it needs none.
  """

  fn: Callable[..., dict[str, Any]]
  options_cls: type
  default_where: select_lib.Where = select_lib.Where(kind=("matrix",))
  collect: tuple[str, ...] = ()

  @property
  def needs_stats(self) -> bool:
    """Whether `stats` must be given."""
    return bool(self.collect)

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
