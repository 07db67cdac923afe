"""Hugging Face transformers in a lane, on PyTorch, as it comes."""

import numpy as np
import torch
import transformers

# Imported when a model is loaded, but no part of one.
import transformers.models.llama.modeling_llama

from effjax.cli.peers import lane


class Transformers:
  """See lane.System."""

  def __init__(self, options: lane.Options, rows: int, length: int):
    """Loads a folder in the format it is to compute in."""
    del rows, length  # The cache grows.
    torch.set_num_threads(options.threads)
    dtype = getattr(torch, options.format)
    self._model = transformers.AutoModelForCausalLM.from_pretrained(
      options.model, dtype=dtype
    )
    self._cache = None
    self._logits_BLV = None
    self.about = (
      f"transformers {transformers.__version__}, torch {torch.__version__}, eager, "
      f"attention {self._model.config._attn_implementation}, keys and values in the "
      "row's format"
    )

  def prefill(self, tokens_BL: np.ndarray) -> None:
    self._cache = None
    self._read(tokens_BL)

  def step(self, token_B: np.ndarray) -> None:
    self._read(token_B[:, None])

  def logits(self) -> np.ndarray:
    return self._logits_BLV[:, -1].float().numpy()

  @torch.inference_mode()
  def _read(self, tokens_BL: np.ndarray) -> None:
    found = self._model(
      torch.from_numpy(tokens_BL).long(),
      past_key_values=self._cache,
      use_cache=True,
      logits_to_keep=1,
    )
    self._cache, self._logits_BLV = found.past_key_values, found.logits


if __name__ == "__main__":
  lane.serve(Transformers)
