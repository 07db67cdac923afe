"""Time and memory of a training step on a slice, without compiling it.

What the model keeps and multiplies is traced once (`traced`), what a mesh splits is
read from its tables (`laid`), and what is sent follows from both (`sends`). Beside them
stand a few rules of memory and of its traffic:

memory
  Parameters, optimizer state, batch: exact. Gradients: those of everything that trains,
  twice where micro-batches add up. Activations: what the layers keep. Working set: the
  larger of what one layer needs (what its products make, its weights, and what products
  of two activations read and make, each `_LIVE` times, and the stream in float32) and
  what the output head needs (logits in float32 and their gradient in the compute dtype,
  the head and its gradient).
traffic
  A product reads its operands and writes its result; beside products, what they read is
  written and what they write is read once more. Forward, twice backward, and once more
  where layers are recomputed. State and gradients are read and written once a step.
time
  As `roofline`: a product the longer of FLOPs and bytes, then what is beside products,
  then collectives, none hidden; times what published runs took longer (`calibration`).
"""

import dataclasses
import functools
import itertools
from collections.abc import Iterator

from effjax.core import shard as shard_lib
from effjax.measure.pods import calibration, chips, links, sends, traced
from effjax.measure.pods import laid as laid_lib
from effjax.parallel import collectives

# Times that these are held at once in a layer's backward pass, gradients among them;
# fitted to compiled programs of dense models and of one of Mamba-2.
_LIVE = {"made": 1.25, "weights": 1.6, "mixed": 6}
_FLOAT32 = 4
# Passes over a product: forward, and the gradients of both of its operands.
_PASSES = 3
# Arrays of integers of a batch, and the weights of targets, 4 bytes a token each.
_BATCH_ARRAYS = 5


