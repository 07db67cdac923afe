r"""Exports a run: effjax export --workdir DIR --format hf --out PATH.

hf writes a Hugging Face folder (config.json, safetensors, tokenizer) that transformers
loads; gguf writes a file that llama.cpp runs, its matrices encoded as --type says.
Either is written as the first architecture that can express the model, or the one that
is asked for. onnx writes a file that ONNX Runtime runs, and TensorRT in type fp32, with
a cache in and out; stablehlo a folder with the program and its weights, which whoever
has JAX runs. What the format cannot hold is refused by name: compressed weights too,
unless --dense multiplies them out; stablehlo holds all of them as they are. PATH
appears whole or not at all.

Examples:
  effjax export --workdir runs/smollm2 --format hf --out exported/smollm2
  effjax export --workdir runs/quickstart --stage train --format hf --out exported/small
  effjax export --workdir runs/quickstart --stage int8 --format hf --dense \
    --dtype bfloat16 --out exported/int8
  effjax export --workdir runs/smollm2 --format gguf --type Q4_K --out smollm2.gguf
  effjax export --workdir runs/smollm2 --format onnx --type int4 --out smollm2.onnx
  effjax export --workdir runs/quickstart --format stablehlo --out exported/program
"""

import argparse
import pathlib
import sys

FORMATS = ("hf", "gguf", "onnx", "stablehlo")


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """Declares the arguments of the verb."""
  parser.add_argument(
    "--workdir", type=pathlib.Path, required=True, metavar="DIR", help="the run folder"
  )
  parser.add_argument("--stage", metavar="NAME", help="default: the last finished one")
  parser.add_argument("--format", required=True, help=", ".join(FORMATS))
  parser.add_argument(
    "--out", type=pathlib.Path, required=True, metavar="PATH", help="must not exist"
  )
  parser.add_argument(
    "--dtype", help="hf: float32, bfloat16 or float16; default: that of the run"
  )
  parser.add_argument(
    "--type",
    help="gguf: F32, F16 (default), BF16, Q8_0, Q4_0, Q4_1, Q5_0, Q5_1, Q4_K, Q5_K or "
    "Q6_K; onnx: fp32 (default), int4 or int8",
  )
  parser.add_argument(
    "--architecture", metavar="NAME", help="default: the first that fits"
  )
  parser.add_argument(
    "--dense", action="store_true", help="multiply out compressed weights"
  )
  parser.add_argument(
    "--length",
    type=int,
    metavar="TOKENS",
    help="stablehlo: of a row; default: any, or the model's longest where it must be "
    "fixed",
  )


def main(args: argparse.Namespace) -> None:
  """Runs the verb."""
  from effjax.core import errors
  from effjax.interop import exports
  from effjax.recipe import api

  if args.format not in FORMATS:
    raise errors.unknown("format", args.format, FORMATS)
  for option, formats in exports.ONLY.items():
    if getattr(args, option) is not None and args.format not in formats:
      belongs = " or ".join(formats)
      raise errors.InputError(f"--{option} belongs to --format {belongs}")
  options = exports.ExportOptions(
    format=args.format,
    dtype=args.dtype,
    type=args.type,
    architecture=args.architecture,
    dense=args.dense,
    length=args.length,
  )
  if args.out.exists():
    raise errors.InputError(f"{args.out} exists already; choose another --out")
  run = api.load(args.workdir, args.stage)
  written, notes = exports.write(
    options, args.out, run.model, run.params, run.specs, run.tokenizer
  )
  for note in notes:
    print(f"note: {note}", file=sys.stderr)
  print(f"{args.out}: {written}, stage {run.stage}")
