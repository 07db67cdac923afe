"""Rotary positions as Hugging Face writes them: theta, and how they are stretched.

Older configs have `rope_theta` and `rope_scaling`, newer ones `rope_parameters` with
both; the older form is written, which all versions read.
"""

from typing import Any

from effjax.core import errors
from effjax.interop.fields import Fields

# Ours to theirs, by kind.
_NAMES = {
  "linear": {},
  "yarn": {
    "beta_fast": "beta_fast",
    "beta_slow": "beta_slow",
    "truncate": "truncate",
    "attention_factor": "attention_factor",
    "mscale": "mscale",
    "mscale_all_dim": "mscale_all_dim",
    "original_max_len": "original_max_position_embeddings",
  },
  "llama3": {
    "low_freq_factor": "low_freq_factor",
    "high_freq_factor": "high_freq_factor",
    "original_max_len": "original_max_position_embeddings",
  },
}


def read(fields: Fields, theta: float = 10_000.0) -> dict[str, Any]:
  """Our options `rope_theta` and `rope_scaling`.

  Args:
    fields: of config.json.
    theta: used where the config has none.

  Raises:
    InputError: a kind of scaling that is not here.
  """
  given = fields.get("rope_parameters", dict, None) or fields.get(
    "rope_scaling", dict, {}
  )
  inner = Fields(given, f"{fields.where}: rope")
  theta = inner.get("rope_theta", float, fields.get("rope_theta", float, theta))
  inner.refuse(partial_rotary_factor=1.0)
  fields.refuse(partial_rotary_factor=1.0)
  kind = inner.get("rope_type", str, inner.get("type", str, "default"))
  found: dict[str, Any] = {"rope_theta": theta, "rope_scaling": None}
  if kind == "default":
    return found
  if kind not in _NAMES:
    raise errors.unknown(f"rope_type in {fields.where}", kind, ("default", *_NAMES))
  scaling = {"kind": kind, "factor": inner.get("factor", float)}
  for ours, theirs in _NAMES[kind].items():
    if given.get(theirs) is not None:
      scaling[ours] = given[theirs]
  if kind != "linear" and "original_max_len" not in scaling:
    scaling["original_max_len"] = fields.get("max_position_embeddings", int)
  # Without `mscale_all_dim` Hugging Face does not look at `mscale`.
  if not scaling.get("mscale_all_dim"):
    scaling.pop("mscale", None)
  found["rope_scaling"] = scaling
  return found


def write(options: dict[str, Any]) -> dict[str, Any]:
  """Their fields, from our options."""
  fields: dict[str, Any] = {"rope_theta": options["rope_theta"]}
  scaling = options["rope_scaling"]
  if scaling is None:
    return fields | {"rope_scaling": None}
  kind = scaling["kind"]
  written = {"rope_type": kind, "factor": scaling["factor"]}
  for ours, theirs in _NAMES.get(kind, {}).items():
    if scaling.get(ours) is not None:
      written[theirs] = scaling[ours]
  return fields | {"rope_scaling": written}
