"""The lowering that every dialect shares: rules that turn decisions into Q/DQ pairs, in place."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import onnx_ir as ir

from qcompile import decisions, graph, halves, numerics, opset, packing, spec
from qcompile.graph import Layer, Use
from qcompile.numerics import Grid, IntFormat
from qcompile.spec import TensorSpec

# On a node that keeps an activation to fewer levels than are stored: the bits of those levels.
NOMINAL_BITS = "qcompile.nominal_bits"
# Formats of activations that no kernel has: stored in 8 bits.
NARROW = tuple(f"int{bits}" for bits in range(7, 1, -1))


@dataclasses.dataclass(frozen=True)
class Rule:
    """One named step of a dialect. ``apply`` returns how often it acted; ``why`` is for people."""

    name: str
    apply: Callable[[Lowering], int]

    @property
    def why(self) -> str:
        """The first paragraph of the docstring of the rule."""
        return " ".join((self.apply.__doc__ or "").split("\n\n")[0].split())


def rules(*functions: Callable[[Lowering], int]) -> tuple[Rule, ...]:
    """Rules named after their functions: ``conv_output`` is ``conv-output``."""
    return tuple(Rule(f.__name__.replace("_", "-"), f) for f in functions)


@dataclasses.dataclass(frozen=True)
class Rounding:
    """How a dialect rounds an activation ``x``: ``middle`` plus ``x - middle`` on ``grid``.

    ``value`` names the value whose range both come from. With a range ``f`` times as wide the scale
    and ``middle`` are ``f`` times as large, and the zero point is the same.
    """

    value: str
    grid: Grid
    middle: float = 0.0

    def alike(self, other: Rounding) -> bool:
        """Whether both round to the same numbers."""
        one, two = self.grid, other.grid
        same = self.value == other.value and one.format == two.format
        return same and np.allclose(one.scale, two.scale, rtol=1e-6, atol=0.0)


@dataclasses.dataclass(frozen=True)
class Roundings:
    """Where a dialect rounds what the graph computes, by the names that the graph has.

    * ``uses``: by node and index of an input, what that one use reads.
    * ``values``: by value, what all its readers and the output of the graph see.
    * ``floats``: layers whose decisions the dialect takes back.
    """

    uses: Mapping[tuple[str, int], Rounding]
    values: Mapping[str, Rounding]
    floats: frozenset[str]


@dataclasses.dataclass(frozen=True)
class Kernels:
    """What the kernels of a runtime take on one machine, for rules that depend on it.

    * ``activations``: the format of 8-bit activations.
    * ``widest``: the most bits of a weight that an int8 activation is multiplied with.
    * ``alone``: the bits that weights with a float input may be stored in, in blocks.
    * ``clips_codes``: whether activations of fewer than 8 bits are kept to their levels as codes,
      behind their QuantizeLinear, or as values in front of it.
    * ``tables``: whether rows of packed tables are gathered.
    * ``nibbles``: whether there are types of 4 bits; without them codes are held in 8.
    * ``unpacks``: whether a file may hold codes packed, which the runtime unpacks (``packing``).
    * ``negative``: whether the scale of a block of a weight alone may be below zero.
    """

    activations: IntFormat = IntFormat(8, signed=False)  # noqa: RUF009 (frozen)
    widest: int = 8
    alone: tuple[int, ...] = (4, 8)
    clips_codes: bool = True
    tables: bool = True
    nibbles: bool = True
    unpacks: bool = False
    negative: bool = False


class Lowering:
    """A model on its way into a dialect: its layers as decided, and the Q/DQ pairs so far.

    The layers are listed once, because a layer whose weight comes out of a DequantizeLinear is no
    longer found by ``graph.layers``.
    """

    def __init__(self, model: ir.Model, kernels: Kernels | None = None) -> None:
        self.model = model
        self.kernels = kernels or Kernels()
        self.layers: list[Layer] = list(graph.layers(model))
        self.input_grids: dict[ir.Node, Grid] = {}
        self.weight_grids: dict[ir.Node, Grid] = {}
        self._pairs: dict[tuple[ir.Value, bytes], ir.Value] = {}
        self._grids: dict[ir.Value, Grid] = {}
        self._entries: dict[ir.Node, ir.Value] = {}  # from the first node of a pair to its output
        self._uses: dict[tuple[str, int], Rounding] = {}
        self._values: dict[str, Rounding] = {}
        self._floats: set[str] = set()
        self._stands_for: dict[ir.Value, tuple[ir.Value, float, float]] = {}

    def decided(self) -> Iterator[Layer]:
        """The layers with a decision on their weight or input."""
        for layer in self.layers:
            if layer.weight.spec is not None or (layer.input and layer.input.spec is not None):
                yield layer

    def keep_float(self, layer: Layer, reason: str) -> None:
        """Take back the decisions on ``layer`` and say why in its metadata."""
        self._floats.add(layer.name)
        spec.clear(layer.node)
        layer.node.metadata_props[graph.REASON] = reason

    def exclude(
        self, why: Callable[[Layer], str], types: Sequence[ir.DataType] = (ir.DataType.FLOAT,)
    ) -> int:
        """Keep float what no dialect holds, and what ``why`` gives a reason for; how many.

        ``types`` are those of the layers that the dialect quantizes.
        """
        count = 0
        for layer in list(self.decided()):
            reason = no_dialect_holds(self.model, layer, types) or why(layer)
            if reason:
                self.keep_float(layer, reason)
                count += 1
        self._fit_biases()
        return count

    def _fit_biases(self) -> None:
        """Give the layers that are quantized the biases that were fitted to that."""
        for layer in self.decided():
            name = spec.bias(layer.node)
            if name and layer.bias is not None and layer.weight.spec is not None:
                layer.bias.read_from(self.model.graph.initializers[name])

    def store_weights(self) -> int:
        """Replace every decided weight by its codes (8 bits beside a quantized input); how many."""
        count = 0
        for layer in self.decided():
            if layer.kind != "attention" and layer.weight.spec is not None:
                beside = layer.input is not None and layer.input.spec is not None
                self.weight(layer.weight, layer.weight.spec, wide=beside)
                count += 1
        return count

    def store_inputs(self, grid_for: Callable[[TensorSpec, tuple[float, float]], Grid]) -> int:
        """Put a pair in front of every activation with a static scale; how many.

        ``grid_for`` is given the decision and the range of the activation.
        """
        count = 0
        for layer in self.decided():
            uses = [layer.input, layer.weight] if layer.kind == "attention" else [layer.input]
            for use in uses:
                found = None if use is None else activation_range(self.model, use.value)
                if use is None or use.spec is None or found is None or not use.spec.range:
                    continue
                self.pair_for(use, grid_for(use.spec, found))
                self.input_grids[layer.node] = self._grids[use.value]
                count += 1
        return count

    def grid_of(self, value: ir.Value) -> Grid | None:
        """The grid that ``value``, the output of a DequantizeLinear of ours, lies on."""
        return self._grids.get(value)

    def weight(self, use: Use, decided: TensorSpec, wide: bool = False) -> Grid:
        """Replace the weight that ``use`` reads by codes and a DequantizeLinear; merge equal ones.

        ``wide`` stores codes of fewer bits in 8, which integer kernels want beside an int8 input.
        The scale has the type of the weight: a Cast behind it would keep it from being fused.
        """
        value = use.value
        grid = self.weight_grid(decided, value.dtype)
        key = (value, repr((decided, wide)).encode())
        if key not in self._pairs:
            wide = wide or not self.kernels.nibbles
            stored = IntFormat(8, grid.format.signed) if wide else grid.format
            codes = self.written(
                value, decided, stored.dtype, graph.shape_of(value) or (),
                lambda codes: numerics.pack(codes, stored, ""),
            )  # fmt: skip
            scale = self.model.graph.initializers[decided.scale]
            if halves.of(value.dtype):
                scale = self._scale(f"{decided.scale}/half", grid, value.dtype)
            self._pairs[key] = self._dequantize_weight(value, codes, grid, stored, scale)
            self._grids[self._pairs[key]] = grid
        use.read_from(self._pairs[key])
        self.weight_grids[use.node] = grid
        return grid

    def lies_on(self, value: ir.Value, grid: Grid | None) -> None:
        """Say that ``value``, the output of a DequantizeLinear of a rule, lies on ``grid``."""
        if grid is not None:
            self._grids[value] = grid

    def weight_grid(self, decided: TensorSpec, dtype: ir.DataType | None = None) -> Grid:
        """The grid of a weight of ``dtype``, in which its scale is stored."""
        return decisions.grid(self.model, decided, dtype)

    def codes(self, weight: ir.Value, decided: TensorSpec) -> numerics.Codes:
        """The codes of ``weight``, as fitted or else rounded to the nearest."""
        return decisions.codes(self.model, weight, decided)

    def written(
        self,
        weight: ir.Value,
        decided: TensorSpec,
        dtype: ir.DataType,
        shape: Sequence[int],
        pack: Callable[[numerics.Codes], ir.TensorProtocol],
    ) -> ir.TensorProtocol:
        """``pack`` of the codes of ``weight``; computed when it is written if that is in a file.

        The codes of a model larger than memory may be too large for it as well. ``dtype`` and
        ``shape`` are those of what ``pack`` returns.
        """
        if decided.codes or not isinstance(weight.const_value, ir.ExternalTensor):
            return pack(self.codes(weight, decided))
        tensor, grid = weight.const_value, self.weight_grid(decided, weight.dtype)

        def compute() -> ir.TensorProtocol:
            return pack(grid.quantize(graph.read_tensor(tensor).astype(np.float32, copy=False)))

        return ir.LazyTensor(compute, dtype, ir.Shape(shape))

    def _dequantize_weight(
        self,
        value: ir.Value,
        codes: ir.TensorProtocol,
        grid: Grid,
        stored: IntFormat,
        scale: ir.Value,
    ) -> ir.Value:
        name = value.name or "weight"
        inputs = [
            graph.add_constant(self.model, f"{name}/codes", codes),
            scale,
            self._zero_point(name, grid, stored),
        ]
        attributes: dict[str, int] = {}
        if grid.axis is not None:
            attributes["axis"] = grid.axis
        if grid.block is not None:
            attributes["block_size"] = grid.block
        dequantized = graph.insert(
            self.model, "DequantizeLinear", inputs, attributes,
            output=f"{name}/dequantized", like=value,
        )  # fmt: skip
        held, count = stored.dtype.bitwidth, math.prod(graph.shape_of(value) or ())
        bits = packing.bits_of(grid.format, held, count) if self.kernels.unpacks else held
        node = dequantized.producer()
        if bits < held and node is not None:
            node.metadata_props[packing.BITS] = str(bits)
        return dequantized

    def _scale(self, name: str, grid: Grid, dtype: ir.DataType | None) -> ir.Value:
        kind = dtype or ir.DataType.FLOAT
        scale: graph.Array = grid.scale.astype(kind.numpy())
        return graph.add_constant(self.model, name, ir.Tensor(scale, dtype=kind))

    def _zero_point(self, name: str, grid: Grid, stored: IntFormat) -> ir.Value:
        # Written even when it is 0: without it the type of the codes is lost in some rewrites.
        packed = numerics.pack(grid.zero_point, stored, "")
        return graph.add_constant(self.model, f"{name}/zero_point", packed)

    def bias(self, use: Use, codes: numerics.Codes, scale: numerics.Floats) -> None:
        """Make ``use`` read int32 ``codes`` [C] with ``scale`` [C] through a DequantizeLinear."""
        name = use.value.name or "bias"
        inputs = [
            graph.add_constant(self.model, f"{name}/codes", codes.astype(np.int32)),
            graph.add_constant(self.model, f"{name}/scale", scale),
            graph.add_constant(self.model, f"{name}/zero_point", np.zeros(scale.shape, np.int32)),
        ]
        like = ir.Value(type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(codes.shape))
        use.read_from(
            graph.insert(
                self.model, "DequantizeLinear", inputs, {"axis": 0},
                output=f"{name}/dequantized", like=like,
            )
        )  # fmt: skip

    def pair(self, value: ir.Value, grid: Grid) -> ir.Value:
        """``value`` through QuantizeLinear and DequantizeLinear on ``grid``; one pair a grid.

        The scale has the type of ``value``, and the grid is that of the scale in that type. Grids
        of fewer than 8 bits, which no kernel has, are stored in 8: a Clip keeps the codes to them.
        """
        grid = decisions.in_type(grid, value.dtype)
        key = (value, _key(grid).encode())
        if key not in self._pairs:
            name = value.name or "value"
            stored = self._stored(grid)
            narrow, of_codes = stored is not grid, self.kernels.clips_codes
            scale = self._scale(f"{name}/scale", grid, value.dtype)
            zero = self._zero_point(name, stored, stored.format)
            entered = value
            if narrow and not of_codes:
                entered = self._clip(value, grid, value.dtype, grid.zero_point, grid.scale)
            kind = ir.Value(type=ir.TensorType(stored.format.dtype), shape=value.shape)
            codes = graph.insert(
                self.model, "QuantizeLinear", [entered, scale, zero],
                output=f"{name}/quantized", behind=entered, like=kind,
            )  # fmt: skip
            first = (codes if entered is value else entered).producer()
            if narrow and of_codes:
                shift = grid.zero_point - stored.zero_point
                codes = self._clip(codes, grid, stored.format.dtype, shift)
            self._pairs[key] = graph.insert(
                self.model, "DequantizeLinear", [codes, scale, zero],
                output=f"{name}/dequantized", behind=codes, like=value,
            )  # fmt: skip
            self._grids[self._pairs[key]] = grid
            assert first is not None
            self._entries[first] = self._pairs[key]
        return self._pairs[key]

    def _stored(self, grid: Grid) -> Grid:
        """``grid`` with its codes as they are stored.

        Codes that are clipped are the lowest ones, so that a ReLU is absorbed all the same. Where
        values are, zero has code 0.
        """
        form = self.kernels.activations
        if grid.format.bits >= form.bits:
            return grid
        lowest = grid.zero_point + (form.low - grid.format.low)
        zero = lowest if self.kernels.clips_codes else np.zeros_like(grid.zero_point)
        return dataclasses.replace(grid, format=form, zero_point=zero)

    def _clip(
        self,
        value: ir.Value,
        grid: Grid,
        dtype: ir.DataType | None,
        shift: numerics.Codes,
        scale: float | numerics.Floats = 1,
    ) -> ir.Value:
        """``value`` kept to ``(q - shift) * scale`` of the codes ``q`` of ``grid``."""
        kind = dtype or ir.DataType.FLOAT
        bounds: list[ir.Value] = []
        for what, end in (("lowest", grid.format.low), ("highest", grid.format.high)):
            array: graph.Array = np.asarray((end - shift) * scale).astype(kind.numpy())
            tensor = ir.Tensor(array, dtype=kind)
            bounds.append(graph.add_constant(self.model, f"{value.name}/{what}", tensor))
        clipped = graph.insert(
            self.model, "Clip", [value, *bounds],
            output=f"{value.name}/clipped", behind=value, like=value,
        )  # fmt: skip
        node = clipped.producer()
        assert node is not None
        node.metadata_props[NOMINAL_BITS] = str(grid.format.bits)
        return clipped

    def asked(self, value: ir.Value) -> list[Grid | None]:
        """The different grids of the pairs through which ``value`` is read; None for other readers.

        What only moves elements may stand in front of a pair.
        """
        found: dict[str, Grid | None] = {"": None} if value.is_graph_output() else {}
        for node, _ in value.uses():
            pair = self._entries.get(node)
            if pair is None and node.op_type in MOVES:
                grids = self.asked(node.outputs[0])
            else:
                grids = [None if pair is None else self._grids[pair]]
            found |= {"" if grid is None else _key(grid): grid for grid in grids}
        return list(found.values())

    def stands_for(
        self, new: ir.Value, old: ir.Value, middle: float = 0.0, factor: float = 1.0
    ) -> None:
        """Say that ``new``, a value of a rule, is ``(old - middle) * factor``."""
        self._stands_for[new] = old, middle, factor

    def _rounding(self, value: ir.Value, grid: Grid) -> Rounding:
        """How a pair on ``grid`` behind ``value`` rounds what the graph had there."""
        value, middle, factor = self._stands_for.get(value, (value, 0.0, 1.0))
        scale = (grid.scale / np.float32(abs(factor))).astype(np.float32)
        owner = range_owner(self.model, value)
        name = (value if owner is None else owner).name or ""
        return Rounding(name, dataclasses.replace(grid, scale=scale), middle)

    def roundings(self) -> Roundings:
        """Where the rules so far round activations."""
        return Roundings(self._uses, self._values, frozenset(self._floats))

    def pair_for(self, use: Use, grid: Grid) -> None:
        """Make ``use`` read what it reads through a pair."""
        self._uses[use.node.name or "", use.index] = self._rounding(use.value, grid)
        use.read_from(self.pair(use.value, grid))

    def pair_for_all(self, value: ir.Value, grid: Grid) -> None:
        """Make every reader of ``value``, and the graph output that it may be, read the pair."""
        if value.name:
            self._values[value.name] = self._rounding(value, grid)
        dequantized = self.pair(value, grid)
        graph.redirect(
            self.model, value, dequantized,
            keep=lambda use: self._entries.get(use.node) is dequantized,
        )  # fmt: skip

    def finish(self, newest_opset: int) -> None:
        """Name the nodes for the proof, drop what decisions left, raise the opset if needed."""
        taken: dict[str, int] = {}
        for node in self.model.graph:
            spec.clear(node)
            ids = "+".join(graph.origins(node))
            if ids:
                node.name = f"{ids}#{taken.get(ids, 0)}"
                taken[ids] = taken.get(ids, 0) + 1
        graph.clear_ranges(self.model)
        graph.remove_dead(self.model)
        small = {ir.DataType.INT4, ir.DataType.UINT4, ir.DataType.INT16, ir.DataType.UINT16}
        dtypes = {v.dtype for v in self.model.graph.initializers.values()}
        blocks = any("block_size" in node.attributes for node in self.model.graph)
        needed = 21 if dtypes & small or blocks else self._floor()
        opset.raise_to(self.model, needed, newest_opset)
        opset.lower_format(self.model, newest_opset)

    def _floor(self) -> int:
        """The opset that scales in half floats need, if there are any."""
        pairs = (n for n in self.model.graph if n.op_type == "DequantizeLinear")
        return 19 if any(n.inputs[1] and halves.of(n.inputs[1].dtype) for n in pairs) else 0


def _key(grid: Grid) -> str:
    """Equal for equal grids of an activation."""
    return repr((grid.format, grid.scale.tobytes(), grid.zero_point.tobytes()))


def affine(form: IntFormat, found: tuple[float, float], symmetric: bool = False) -> Grid:
    """The grid of ``form`` for a range; zero is its lowest code where nothing is negative.

    ``symmetric`` gives both signs as many codes, whatever the range: zero is the middle code.
    """
    if not symmetric:
        return Grid(form, *numerics.affine(*found, form, symmetric=False))
    signed = IntFormat(form.bits, signed=True)
    scale, zero = numerics.affine(*found, signed, symmetric=True)
    return Grid(form, scale, zero + (form.low - signed.low))


def activation_range(model: ir.Model, value: ir.Value) -> tuple[float, float] | None:
    """The range of ``value``; behind operators that only move elements, that of what they move.

    A value and its moved copy then share one grid, and the runtime can move the integers.
    """
    owner = range_owner(model, value)
    return None if owner is None else graph.range_of(model, owner)


def range_owner(model: ir.Model, value: ir.Value) -> ir.Value | None:
    """The value whose range is that of ``value``, see ``activation_range``; None without one."""
    node = value.producer()
    while node is not None and node.op_type in MOVES and node.inputs[0] is not None:
        if graph.range_of(model, node.inputs[0]) is None:
            break
        value = node.inputs[0]
        node = value.producer()
    return None if graph.range_of(model, value) is None else value


MOVES = frozenset(["MaxPool", "Reshape", "Flatten", "Transpose", "Squeeze", "Unsqueeze"])


NO_RECURRENT = "a recurrent layer has no quantized form here yet"


def no_dialect_holds(model: ir.Model, layer: Layer, types: Sequence[ir.DataType]) -> str:
    """Why no dialect of Q/DQ pairs runs ``layer`` in integers; "" if nothing stands against it.

    ``types`` are those of the layers that the dialect asks for.
    """
    uses = [use for use in (layer.input, layer.weight) if use is not None]
    for use in uses:
        if use.value.dtype not in (*types, None):
            known = " and ".join(_called(t) for t in types)
            return f"a layer of {_called(use.value.dtype)}: Q/DQ pairs are for {known} only"
    entered, decided = layer.input.spec if layer.input else None, layer.weight.spec
    if layer.kind == "recurrent":
        return NO_RECURRENT
    if layer.kind == "attention" and (entered is None or decided is None):
        return "a product of two activations needs both of them quantized"
    if decided is None:
        return "a quantized input needs a quantized weight"
    if entered is not None and decided.block is not None:
        return "no kernel multiplies a quantized input with weights that have a scale a block"
    for use in uses:
        if use.spec and use.spec.range and activation_range(model, use.value) is None:
            return f"no range for {use.value.name!r}: calibrate it"
    return ""


def _called(dtype: ir.DataType) -> str:
    return {ir.DataType.FLOAT: "float32"}.get(dtype, dtype.name.lower())
