"""What a model is fed: the corpus, its tokenizer, and the shape of the batches."""

import dataclasses
from typing import Any

from effjax.core import config, errors, registry

BUILDERS = "effjax.data.builders"
TOKENIZERS = ("bpe", "bytes", "ids", "model")

# One id for each byte and one that starts a document.
MIN_VOCAB_SIZE = 257


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
  """A corpus and how it becomes batches of tokens.

  Attributes:
    corpus: registry key of a file in `effjax/data/builders`.
    manual_dir: folder with the corpus's original files; nothing is fetched then.
    options: options of that corpus, such as `paths` for one's own text files.
    tokenizer: "bpe" (byte-level, trained on the training split) or "bytes"; "ids" for
      a corpus that is token ids to begin with, such as "mqar"; "model" for the one that
      an imported model came with.
    vocab_size: number of token ids, the one that starts a document included; of an
      imported model it is filled in.
    sequence_length: tokens in a training row.
    batch_size: rows in a global batch, over all processes together.
    eval_bytes: UTF-8 bytes of validation text that are scored; of token ids, the whole
      split always is.
    eval_context: tokens the model sees at once when scored; `sequence_length` if None.
    eval_stride: tokens an evaluation window moves on; half of the context if None.
    seed: of the order in which documents are read.

  Raises:
    InputError: a value out of range, or an unknown corpus or tokenizer.
  """

  corpus: str = "stdlib"
  manual_dir: str | None = None
  options: dict[str, Any] = dataclasses.field(default_factory=dict)
  tokenizer: str = "bpe"
  vocab_size: int = 2048
  sequence_length: int = 256
  batch_size: int = 16
  eval_bytes: int = 200_000
  eval_context: int | None = None
  eval_stride: int | None = None
  seed: int = 0

  def __post_init__(self):
    if self.corpus not in registry.names(BUILDERS):
      raise errors.unknown("corpus", self.corpus, registry.names(BUILDERS))
    if self.tokenizer not in TOKENIZERS:
      raise errors.unknown("tokenizer", self.tokenizer, TOKENIZERS)
    config.require(
      self.tokenizer in ("ids", "model") or self.vocab_size >= MIN_VOCAB_SIZE,
      f"vocab_size must be at least {MIN_VOCAB_SIZE} (256 bytes and the start of a "
      f"document), got {self.vocab_size}",
    )
    config.require(
      self.tokenizer != "bytes" or self.vocab_size == MIN_VOCAB_SIZE,
      f"tokenizer 'bytes' has exactly {MIN_VOCAB_SIZE} ids: set vocab_size to "
      f"{MIN_VOCAB_SIZE}, got {self.vocab_size}",
    )
    _positive(self, "vocab_size", "sequence_length", "batch_size", "eval_bytes")
    config.require(
      0 <= self.seed < 2**32, f"seed must be from 0 to 2**32 - 1, got {self.seed}"
    )
    context, stride = self.eval_window
    config.require(context >= 1, f"eval_context must be at least 1, got {context}")
    config.require(
      1 <= stride <= context,
      f"eval_stride must be from 1 to eval_context ({context}), got {stride}: "
      "a longer stride would leave tokens unscored",
    )

  @property
  def eval_window(self) -> tuple[int, int]:
    """Context and stride of the evaluation in tokens, with the defaults filled in."""
    context = self.sequence_length if self.eval_context is None else self.eval_context
    stride = max(context // 2, 1) if self.eval_stride is None else self.eval_stride
    return context, stride


def _positive(values: DataConfig, *names: str) -> None:
  for name in names:
    value = getattr(values, name)
    config.require(value >= 1, f"{name} must be at least 1, got {value}")
