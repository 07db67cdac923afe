"""The few sentences a table comes down to, with the losses among them."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from effjax.report import result as result_lib

Row = Mapping[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fact:
  """A headline: what it is about, the number, and what that means."""

  label: str
  value: str
  detail: str
  tone: str = ""


def facts(results: Sequence[result_lib.Result]) -> list[Fact]:
  """Best quality, smallest, fastest, and how compressors do on the same text."""
  rows = [(result, row) for result in results for row in result.stages]
  several = len(results) > 1
  name = lambda result, row: (
    f"{result.name}/{row['stage']}" if several else row["stage"]
  )
  scored = [x for x in rows if x[1]["quality"].get("bits_per_byte") is not None]
  found = []
  if scored:
    best = min(scored, key=lambda x: x[1]["quality"]["bits_per_byte"])
    found.append(
      Fact(
        label="Best quality",
        value=f"{best[1]['quality']['bits_per_byte']:.3f} bits/byte",
        detail=name(*best),
      )
    )
  answered = [x for x in rows if x[1]["quality"].get("accuracy") is not None]
  if answered:
    best_answers = max(answered, key=lambda x: x[1]["quality"]["accuracy"])
    found.append(
      Fact(
        label="Best accuracy",
        value=f"{100 * best_answers[1]['quality']['accuracy']:.1f} %",
        detail=name(*best_answers),
      )
    )
  smallest = min(rows, key=lambda x: x[1]["bytes_held"])
  found.append(
    Fact(
      label="Smallest",
      value=f"{smallest[1]['bytes_held'] / 1e6:.2f} MB held",
      detail=f"{name(*smallest)}{_against_first(*smallest, 'bytes_held')}",
    )
  )
  decodes = any(row["decode_ms_p50"] for _, row in rows)
  field, doing, unit = (
    ("decode_ms_p50", "decoding", "ms/token")
    if decodes
    else ("prefill_ms", "reading", "ms a batch")
  )
  timed = [x for x in rows if x[1][field]]
  for word, choose in (("Fastest", min), ("Slowest", max)) if timed else ():
    chosen = choose(timed, key=lambda x: x[1][field])
    found.append(
      Fact(
        label=f"{word} {doing}",
        value=f"{chosen[1][field]:.2f} {unit}",
        detail=f"{name(*chosen)}{_against_first(*chosen, field)}",
      )
    )
  if scored:
    found += _compressors(results, best[1]["quality"]["bits_per_byte"])
  return found


def _against_first(result: result_lib.Result, row: Row, field: str) -> str:
  first = result.first(row)
  if first is None or not first[field]:
    return ""
  sizes = field == "bytes_held"
  less, more = ("smaller", "larger") if sizes else ("faster", "slower")
  ratio = row[field] / first[field]
  change = f"{ratio:.2f}x {more}" if ratio > 1 else f"{1 / ratio:.2f}x {less}"
  cost = ""
  for name, words in (
    ("bits_per_byte", ", {:+.3f} bits/byte"),
    ("accuracy", ", {:+.2%} right"),
  ):
    old, new = (r["quality"].get(name) for r in (first, row))
    if old is not None and new is not None:
      cost += words.format(new - old)
  return f": {change} than {first['stage']}{cost}"


def _compressors(results: Sequence[result_lib.Result], best: float) -> list[Fact]:
  lines = {r["name"]: r["bits_per_byte"] for x in results for r in x.references}
  if not lines:
    return []
  beaten = [n for n, bits in lines.items() if best < bits]
  winning = [f"{n} ({bits:.3f})" for n, bits in lines.items() if bits <= best]
  detail = f"beats {', '.join(beaten)}" if beaten else "beats no compressor"
  if winning:
    detail += f"; {', '.join(winning)} {'win' if len(winning) > 1 else 'wins'}"
  return [
    Fact(
      label="Against compressors",
      value=f"{len(beaten)} of {len(lines)} beaten",
      detail=f"the best model {detail}",
      tone="worse" if winning else "",
    )
  ]
