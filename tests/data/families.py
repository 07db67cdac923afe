"""Small tokenizers of the four families that pretrained models have.

Each is the content of a Hugging Face `tokenizer.json`, trained here.
"""

import functools
import json

import tokenizers as hf
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

CORPUS = [
  f"The quick brown fox number {i} jumps over the lazy dog; it's café time, naïve one!"
  for i in range(40)
] + [
  f"def function_{i}(self, value):\n\tif value > {i}:\n        return self.name\n\n"
  for i in range(40)
]
CHATML = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEXTS = [
  "",
  " ",
  "a",
  " leading space",
  "trailing space ",
  "many     spaces  and\ttabs\t\t and\u00a0hard ones",
  "line\nbreaks\r\nof\rall\n\n\n kinds\u2028\u0085",
  "e\u0301 combining, \u00e9 composed, n\u0303o\u0308",
  "👩‍👩‍👧‍👦 family, 🏳️‍🌈 flag, 🇨🇭 letters, 😀",
  "日本語のテキスト, العربية, हिन्दी, ไทย",
  "def f(x):\n  return {'a': x[1:-1], \"b\": x**2}  # café\n",
  "The quick brown fox doesn't jump. It's 12345.678, isn't it ?!",
  "\x00\x01\x7f control \ufeff mark \ufffd replacement",
  "under▁score and ##pieces and Ġ letters",
  "<0x41> is no byte, <unk> no token",
  "<|im_start|>user\nhi<|im_end|>",
  "x<|endoftext|>y <s> a</s> [INST] [CLS] b [SEP] [MASK] [UNK]",
  "supercalifragilisticexpialidocious" * 8,
]


@functools.cache
def byte_level() -> str:
  """Byte-level BPE, as of GPT-2, SmolLM2 and Qwen."""
  made = hf.Tokenizer(models.BPE())
  made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  trainer = hf.trainers.BpeTrainer(
    vocab_size=400,
    special_tokens=CHATML,
    initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    show_progress=False,
  )
  made.train_from_iterator(CORPUS, trainer)
  made.decoder = decoders.ByteLevel()
  made.post_processor = processors.ByteLevel(trim_offsets=False)
  # A token that is no special one and is written as plain text.
  made.add_tokens(["    ", "über"])
  return made.to_str()


@functools.cache
def sentencepiece_bpe() -> str:
  """BPE over whole texts with byte fallback, as of Llama 2 and Mistral."""
  learner = hf.Tokenizer(models.BPE())
  learner.pre_tokenizer = pre_tokenizers.Metaspace()
  trainer = hf.trainers.BpeTrainer(vocab_size=260, show_progress=False)
  learner.train_from_iterator([text.replace("\n", " ") for text in CORPUS], trainer)
  learned = json.loads(learner.to_str())["model"]
  names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
  names += [name for name in learned["vocab"] if name not in names]
  merges = [tuple(pair) for pair in learned["merges"]]
  # As in the real ones: a merge for every way to put a piece together, "</s>" too.
  names += [name for name in ("<", "/", ">", "</", "s>") if name not in names]
  merges += [("<", "/"), ("s", ">"), ("</", "s>")]
  vocab = {name: index for index, name in enumerate(names)}
  made = hf.Tokenizer(
    models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
  )
  made.normalizer = normalizers.Sequence(
    [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
  )
  made.decoder = decoders.Sequence(
    [
      decoders.Replace("▁", " "),
      decoders.ByteFallback(),
      decoders.Fuse(),
      decoders.Strip(" ", 1, 0),
    ]
  )
  made.post_processor = processors.TemplateProcessing(
    single="<s> $A", special_tokens=[("<s>", 1)]
  )
  made.add_special_tokens(["<unk>", "<s>", "</s>"])
  return made.to_str()


@functools.cache
def word_piece() -> str:
  """WordPiece, as of BERT."""
  made = hf.Tokenizer(models.WordPiece(unk_token="[UNK]"))
  made.normalizer = normalizers.BertNormalizer(lowercase=True)
  made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
  trainer = hf.trainers.WordPieceTrainer(
    vocab_size=300,
    special_tokens=["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"],
    show_progress=False,
  )
  made.train_from_iterator(CORPUS, trainer)
  made.decoder = decoders.WordPiece()
  made.post_processor = processors.TemplateProcessing(
    single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
  )
  return made.to_str()


@functools.cache
def unigram() -> str:
  """Unigram language model, as of ALBERT."""
  made = hf.Tokenizer(models.Unigram())
  made.normalizer = normalizers.Sequence(
    [
      normalizers.Replace("``", '"'),
      normalizers.NFKD(),
      normalizers.StripAccents(),
      normalizers.Lowercase(),
    ]
  )
  made.pre_tokenizer = pre_tokenizers.Metaspace()
  trainer = hf.trainers.UnigramTrainer(
    vocab_size=300,
    special_tokens=["<pad>", "<unk>", "[CLS]", "[SEP]", "[MASK]"],
    unk_token="<unk>",
    show_progress=False,
  )
  made.train_from_iterator(CORPUS, trainer)
  made.decoder = decoders.Metaspace()
  made.post_processor = processors.TemplateProcessing(
    single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
  )
  return made.to_str()


# Family to its file, and the facts beside it.
FAMILIES = {
  "byte_level": (byte_level, {"bos_id": 1, "eos_ids": [2, 0], "pad_id": 2}),
  "sentencepiece_bpe": (sentencepiece_bpe, {"bos_id": 1, "eos_ids": [2]}),
  "word_piece": (word_piece, {"bos_id": 2, "eos_ids": [3], "pad_id": 0}),
  "unigram": (unigram, {"bos_id": 2, "eos_ids": [3], "pad_id": 0}),
}
