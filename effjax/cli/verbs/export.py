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
from collections.abc import Callable
from typing import Any

FORMATS = ("hf", "gguf", "onnx", "stablehlo")
# Options that only some formats have.
_ONLY = {
  "dtype": ("hf",),
  "type": ("gguf", "onnx"),
  "architecture": ("hf", "gguf"),
  "length": ("stablehlo",),
}


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
  from effjax.recipe import api

  if args.format not in FORMATS:
    raise errors.unknown("format", args.format, FORMATS)
  for option, formats in _ONLY.items():
    if getattr(args, option) is not None and args.format not in formats:
      belongs = " or ".join(formats)
      raise errors.InputError(f"--{option} belongs to --format {belongs}")
  if args.out.exists():
    raise errors.InputError(f"{args.out} exists already; choose another --out")
  run = api.load(args.workdir, args.stage)
  write = {
    "hf": _write_hf,
    "gguf": _write_gguf,
    "onnx": _write_onnx,
    "stablehlo": _write_stablehlo,
  }[args.format]
  print(f"{args.out}: {write(args, run)}, stage {run.stage}")


def _write_hf(args: argparse.Namespace, run: Any) -> str:
  """Writes a folder; returns the name of the architecture."""
  from effjax.interop.hf import folder

  return folder.save(
    args.out,
    run.model,
    run.params,
    run.specs,
    run.tokenizer,
    dtype=args.dtype,
    model_type=args.architecture,
    dense=args.dense,
  )


def _write_gguf(args: argparse.Namespace, run: Any) -> str:
  """Writes a file; returns the type of its matrices."""
  from effjax.interop.gguf import export

  return _write_typed(export.save, args, run, "F16", architecture=args.architecture)


def _write_onnx(args: argparse.Namespace, run: Any) -> str:
  """Writes a file; returns the type of its matrices."""
  from effjax.interop.onnx import export

  return _write_typed(export.save, args, run, "fp32")


def _write_typed(
  save: Callable[..., list[str]],
  args: argparse.Namespace,
  run: Any,
  default: str,
  **options: Any,
) -> str:
  kind = args.type or default
  notes = save(
    args.out,
    run.model,
    run.params,
    run.specs,
    run.tokenizer,
    type=kind,
    dense=args.dense,
    **options,
  )
  _print_notes(notes)
  return kind


def _write_stablehlo(args: argparse.Namespace, run: Any) -> str:
  """Writes a folder; returns its format."""
  from effjax.interop import stablehlo

  notes = stablehlo.save(
    args.out, run.model, run.params, run.specs, run.tokenizer, length=args.length
  )
  _print_notes(notes)
  return args.format


def _print_notes(notes: list[str]) -> None:
  for note in notes:
    print(f"note: {note}", file=sys.stderr)
