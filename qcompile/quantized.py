"""A decided model as a torch function: what its target rounds, and what fits have found so far."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import torch
from torch import Tensor

from qcompile import decisions, graph, numerics, rounding, spec
from qcompile.backends.base import Target
from qcompile.backends.lowering import Rounding, Roundings
from qcompile.blocks import Block
from qcompile.graph import Layer
from qcompile.numerics import Codes, Floats, Grid, IntFormat

Map = Callable[[Tensor], Tensor]
# By node and index of an input, and by value: what TorchGraph takes.
Maps = tuple[dict[tuple[str, int], Map], dict[str, Map]]
# Gives some of the elements of what was rounded, the second, back to what it was, the first.
Spare = Callable[[Tensor, Tensor], Tensor]
# A weight with its decision: value, and name of its scale.
Key = tuple[str, str]


# Codes of fewer bits, stored in 8 beside a quantized input.
WIDE = IntFormat(8, signed=True)
# What a gain changes.
Of = Literal["output", "weight"]


@dataclasses.dataclass(frozen=True)
class Gain:
    """``factor * y + shift`` in place of ``y``; one number, or one a channel.

    ``y`` is what a layer writes, or, with ``of="weight"``, its rounded weight.
    """

    factor: Tensor
    shift: Tensor
    of: Of = "output"

    def along(self, axis: int) -> Map:
        """As a function of ``y`` with its channels along ``axis``."""

        def change(y: Tensor) -> Tensor:
            sizes = [1] * y.dim()
            sizes[axis] = -1
            return y * self.factor.reshape(sizes) + self.shift.reshape(sizes)

        return change


class Quantized:
    """A decided model as a target rounds it, and what fits have found so far.

    ``codes`` are those of weights by key, ``scales`` other ones than were decided, of each element
    of such weights, ``biases`` those of layers by name, ``factors`` what ranges are to be
    multiplied with, by the value that owns the range, and ``gains`` what each layer writes, or its
    weight, is to be changed with, by its name.

    A weight with a gain of its own lies on as many levels as before, of 8 bits: the shift is no
    whole number of its steps. ``grid`` and ``codes_of`` are then those of 8 bits.
    """

    def __init__(self, model: ir.Model, target: Target, device: str = "cpu") -> None:
        self.model = model
        self.device = device
        self.roundings: Roundings = target.roundings(model)
        self.codes: dict[Key, Codes] = {}
        self.scales: dict[Key, Floats] = {}
        self.factors: dict[str, float] = {}
        self.biases: dict[str, npt.NDArray[Any]] = {}
        self.gains: dict[str, Gain] = {}
        self._read: dict[tuple[str, int], str] = {
            (node.name or "", index): value.name or ""
            for node in model.graph
            for index, value in enumerate(node.inputs)
            if value is not None
        }

    def layers(self, block: Block) -> list[Layer]:
        """The layers of ``block`` whose weights the target stores in codes."""
        return [
            layer
            for layer in block.layers
            if layer.weight.spec is not None
            and layer.kind != "attention"
            and layer.name not in self.roundings.floats
        ]

    def key(self, layer: Layer) -> Key:
        """By which the codes of a weight are kept; layers that share weight and grid share them."""
        assert layer.weight.spec is not None
        return layer.weight.value.name or "", layer.weight.spec.scale

    def codes_of(self, layer: Layer) -> Codes:
        """The codes of the weight of ``layer``: fitted here, before, or rounded to the nearest."""
        wide = self._wide(layer)
        return self._codes(layer) if wide is None else wide[1]

    def _codes(self, layer: Layer) -> Codes:
        found = self.codes.get(self.key(layer))
        if found is not None:
            return found
        assert layer.weight.spec is not None
        return decisions.codes(self.model, layer.weight.value, layer.weight.spec)

    def bias(self, layer: Layer) -> npt.NDArray[Any] | None:
        """The bias of ``layer``: fitted here, before, or as in float; None without one."""
        found = self.biases.get(layer.name)
        return decisions.bias(self.model, layer) if found is None else found

    def grid(self, layer: Layer) -> Grid:
        """The grid of the weight of ``layer``, its scale fitted here or as decided."""
        wide = self._wide(layer)
        return self._grid(layer) if wide is None else wide[0]

    def _grid(self, layer: Layer) -> Grid:
        decided, dtype = layer.weight.spec, layer.weight.value.dtype
        assert decided is not None
        grid, scale = decisions.grid(self.model, decided, dtype), self.scales.get(self.key(layer))
        return grid if scale is None else decisions.in_type(grid.rescaled(scale), dtype)

    def _wide(self, layer: Layer) -> tuple[Grid, Codes] | None:
        """Grid and codes of 8 bits of the weight of ``layer`` with its gain; None without one."""
        gain, decided = self.gains.get(layer.name), layer.weight.spec
        if gain is None or gain.of != "weight" or decided is None:
            return None
        rounded = rounding.tensor(self._grid(layer).dequantize(self._codes(layer)), self.device)
        changed = gain.along(layer.channel_axis)(rounded).detach().cpu().numpy()
        grid = numerics.weight_grid(changed, WIDE, decided.axis)
        grid = decisions.in_type(grid, layer.weight.value.dtype)
        return grid, grid.quantize(changed)

    def weight(self, layer: Layer) -> rounding.Weight:
        """The weight of ``layer`` with logits to fit."""
        array = graph.finite_weight(layer).astype(np.float32, copy=False)
        grid = self.grid(layer)
        scale, _ = grid.each(array.shape)
        low, high = grid.format.low, grid.format.high
        return rounding.Weight(array, scale, self.codes_of(layer), low, high, self.device)

    def scaled(self, layer: Layer) -> rounding.Scaled:
        """The weight of ``layer`` with scales to learn."""
        return rounding.Scaled(self.grid(layer), self.codes_of(layer), self.device)

    def owners(self, block: Block) -> list[str]:
        """The values that own the ranges of what is rounded in ``block``."""
        names = [r.value for place, r in self.roundings.uses.items() if place[0] in _names(block)]
        written = {v.name for node in block.nodes for v in node.outputs}
        names += [r.value for name, r in self.roundings.values.items() if name in written]
        return list(dict.fromkeys(names))

    def maps(
        self,
        block: Block,
        weights: Mapping[Key, Callable[[], Tensor]] | None = None,
        factors: Mapping[str, Tensor] | None = None,
        spare: Spare | None = None,
        gains: Mapping[str, Gain] | None = None,
    ) -> Maps:
        """What rounds in ``block``: at uses, and behind values (see TorchGraph).

        ``weights``, ``factors`` (logarithms) and ``gains`` stand for what is being fitted;
        ``spare(x, y)`` gives some of the elements of rounded ``y`` back to ``x``.
        """
        at: dict[tuple[str, int], Map] = {}
        after: dict[str, Map] = {}
        for layer in self.layers(block):
            place = (layer.weight.node.name or "", layer.weight.index)
            soft = (weights or {}).get(self.key(layer))
            learned = (gains or {}).get(layer.name)
            at[place] = _given(self._hard(layer) if soft is None else soft)
            if learned is not None and learned.of == "weight":
                at[place] = _both(at[place], learned.along(layer.channel_axis))
            bias = self.bias(layer)
            if layer.bias is not None and bias is not None:
                tensor = rounding.tensor(bias, self.device)
                at[layer.bias.node.name or "", layer.bias.index] = _given(_always(tensor))
        for place, found in self.roundings.uses.items():
            if place[0] in _names(block) and place not in at:
                behind = self.roundings.values.get(self._read[place])
                if behind is None or not behind.alike(found):
                    at[place] = self._activation(found, factors, spare)
        for layer in self.layers(block):
            gain = (gains or {}).get(layer.name) or self.gains.get(layer.name)
            if gain is not None and gain.of == "output":
                axis = 1 if layer.kind in ("conv", "depthwise", "conv-transpose") else -1
                after[layer.biased_output.name or ""] = gain.along(axis)
        written = {v.name for node in block.nodes for v in node.outputs}
        for name, found in self.roundings.values.items():
            if name in written:
                rounded = self._activation(found, factors, spare)
                after[name] = _both(after[name], rounded) if name in after else rounded
        return at, after

    def drop(self, codes: Iterable[Key], factors: Iterable[str]) -> None:
        """Forget what was found for these weights and ranges."""
        for key in codes:
            del self.codes[key]
            self.scales.pop(key, None)
        for value in factors:
            del self.factors[value]

    def write(self) -> None:
        """Write the codes and ranges that were found into the model."""
        shared: dict[Key, list[Layer]] = {}
        for layer in graph.layers(self.model):
            if layer.weight.spec is not None:
                shared.setdefault(self.key(layer), []).append(layer)
        for key, layers in shared.items():
            # Read first: a fitted bias goes when other decisions are written.
            found = [(layer, self.bias(layer), self._is_fitted(layer)) for layer in layers]
            if key in self.codes or any(layer.name in self.gains for layer in layers):
                grid, codes = self.grid(layers[0]), self.codes_of(layers[0])
                if key in self.scales or self._wide(layers[0]) is not None:
                    decisions.write_grid(self.model, layers, grid)
                decisions.write_codes(self.model, layers, codes)
            for layer, bias, fitted in found:
                gain = self.gains.get(layer.name)
                if gain is not None and gain.of == "output":
                    bias = self._fold(layer, gain, bias)
                if fitted and bias is not None:
                    decisions.write_bias(self.model, layer, bias)
        for value in graph.values(self.model):
            found = graph.range_of(self.model, value)
            factor = self.factors.get(value.name or "", 1.0)
            if found is not None and factor != 1.0:
                graph.set_range(self.model, value, found[0] * factor, found[1] * factor)
        graph.remove_dead(self.model)

    def _is_fitted(self, layer: Layer) -> bool:
        """Whether the bias of ``layer`` is another than in float."""
        gain = self.gains.get(layer.name)
        moved = gain is not None and gain.of == "output"
        return moved or layer.name in self.biases or bool(spec.bias(layer.node))

    def _fold(
        self, layer: Layer, gain: Gain, bias: npt.NDArray[Any] | None
    ) -> npt.NDArray[Any] | None:
        """Put ``gain`` into the scale of the weight, and return what ``bias`` becomes."""
        decided = layer.weight.spec
        assert decided is not None
        factor = gain.factor.detach().cpu().numpy()
        scale = graph.constant(self.model.graph.initializers[decided.scale])
        if factor.size > 1 and decided.block is not None:
            factor = np.moveaxis(factor[(...,) + (None,) * (scale.ndim - 1)], 0, layer.channel_axis)
        scaled = graph.add_constant(self.model, decided.scale, (scale * factor).astype(scale.dtype))
        layer.weight.decide(dataclasses.replace(decided, scale=scaled.name or ""))
        if bias is None:
            return None
        shape = (*bias.shape[:-1], -1)
        moved = bias * factor.reshape(shape) + gain.shift.detach().cpu().numpy().reshape(shape)
        return moved.astype(bias.dtype)

    def gainable(self, layer: Layer, of: Of = "output") -> bool:
        """Whether a gain of ``layer``, of what it writes or of its weight, can be folded."""
        alone = len(graph.readers(layer.weight.value)) == 1
        if not alone or layer.kind not in ("conv", "depthwise", "linear"):
            return False
        if of == "weight":
            decided, entered = layer.weight.spec, layer.input and layer.input.spec
            assert decided is not None
            narrow = numerics.parse_format(decided.format).bits < WIDE.bits
            return narrow and decided.block is None and entered is not None
        known = layer.bias is not None and graph.is_constant(layer.bias.value)
        scaled = any(graph.attribute(layer.node, name, 1.0) != 1.0 for name in ("alpha", "beta"))
        return known and not scaled

    def _hard(self, layer: Layer) -> Callable[[], Tensor]:
        found = rounding.tensor(self.grid(layer).dequantize(self.codes_of(layer)), self.device)
        return lambda: found

    def _activation(
        self,
        found: Rounding,
        factors: Mapping[str, Tensor] | None,
        spare: Spare | None,
    ) -> Map:
        log = (factors or {}).get(found.value)
        if log is None:
            log = torch.tensor(float(np.log(self.factors.get(found.value, 1.0))))
        rounded = rounding.Activation(found.grid, found.middle, log.to(self.device))
        return rounded if spare is None else lambda x: spare(x, rounded(x))


def _both(first: Map, second: Map) -> Map:
    return lambda x: second(first(x))


def _always(tensor: Tensor) -> Callable[[], Tensor]:
    return lambda: tensor


def _names(block: Block) -> frozenset[str]:
    return frozenset(node.name or "" for node in block.nodes)


def _given(make: Callable[[], Tensor]) -> Map:
    return lambda _: make()
