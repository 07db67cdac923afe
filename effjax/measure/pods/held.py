"""What a chip's memory holds during a compiled training step, by what it is for."""

from collections.abc import Iterator

from effjax.parallel import hlo

# Where JAX says that an operation of a loop belongs to: the backward pass, or another.
_BACKWARD = "transpose(jvp("
_FORWARD = "jvp("


def stacked(program: hlo.Program) -> dict[str, int]:
  """Bytes that scans over layers write one slice a turn, by the pass they are of.

  Args:
    program: of a training step whose layers are scanned.

  Returns:
    "activations", kept by the forward pass for the backward one, and "gradients". What
    a loop within another writes counts once: the next turn writes it again.
  """
  found = {"activations": 0, "gradients": 0}
  for instructions in program.computations.values():
    for one in instructions:
      if one.operation != "while":
        continue
      kind = _pass(one, program)
      if kind is None:
        continue
      for array in _written(one, program):
        found[kind] += array.num_bytes if array.space == hlo.MAIN_MEMORY else 0
  return found


def _pass(loop: hlo.Instruction, program: hlo.Program) -> str | None:
  """What most of a loop's body is for: a few operations are shared by both passes."""
  body = (one for name in loop.called() for one in program.computations.get(name, ()))
  texts = [one.text for one in body if _FORWARD in one.text]
  backward = sum(_BACKWARD in text for text in texts)
  if not texts:
    return None
  return "gradients" if 2 * backward > len(texts) else "activations"


def _written(loop: hlo.Instruction, program: hlo.Program) -> Iterator[hlo.Array]:
  """Arrays of a loop's carry that its body changes a slice of."""
  for name in loop.called():
    body = program.computations.get(name, ())
    by_name = {one.name: one for one in body}
    root = next((one for one in body if one.is_root), None)
    if root is None or root.operation != "tuple":
      continue
    for place, made in enumerate(root.operands):
      source = by_name.get(made)
      if source is not None and _is_update(source, program, by_name):
        yield loop.results[place]


def _is_update(
  one: hlo.Instruction, program: hlo.Program, by_name: dict[str, hlo.Instruction]
) -> bool:
  """Whether an instruction changes a slice of an array where it is."""
  while one.operation in ("bitcast", "copy", "copy-done", "copy-start"):
    if one.operands[0] not in by_name:
      return False
    one = by_name[one.operands[0]]
  place = 0
  if one.operation == "get-tuple-element":
    place = int(one.attribute("index") or 0)
    one = by_name.get(one.operands[0], one)
  if one.operation == "dynamic-update-slice":
    return True
  if one.operation != "fusion":
    return False
  inner = {i.name: i for i in program.computations[next(one.called())]}
  root = next(i for i in inner.values() if i.is_root)
  if root.operation == "tuple":
    root = inner[root.operands[place]]
  return _is_update(root, program, inner)
