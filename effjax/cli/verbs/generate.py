"""Text from a run, token by token: effjax generate --workdir DIR --prompt TEXT.

The prompt is repeated on the terminal, then the text streams behind it. With --chat the
prompt is a user's message, written as the model's chat template does, and only the
answer is printed. The same seed gives the same text.

Examples:
  effjax generate --workdir runs/quickstart-smoke --prompt "def main("
  effjax generate --workdir runs/quickstart --prompt "import " --stage int4 --top-p 0.9
  effjax generate --workdir runs/quickstart --prompt "class " --temperature 0
  effjax generate --workdir runs/imported --chat --prompt "Why is the sky blue?"
"""

import argparse
import json
import pathlib
import sys


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """Declares the arguments of the verb."""
  parser.add_argument(
    "--workdir", type=pathlib.Path, required=True, metavar="DIR", help="the run folder"
  )
  parser.add_argument("--stage", metavar="NAME", help="default: the last finished one")
  parser.add_argument("--prompt", required=True, metavar="TEXT", help="may be empty")
  parser.add_argument("--max-tokens", type=int, default=128, metavar="N")
  parser.add_argument(
    "--temperature", type=float, default=0.8, help="0 takes the most likely token"
  )
  parser.add_argument(
    "--top-k", type=int, default=0, metavar="K", help="of the K likeliest; 0 for all"
  )
  parser.add_argument(
    "--top-p",
    type=float,
    default=1.0,
    metavar="P",
    help="of the smallest set with probability P",
  )
  parser.add_argument(
    "--min-p",
    type=float,
    default=0.0,
    metavar="P",
    help="of those at least P times as likely as the likeliest",
  )
  parser.add_argument(
    "--repetition-penalty",
    type=float,
    default=1.0,
    metavar="R",
    help="above 1: tokens that have occurred become less likely",
  )
  parser.add_argument(
    "--stop",
    action="append",
    default=[],
    metavar="TEXT",
    help="end before TEXT; may be given several times",
  )
  parser.add_argument(
    "--chat", action="store_true", help="answer the prompt as a chat model"
  )
  parser.add_argument("--system", metavar="TEXT", help="with --chat: how to answer")
  parser.add_argument("--seed", type=int, default=0)
  parser.add_argument("--json", action="store_true", help="print JSON at the end")


def main(args: argparse.Namespace) -> None:
  """Runs the verb."""
  from effjax.infer import generate, sampling
  from effjax.recipe import api

  options = sampling.SamplingOptions(
    temperature=args.temperature,
    top_k=args.top_k,
    top_p=args.top_p,
    min_p=args.min_p,
    repetition_penalty=args.repetition_penalty,
  )
  run = api.load(args.workdir, args.stage)
  api.require_language_model(run, "writes no text")
  pieces = generate.stream(
    run.model,
    run.params,
    run.tokenizer,
    args.prompt,
    max_tokens=args.max_tokens,
    options=options,
    seed=args.seed,
    stop=tuple(args.stop),
    chat=args.chat,
    system=args.system,
  )
  if args.json:
    text = "".join(pieces)
    print(json.dumps({"stage": run.stage, "prompt": args.prompt, "text": text}))
    return
  # The first piece comes before anything is printed, so a bad prompt prints nothing.
  first = next(pieces, "")
  sys.stdout.write(first if args.chat else args.prompt + first)
  sys.stdout.flush()
  for piece in pieces:
    sys.stdout.write(piece)
    sys.stdout.flush()
  sys.stdout.write("\n")
