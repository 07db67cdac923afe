"""What foreign files cannot say of how keys and values are kept."""

from typing import Any

from effjax.core import errors


def require_float(config: Any, what: str) -> None:
  """Refuses a model whose keys and values are rounded, in every mode of running it.

  Args:
    config: of the model.
    what: is to be written, for the message.

  Raises:
    InputError: a layer has a `kv_cache` that is not "float".
  """
  for k, layer in enumerate(config.layers):
    kept = layer.mixer_options.get("kv_cache", "float")
    if kept != "float":
      raise errors.InputError(
        f"{what} cannot say that layer {k} keeps keys and values as {kept} (kv_cache): "
        "the program that runs it has a cache of its own; export the stage before that"
      )
