"""The entry to attention: one name a use, the form picked here.

| form        | what it is                                                    |
|-------------|---------------------------------------------------------------|
| "xla"       | matrix products over blocks of queries; every platform        |
| "reference" | the naive definition, float32, slow: for tests and debugging  |

The default is "xla" on every platform. Over a cache there is one form, `decode`.
"""

import jax

from effjax.core import errors
from effjax.ops.attention import decode, reference, xla

FORMS = {"xla": xla.attention, "reference": reference.attention}

cached_attention = decode.cached_attention
decode_attention = decode.decode_attention


def attention(
  q_BLHK: jax.Array,
  k_BSGK: jax.Array,
  v_BSGK: jax.Array,
  *,
  form: str = "xla",
  causal: bool = True,
  q_positions_BL: jax.Array | None = None,
  kv_positions_BS: jax.Array | None = None,
  q_segments_BL: jax.Array | None = None,
  kv_segments_BS: jax.Array | None = None,
  window: int | None = None,
  scale: float | None = None,
) -> jax.Array:
  """Softmax attention in the named form; see `xla.attention` for the arguments.

  Raises:
    InputError: an unknown form, or what the form itself refuses.
  """
  if form not in FORMS:
    raise errors.unknown("attention form", form, FORMS)
  return FORMS[form](
    q_BLHK,
    k_BSGK,
    v_BSGK,
    causal=causal,
    q_positions_BL=q_positions_BL,
    kv_positions_BS=kv_positions_BS,
    q_segments_BL=q_segments_BL,
    kv_segments_BS=kv_segments_BS,
    window=window,
    scale=scale,
  )
