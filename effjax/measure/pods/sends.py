"""What the chips send each other in a training step, in closed form.

The counts are those of programs that the TPU compiler of libtpu 0.0.42 makes, for
dense models and experts. Arrays of layers are sent layer by layer, in the compute
dtype, once a micro-batch. Of a step:

data axes ("data", "fsdp", and "expert" for all but experts)
  A parameter that is split over them is gathered for the forward pass and again for the
  backward one; where layers are recomputed ("full"), all but the last part of a layer
  once more. The output head is gathered once. Its gradient is scattered over the axes
  that gradients are split over and reduced over the others; but where those take all of
  a slice of more than eight chips, the compiler reduces all of it everywhere. Of an
  embedding whose width is split, tokens change places, forward and backward, or the
  float32 table is gathered and reduced, whichever is less. What only the optimizer
  state is split over is gathered in float32 after the update.
"tensor", "tp"
  What each product makes whose contracted axis is split (attention's and the MLP's
  output) is reduced, forward and backward; recomputed, all but the last of a layer,
  unless it is of experts.
"tensor", "tps"
  In place of each reduction, a gather and a scatter; the backward pass gathers twice,
  and for all but the last of a layer once or twice more (`_GATHERED_AGAIN`).
"expert"
  Rows of tokens go to their experts and back, forward and backward; to them and back
  once more where they are recomputed ("full").
"""

import dataclasses
from collections.abc import Iterable, Iterator

from effjax.measure.pods import laid as laid_lib
from effjax.measure.pods import traced
from effjax.parallel import collectives

