"""The entry to linear attention: the form is picked here.

| use           | form            | what it is                                        |
|---------------|-----------------|---------------------------------------------------|
| causal        | `causal`        | the chunked recurrence, or its step for one token |
| bidirectional | `bidirectional` | chunks, and a state from either side              |

The same on every platform. Feature maps are in `feature_maps`, retention in `causal`.
"""

import jax

from effjax.core.config import require
from effjax.ops.linear_attention import bidirectional, causal

retention = causal.retention


def linear_attention(
  q_BLHN: jax.Array,
  k_BLHN: jax.Array,
  v_BLHP: jax.Array,
  *,
  is_causal: bool = True,
  rotated: tuple[jax.Array, jax.Array] | None = None,
  segments_BL: jax.Array | None = None,
  initial_state_BHPN: jax.Array | None = None,
  chunk: int = 64,
  eps: float = 1e-10,
) -> tuple[jax.Array, jax.Array | None]:
  """y_l = sum_s (q_l . k_s) v_s / (sum_s q_l . k_s + eps) in time linear in L.

  Katharopoulos et al. 2020, arXiv:2006.16236, eq. 5 and 9 to 12.

  Args:
    q_BLHN, k_BLHN: features of queries and keys, not negative; float32 or bfloat16.
    v_BLHP: values; products take their dtype and accumulate in float32.
    is_causal: the sums go over s <= l, else over all tokens of l's document.
    rotated: queries and keys for the numerator, in place of the features (Su et al.
      2021, arXiv:2104.09864, eq. 19); the normalizer then takes a pass of its own.
    segments_BL: integer segment ids; documents do not meet, 0 is padding, whose outputs
      mean nothing (but are finite).
    initial_state_BHPN: float32 state `[B, H, P + 1, N]` before the first token: the sum
      of v k^T and, in the last row, of k; zeros by default. Causal only.
    chunk: tokens processed by matrix products at a time; does not change results.
    eps: added to the normalizer.

  Returns:
    y_BLHP in the dtype of v and, if causal, the state after the last token.

  Raises:
    InputError: a state without `is_causal`, shapes that do not fit, a chunk below 1.
  """
  if is_causal:
    return causal.linear_attention(
      q_BLHN,
      k_BLHN,
      v_BLHP,
      rotated=rotated,
      segments_BL=segments_BL,
      initial_state_BHPN=initial_state_BHPN,
      chunk=chunk,
      eps=eps,
    )
  require(
    initial_state_BHPN is None, "bidirectional linear attention continues no state"
  )
  y_BLHP = bidirectional.linear_attention(
    q_BLHN,
    k_BLHN,
    v_BLHP,
    rotated=rotated,
    segments_BL=segments_BL,
    chunk=chunk,
    eps=eps,
  )
  return y_BLHP, None
