"""MaxText's published configs for TPUs: sizes, sharding, and the rate they reached.

From `MaxText/configs/v5e/*.sh`, `v5p/*.sh` and the README of each folder (repository
AI-Hypercomputer/maxtext; a slice's name there counts cores, v5p-128 has 64 chips).
`global_parameter_scale` doubles heads and MLP, then the width, then the layers, from a
width of 2048, 16 heads of 128, an MLP of 7168 and 16 layers; vocabulary 32,000, no tied
embeddings, 2048 tokens, AdamW, float32 parameters, bfloat16 computation. Not here: the
128B on v5e, whose activations are kept on the host.
"""

import dataclasses

from effjax.core import precision
from effjax.models import config as model_config
from effjax.models import decoder
from effjax.optim import config as optim_config
from effjax.parallel import mesh as mesh_lib
from effjax.train import config as train_config

HEAD_DIM = 128
VOCAB_SIZE = 32_000
LENGTH = 2048


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
  """One published run.

  Attributes:
    name: parameters and chips.
    topology: the slice.
    width, num_heads, hidden_dim, num_layers: of the model.
    batch: sequences a chip, as published.
    planned_batch: sequences a chip that are compiled for here, where the published ones
      do not fit; time is compared per token.
    remat: "full", or "dots" for MaxText's "minimal".
    tensor: chips along the tensor axis; the others shard everything.
    tflops: a second and chip, by MaxText's count (see `flops`).
  """

  name: str
  topology: str
  width: int
  num_heads: int
  hidden_dim: int
  num_layers: int
  batch: int
  planned_batch: int | None = None
  remat: str
  tensor: int = 1
  tflops: int

  @property
  def rows(self) -> int:
    """Sequences a chip that are compiled for."""
    return self.planned_batch or self.batch

  @property
  def secs(self) -> float:
    """Of a step of `rows` sequences a chip at the published rate."""
    return self.flops / (self.tflops * 1e12)

  @property
  def flops(self) -> float:
    """Of a step on a chip as MaxText counted: attention as if nothing was masked."""
    heads = self.num_heads * HEAD_DIM
    layer = 4 * self.width * heads + 3 * self.width * self.hidden_dim
    matrices = self.num_layers * layer + VOCAB_SIZE * self.width
    attention = 12 * heads * LENGTH * self.num_layers
    return (6 * matrices + attention) * self.rows * LENGTH

  def model(self) -> decoder.Decoder:
    """The model."""
    heads = {"num_heads": self.num_heads, "num_kv_heads": self.num_heads}
    return decoder.Decoder(
      model_config.DecoderConfig(
        vocab_size=VOCAB_SIZE,
        embed_dim=self.width,
        num_layers=self.num_layers,
        max_len=LENGTH,
        remat=self.remat,
        tie_embeddings=False,
        mixer_options={"attention": {**heads, "head_dim": HEAD_DIM}},
        mlp_options={"swiglu": {"hidden_dim": self.hidden_dim}},
      )
    )

  def training(self) -> train_config.TrainConfig:
    """How it is trained."""
    return train_config.TrainConfig(
      num_steps=10,
      optimizer=optim_config.OptimizerConfig(name="adamw", learning_rate=1e-3),
      precision=precision.PrecisionConfig(compute="bfloat16"),
    )

  def mesh(self) -> mesh_lib.MeshConfig:
    """How it is spread: MaxText splits the stream between layers over "tensor", too."""
    if self.tensor == 1:
      return mesh_lib.MeshConfig(preset="fsdp")
    return mesh_lib.MeshConfig(preset="fsdp+tps", shape={"tensor": self.tensor})


_16B = {"width": 4096, "num_heads": 64, "hidden_dim": 28_672, "num_layers": 32}
_32B = {**_16B, "width": 8192}
_64B = {**_32B, "num_layers": 64}
_128B = {**_64B, "num_heads": 128, "hidden_dim": 57_344}
_V5E = {"topology": "v5e:16x16", "remat": "full"}
_V5P = {"topology": "v5p:4x4x4", "remat": "dots", "tensor": 4}
RUNS = (
  Run(name="16B on v5e-256", **_16B, **_V5E, batch=6, tflops=120),
  Run(name="32B on v5e-256", **_32B, **_V5E, batch=4, tflops=132),
  Run(name="64B on v5e-256", **_64B, **_V5E, batch=2, tflops=118),
  Run(name="32B on v5p-128", **_32B, **_V5P, batch=7, planned_batch=6, tflops=328),
  Run(name="64B on v5p-128", **_64B, **_V5P, batch=3, tflops=323),
  Run(
    name="128B on v5p-256",
    **_128B,
    topology="v5p:4x4x8",
    remat="dots",
    tensor=8,
    batch=1,
    tflops=315,
  ),
)
