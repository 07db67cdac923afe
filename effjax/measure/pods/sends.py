"""What the chips send each other in a training step, in closed form.

The counts are those of programs that XLA's TPU compiler makes (jax 0.8 and later), for
dense models and experts. Arrays of layers are sent layer by layer, in the compute
dtype, once a micro-batch. Of a step:

data axes ("data", "fsdp", and "expert" for all but experts)
  A parameter that is split over them is gathered for the forward pass and again for the
  backward one; where layers are recomputed ("full"), all but the last part of a layer
  once more. The output head is gathered once. Its gradient is scattered over the axes
  that gradients are split over and reduced over the others; but where those take all of
  a slice of more than eight chips, the compiler reduces all of it everywhere. Tokens of
  an embedding whose width is split change places, forward and backward. What only the
  optimizer state is split over is gathered in float32 after the update.
"tensor", "tp"
  What each product makes whose contracted axis is split (attention's and the MLP's
  output) is reduced, forward and backward; recomputed, all but the last of a layer.
"tensor", "tps"
  In place of each reduction, a gather and a scatter; the backward pass gathers twice,
  and all but the last of a layer once more ("dots") or twice, with a scatter ("full").
"expert"
  Rows of tokens go to their experts and back, forward and backward; to them and back
  once more where they are recomputed ("full").
"""

import dataclasses
from collections.abc import Iterator

from effjax.measure.pods import laid as laid_lib
from effjax.measure.pods import traced
from effjax.parallel import collectives

_FLOAT32 = 4
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
      split = {axis for axes in laid.params[path] for axis in axes}
      tokens_move = self._experts_axes(path)
      over = (split & batch) - tokens_move
      layers = products[path].layers if path in products else 1
      size = spec.size / layers / laid.ways(split - over)
      micro = layers * self.micro_batches
      is_lookup = spec.kind == "embedding" and path not in products
      if is_lookup and over:
        yield from self._looked_up(spec.shape[-1], over)
      elif over:
        times = self._gathers(products.get(path)) * micro
        yield self._one("all-gather", size * self.itemsize, over, times)
      if path not in laid.trained:
        continue
      yield from self._gradient(path, size, batch - tokens_move, micro, is_lookup)
      mirrored = {axis for axes in laid.state[path] for axis in axes}
      updated = (mirrored - split) & batch
      if updated:
        yield self._one("all-gather", size * _FLOAT32, updated, layers)

  def _gathers(self, product: traced.Product | None) -> int:
    """Times that a micro-batch gathers one layer's matrix."""
    if product is None or not product.spec.stack:
      return 1
    return 3 if self.facts.remat == "full" and not product.is_last else 2

  def _looked_up(self, width: int, over: set[str]) -> Iterator[_Sent]:
    """Rows of an embedding of which a chip has a part of the width."""
    size = self.rows * self.facts.steps.length * width
    for itemsize in (_FLOAT32, self.itemsize):
      yield self._one("all-to-all", size * itemsize, over, self.micro_batches)

  def _gradient(
    self, path: str, size: float, batch: set[str], times: int, is_lookup: bool
  ) -> Iterator[_Sent]:
    axes = {axis for axes in self.laid.gradients[path] for axis in axes} & batch
    num_bytes = size * (_FLOAT32 if is_lookup else self.itemsize)
    num_chips = self.laid.spread.mesh.size
    if is_lookup:
      pass  # A chip was sent all rows of its part of the width.
    elif self.laid.ways(axes) == num_chips > _FEW_CHIPS:
      axes = set()
    elif axes:
      yield self._one("reduce-scatter", num_bytes, axes, times)
    if batch - axes:
      num_bytes /= self.laid.ways(axes)
      yield self._one("all-reduce", num_bytes, batch - axes, times)

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
    again = {"none": 0, "dots": 1, "full": 2}[self.facts.remat]
    again = 0 if product.is_last else again
    if not self._splits_stream:
      yield self._one("all-reduce", num_bytes, over, times * (2 + again // 2))
      return
    yield self._one("all-gather", num_bytes, over, times * (3 + again))
    yield self._one("reduce-scatter", num_bytes, over, times * (2 + again // 2))

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

  def _one(self, kind: str, num_bytes: float, axes: set[str], times: int) -> _Sent:
    group = self.laid.group(frozenset(axes))
    return _Sent(kind, round(num_bytes), (group,), times)
