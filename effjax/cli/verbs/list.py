"""What there is, one line each: configs, mixers, transforms, corpora and so on.

Examples:
  effjax list                  everything, by topic
  effjax list transforms       one topic
  effjax list mixers --json    for machines
  effjax list --markdown       the table of techniques in the README
"""

import argparse
import json
import shutil
import sys

from effjax.cli import catalog


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """Declares the arguments of the verb."""
  parser.add_argument(
    "topic", nargs="?", help=f"one of: {', '.join(catalog.topics())}; default: all"
  )
  parser.add_argument("--json", action="store_true", help="print JSON")
  parser.add_argument(
    "--markdown", action="store_true", help="print the README's table of techniques"
  )


def main(args: argparse.Namespace) -> None:
  """Runs the verb."""
  if args.markdown:
    print(catalog.markdown())
    return
  topics = [args.topic] if args.topic else catalog.topics()
  found = {topic: catalog.entries(topic) for topic in topics}
  if args.json:
    print(json.dumps(found[args.topic] if args.topic else found, indent=2))
    return
  columns = shutil.get_terminal_size().columns if sys.stdout.isatty() else 10**6
  width = max([len(name) for names in found.values() for name in names] or [0])
  for topic, names in found.items():
    if not args.topic:
      print(f"{topic}:")
    indent = "" if args.topic else "  "
    for name, summary in names.items():
      line = f"{indent}{name:<{width}}  {summary}"
      print(line if len(line) <= columns else line[: columns - 3] + "...")
    if not names:
      print(f"{indent}(none here)")