@dataclasses.dataclass(frozen=True, kw_only=True)
class Estimate:
  """A training step on every chip of a slice; bytes and FLOPs are of one chip.

  Attributes:
    laid: where everything lies.
    facts: of the training, with what it recomputes.
    micro_batches: parts of a batch.
    slice: the chips.
  """

  laid: laid_lib.Laid
  facts: traced.Facts
  micro_batches: int
  slice: chips.Slice

  @property
  def rows(self) -> int:
    """Of a micro-batch, on a chip and those that hold the same ones."""
    parts = self.laid.spread.batch_ways * self.micro_batches
    return self.facts.steps.batch_size // parts

  @functools.cached_property
  def memory(self) -> dict[str, int]:
    """Bytes at the fullest, by what they are for."""
    laid, twice = self.laid, 2 if self.micro_batches > 1 else 1
    tokens = self.rows * self.micro_batches * self.facts.steps.length
    return {
      "params": laid.param_bytes,
      "optimizer": laid.state_bytes,
      "batch": tokens * _BATCH_ARRAYS * 4 + self.facts.other_bytes,
      "activations": round(sum(map(self._kept, self.facts.kept))),
      "gradients": laid.gradient_bytes * twice,
      "working": round(max(self._layer, self._head)),
    }

  @property
  def hbm_bytes(self) -> int:
    """Memory at its fullest."""
    return sum(self.memory.values())

  @property
  def fits(self) -> bool:
    """Whether a chip's memory holds it."""
    return self.hbm_bytes <= self.slice.chip.hbm_bytes

  @functools.cached_property
  def flops(self) -> float:
    """Multiplied and added, recomputed layers included."""
    facts = self.facts
    whole = facts.unowned_flops + sum(one.row_flops for one in facts.products)
    mine = facts.unowned_flops / self._widest
    mine += sum(one.row_flops / self._ways(one) for one in facts.products)
    return facts.row_flops * self.rows * self.micro_batches * mine / whole

  @functools.cached_property
  def hbm_traffic_bytes(self) -> float:
    """Between memory and chip."""
    products = sum(sum(self._moved(one)) for one in self.facts.products)
    return products + self._mixed + self._beside

  @functools.cached_property
  def collectives(self) -> list[collectives.Collective]:
    """All that is sent."""
    return sends.Sends(
      laid=self.laid,
      facts=self.facts,
      rows=self.rows,
      micro_batches=self.micro_batches,
      itemsize=self._itemsize,
    ).all()

  @property
  def collective_bytes(self) -> float:
    """That a chip sends."""
    return sum(one.wire_bytes for one in self.collectives)

  @functools.cached_property
  def ici_secs(self) -> float:
    """That links are busy."""
    wiring = links.of_mesh(self.slice, self.laid.spread.mesh)
    return sum(wiring.secs(one) * one.times for one in self.collectives)

  @functools.cached_property
  def chip_secs(self) -> float:
    """Of computing and of memory, at peak rates."""
    chip, waiting = self.slice.chip, 0.0
    for one in self.facts.products:
      flops = one.row_flops / self._ways(one) * self.rows * self.micro_batches
      compute = flops * self._passes(one) / chip.flops
      waiting += max(0.0, sum(self._moved(one)) / chip.hbm_rate - compute)
    unowned = self.facts.unowned_flops / self._widest * self.rows * self.micro_batches
    compute = unowned * self._layer_passes / chip.flops
    waiting += max(0.0, self._mixed / chip.hbm_rate - compute)
    return self.flops / chip.flops + waiting + self._beside / chip.hbm_rate

  @functools.cached_property
  def step_secs(self) -> float:
    """Of a step, calibrated."""
    return (self.chip_secs + self.ici_secs) * calibration.ratios().mean

  @property
  def mfu(self) -> float:
    """Model FLOPs utilization."""
    peak = self.slice.chip.flops * self.laid.spread.mesh.size
    return self.facts.model_flops / (self.step_secs * peak)

  @property
  def _itemsize(self) -> int:
    return self.facts.steps.config.precision.dtype.itemsize

  def _kept(self, kept: traced.Kept) -> float:
    """Bytes that a chip keeps of what layers keep.

    Weights in the compute dtype, if they are kept at all, are split like parameters.
    """
    spread = self.laid.spread
    axes, table = kept.axes, spread.preset.params
    if kept.row_bytes:
      axes = tuple("embed_act" if axis == "embed" else axis for axis in axes)
      table = tuple(p for p in spread.preset.activations if p[0] != "batch")
    entries = shard_lib.partition_spec(axes, kept.shape, spread.mesh, table)
    split = {axis for e in entries if e for axis in ((e,) if isinstance(e, str) else e)}
    if kept.row_bytes:
      split -= set(spread.batch_axes)
    return (kept.row_bytes * self.rows + kept.once_bytes) / self.laid.ways(split)

  def _dims(self, product: traced.Product) -> list[int]:
    """Ways that what a product reads, and what it makes, is split besides by rows."""
    batch, stacked = set(self.laid.spread.batch_axes), len(product.spec.stack)
    entries = self.laid.params[product.path]
    return [self.laid.ways(set(entries[stacked + dim]) - batch) for dim in product.dims]

  def _ways(self, product: traced.Product) -> int:
    read, made = self._dims(product)
    return read * made

  @functools.cached_property
  def _widest(self) -> int:
    """Ways that products of activations, such as attention, are split."""
    return max(map(self._ways, self.facts.products), default=1)

  def _passes(self, product: traced.Product) -> int:
    """Times that a product runs, or one with its gradient that is as large."""
    return self._layer_passes if product.spec.stack else _PASSES

  @property
  def _layer_passes(self) -> int:
    return _PASSES + (self.facts.remat == "full")

  @functools.cached_property
  def _mixed(self) -> float:
    """Traffic of products of two activations."""
    rows = self.rows * self.micro_batches
    return self._layer_passes * self.facts.mixed[0] * rows / self._widest

  def _activations(self, product: traced.Product) -> float:
    """Bytes of what a product reads and makes in a forward pass."""
    read, made = self._dims(product)
    entries = product.read / read + product.made / made
    return entries * self.rows * self.micro_batches * self._itemsize

  def _weights(self, product: traced.Product) -> float:
    """Bytes of a product's weights in the compute dtype, all layers, gathered."""
    split = {axis for axes in self.laid.params[product.path] for axis in axes}
    gathered = split & {"data", "fsdp"}
    return product.spec.size / self.laid.ways(split - gathered) * self._itemsize

  def _moved(self, product: traced.Product) -> tuple[float, float]:
    """Traffic of a product: of activations, and of weights."""
    passes = self._passes(product)
    weights = self._weights(product) * self.micro_batches
    return passes * self._activations(product), passes * weights

  @functools.cached_property
  def _beside(self) -> float:
    """Traffic beside products."""
    laid = self.laid
    activations = sum(self._moved(one)[0] for one in self.facts.products)
    state = laid.param_bytes + laid.state_bytes + laid.gradient_bytes
    return activations + self._mixed + 2 * state

  @functools.cached_property
  def _layer(self) -> float:
    """Working set of the layer that needs most."""
    stream = max((self._stream(one) for one in self.facts.products), default=0)
    mixed = _LIVE["mixed"] * self.facts.mixed[1] * self.rows / self._widest
    return stream + mixed + max(map(self._live, self._layers()), default=0.0)

  def _layers(self) -> Iterator[list[traced.Product]]:
    stacked = [one for one in self.facts.products if one.spec.stack]
    by_layer = lambda one: one.path.split("/")[:2]
    for _, products in itertools.groupby(stacked, by_layer):
      yield list(products)

  def _live(self, layer: list[traced.Product]) -> float:
    made = sum(one.made / one.layers / self._dims(one)[1] for one in layer)
    weights = sum(self._weights(one) / one.layers for one in layer)
    made *= self.rows * self._itemsize
    return _LIVE["made"] * made + _LIVE["weights"] * weights

  def _stream(self, product: traced.Product) -> int:
    """Bytes of the stream between layers in float32."""
    read, _ = product.dims
    if product.spec.axes[read] != "embed":
      return 0
    return self.rows * self.facts.steps.length * product.size(read) * _FLOAT32

  @functools.cached_property
  def _head(self) -> float:
    """Working set of the output head."""
    total = 0.0
    for one in self.facts.products:
      if not one.spec.stack:
        logits = self.rows * one.made / self._dims(one)[1]
        total += logits * (_FLOAT32 + self._itemsize)
        total += 2 * self._weights(one)
    return total