_FLOAT32 = 4
# Gathers of the split stream that programs have beyond those that they must.
_GATHERED_AGAIN = {"none": 2, "dots": 1, "full": 2}
# From this many chips on a slice's gradients are reduced, not scattered (see above).
_FEW_CHIPS = 8
_Sent = collectives.Collective


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sends:
  """The collectives of one step.

  Attributes:
    laid: where everything lies.
    facts: of the training, with what it recomputes.
    rows: of a micro-batch, of the devices that hold the same ones.
    micro_batches: of a step.
    itemsize: bytes of the compute dtype.
  """

  laid: laid_lib.Laid
  facts: traced.Facts
  rows: int
  micro_batches: int
  itemsize: int

  def all(self) -> list[_Sent]:
    """All of them, those of one size together."""
    found = [*self._parameters(), *self._activations()]
    return [one for one in found if one.group_size > 1 and one.num_bytes > 0]

  def _parameters(self) -> Iterator[_Sent]:
    laid, batch = self.laid, set(self.laid.spread.batch_axes)
    products = {one.path: one for one in self.facts.products}
    for path, spec in self.facts.specs.items():
      split, product = _flat(laid.params[path]), products.get(path)
      own = batch - self._experts_axes(path)
      over = split & own
      layers = product.layers if product else 1
      size = spec.size / layers / laid.ways(split - over)
      times = layers * self.micro_batches
      if spec.kind == "embedding" and product is None:
        yield from self._looked_up(path, size, over, own)
      else:
        if over:
          gathers = self._gathers(product) * times
          yield self._one("all-gather", size * self.itemsize, over, gathers)
        yield from self._gradient(path, size, own, times)
      updated = (_flat(laid.state[path]) - split) & batch
      if updated and path in laid.trained:
        yield self._one("all-gather", size * _FLOAT32, updated, layers)

  def _gathers(self, product: traced.Product | None) -> int:
    """Times that a micro-batch gathers one layer's matrix."""
    if product is None or not product.spec.stack:
      return 1
    return 3 if self.facts.remat == "full" and not product.is_last else 2

  def _gradient(
    self, path: str, size: float, batch: set[str], times: int
  ) -> Iterator[_Sent]:
    if path not in self.laid.trained:
      return
    axes = _flat(self.laid.gradients[path]) & batch
    num_bytes = size * self.itemsize
    if self.laid.ways(axes) == self.laid.spread.mesh.size > _FEW_CHIPS:
      axes = set()
    if axes:
      yield self._one("reduce-scatter", num_bytes, axes, times)
    if batch - axes:
      num_bytes /= self.laid.ways(axes)
      yield self._one("all-reduce", num_bytes, batch - axes, times)

  def _looked_up(
    self, path: str, size: float, over: set[str], batch: set[str]
  ) -> Iterator[_Sent]:
    """An embedding and its gradient: tokens change places, or the table is sent."""
    table, times = size * _FLOAT32, self.micro_batches
    width = self.facts.specs[path].shape[-1]
    tokens = self.rows * self.facts.steps.length * width
    axes = _flat(self.laid.gradients[path]) & batch
    if tokens * (_FLOAT32 + self.itemsize) > 3 * table:
      yield self._one("all-gather", table, over, times)
      axes = set()
    else:
      yield self._one("all-to-all", tokens * self.itemsize, over, times)
      yield self._one("all-to-all", tokens * _FLOAT32, axes, times)
    if path in self.laid.trained:
      left = table / self.laid.ways(axes)
      yield self._one("all-reduce", left, batch - axes, times)

  def _activations(self) -> Iterator[_Sent]:
    for product in self.facts.products:
      contracted, made = (
        set(self.laid.params[product.path][len(product.spec.stack) + dim])
        for dim in product.dims
      )
      batch = set(self.laid.spread.batch_axes)
      over = contracted - batch
      size = self.rows * product.made / product.layers / self.laid.ways(made - batch)
      times = product.layers * self.micro_batches
      if over:
        yield from self._reduced(product, size * self.itemsize, over, times)
      elif made - batch and not product.spec.stack:
        # The output head: what goes back is of its input.
        width = self.rows * product.read * self.itemsize
        yield from self._outside(width, made - batch, times)
      exchanged = self._experts_axes(product.path)
      if exchanged and product.spec.axes[-1] == "embed":
        passes = 6 if self.facts.remat == "full" else 4
        yield self._one("all-to-all", size * self.itemsize, exchanged, times * passes)

  def _reduced(
    self, product: traced.Product, num_bytes: float, over: set[str], times: int
  ) -> Iterator[_Sent]:
    """What a product with a split contraction sends, layer by layer."""
    # The gradient of how experts are weighted needs what they made.
    spared = product.is_last and "experts" not in product.spec.axes
    again = 0 if spared or self.facts.remat != "full" else 1
    if not self._splits_stream:
      yield self._one("all-reduce", num_bytes, over, times * (2 + again))
      return
    gathers = 3 if product.is_last else 3 + _GATHERED_AGAIN[self.facts.remat]
    yield self._one("all-gather", num_bytes, over, times * gathers)
    yield self._one("reduce-scatter", num_bytes, over, times * (2 + again))

  def _outside(self, num_bytes: float, over: set[str], times: int) -> Iterator[_Sent]:
    """Of the stream before and after the layers: the embedding's, and the head's."""
    if not self._splits_stream:
      yield self._one("all-reduce", num_bytes, over, 2 * times)
      return
    for kind in ("all-gather", "reduce-scatter"):
      yield self._one(kind, 3 * num_bytes, over, times)

  def _experts_axes(self, path: str) -> set[str]:
    """Mesh axes that tokens are sent along, as whole experts are split over them."""
    axes = self.laid.facts.specs[path].all_axes
    pairs = zip(axes, self.laid.params[path], strict=True)
    return {a for axis, by in pairs if axis == "experts" for a in by} & {"expert"}

  @property
  def _splits_stream(self) -> bool:
    """Whether what goes from layer to layer is split in width."""
    return ("embed_act", "tensor") in self.laid.spread.preset.activations

  def _one(
    self, kind: str, num_bytes: int | float, axes: set[str], times: int
  ) -> _Sent:
    group = self.laid.group(frozenset(axes))
    return _Sent(kind, round(num_bytes), (group,), times)


def _flat(by_dim: Iterable[tuple[str, ...]]) -> set[str]:
  """All mesh axes of a parameter."""
  return {axis for axes in by_dim for axis in axes}
