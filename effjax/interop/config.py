"""What the stage "import" is told."""

import dataclasses

from effjax.core import errors

# "keep" is what the files hold; training and most transforms want float32.
DTYPES = ("float32", "bfloat16", "float16", "keep")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImportOptions:
  """Where a model comes from.

  Attributes:
    source: a packaged model by name (`effjax list pretrained`), else the path of a
      Hugging Face folder or a GGUF file.
    dtype: of the parameters, one of DTYPES. What a GGUF file holds is decoded to
      float32 first, and "keep" is that.
    keep_quantized: hold the quantized tensors of a GGUF file as quantized leaves of the
      same bits; the rest has `dtype`.
    manual_dir: folder with a packaged model's package; nothing is fetched then.
  """

  source: str
  dtype: str = "float32"
  keep_quantized: bool = False
  manual_dir: str | None = None

  def __post_init__(self):
    if self.dtype not in DTYPES:
      raise errors.unknown("dtype of an import", self.dtype, DTYPES)

  @property
  def kept_dtype(self) -> str | None:
    """The dtype, or None to keep that of the files."""
    return None if self.dtype == "keep" else self.dtype
