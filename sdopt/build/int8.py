"""Let linear layers and convolutions multiply int8: QuantizeLinear and DequantizeLinear around them.

    x --Quantize(scale)--> int8 --Dequantize--> \\
                                                 MatMul or Conv --> y
    W as int8, one scale for each output channel --Dequantize--> /

The graph stays standard ONNX. ONNX Runtime, OpenVINO and TensorRT recognise the pair in front of a product and compute
the product in int8. What is not quantized stays as it is. Scales are symmetric (zero point 0), which all of them take;
on a CPU, a convolution behind a SiLU has a zero point, because its input is hardly ever negative.

A linear layer whose input has a few large channels may have factors: the input is divided by them, the rows of the
weight are multiplied (Xiao et al. 2022, SmoothQuant, arXiv:2211.10438, eq. 3). Behind a LayerNormalization the division
goes into its scale and bias and costs nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir

from sdopt.bundle.specs import Array, Float32
from sdopt.dataclass import dataclass
from sdopt.graph import F32, Writer, attribute, constant_of, drop_unused, name_of

LARGEST = {"int8": 127.0, "fp8": 448.0}  # int8 from -127 to 127: symmetric, as TensorRT wants it
SEVEN_BITS = 63.0  # 255 * 63 + 255 * 63 is the largest sum of two products below 2 ** 15
EDGE_CHANNELS = 16  # a convolution from or to so few channels makes latents or pixels: it stays as it is
INT8, UINT8, FP8 = ir.DataType.INT8, ir.DataType.UINT8, ir.DataType.FLOAT8E4M3FN


@dataclass(frozen=True)
class Arithmetic:
    """What a target multiplies in 8 bits. `kind`: "int8" or "fp8". `unsigned`: convolutions may take uint8.

    `largest_weight`: what the largest weight of each output channel becomes. `SEVEN_BITS` is for processors that keep
    the sum of two products in 16 bits, where a larger sum becomes the largest one.
    """

    kind: str = "int8"
    unsigned: bool = False
    largest_weight: float = LARGEST["int8"]


FP8_PRODUCTS = Arithmetic("fp8", largest_weight=LARGEST["fp8"])


@dataclass(frozen=True, eq=False)
class Scaling:
    """How the input of one layer becomes int8: divided by `factors` [channels], if there are any, then by `scale`.

    With a `zero` above 0 it becomes uint8, and `zero` is what 0 becomes. `kind`: "int8", or "fp8" for float8 e4m3
    (Micikevicius et al. 2022, arXiv:2209.05433). `shift` [outputs]: the mean error of the
    output, which its bias takes back (Nagel et al. 2019, arXiv:1906.04721, section 4.2). `largest_weight`: see
    `Arithmetic`.
    """

    scale: float
    factors: Float32 | None = None
    zero: int = 0
    shift: Float32 | None = None
    kind: str = "int8"
    largest_weight: float = LARGEST["int8"]


@dataclass(frozen=True, eq=False)
class Layer:
    """A layer that can be quantized: its node, and the name of its weight."""

    node: ir.Node
    weight: str

    @property
    def input(self) -> ir.Value:
        """What it multiplies with its weight."""
        value = self.node.inputs[0]
        assert value is not None
        return value

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of its weight."""
        weight = _weight(self.node.inputs[1])
        assert weight is not None
        assert weight.shape is not None
        return tuple(int(length) for length in weight.shape if isinstance(length, int))

    @property
    def numbers(self) -> Float32:
        """Its weight: [inputs, outputs] of a linear layer, [outputs, inputs, height, width] of a convolution."""
        array = _constant(self.node.inputs[1])
        assert array is not None
        return array.astype(np.float32)

    @property
    def bias(self) -> tuple[ir.Node, int] | None:
        """The node that adds a bias to its output, and which input of that node the bias is; None without one."""
        if self.is_conv:
            has_bias = len(self.node.inputs) > 2 and _weight(self.node.inputs[2]) is not None
            return (self.node, 2) if has_bias else None
        uses = tuple(self.node.outputs[0].uses())
        if len(uses) != 1 or uses[0][0].op_type != "Add":
            return None
        other = 1 - uses[0][1]
        return (uses[0][0], other) if _weight(uses[0][0].inputs[other]) is not None else None

    @property
    def is_conv(self) -> bool:
        return self.node.op_type == "Conv"


def layers_of(model: ir.Model) -> list[Layer]:
    """The layers of a graph that can be quantized, in its order."""
    layers: list[Layer] = []
    for node in model.graph:
        weight = _weight(node.inputs[1]) if node.op_type in ("MatMul", "Conv") else None
        if weight is None or weight.shape is None:
            continue
        shape = [int(length) for length in weight.shape if isinstance(length, int)]
        is_edge = node.op_type == "Conv" and min(shape[:2]) <= EDGE_CHANNELS
        grouped = attribute(node, "group", 1) != 1
        if len(shape) == (4 if node.op_type == "Conv" else 2) and not is_edge and not grouped:
            layers.append(Layer(node, name_of(weight)))
    return layers


def int8(model: ir.Model, scalings: Mapping[str, Scaling]) -> int:
    """Quantize in place the layers whose weights `scalings` names; return how many there were.

    Layers that read the same tensor and have equal scalings share its int8 form.
    """
    groups: dict[tuple[ir.Value, float, int, bytes], list[Layer]] = {}
    for layer in layers_of(model):
        scaling = scalings.get(layer.weight)
        if scaling is not None:
            factors = b"" if scaling.factors is None else scaling.factors.tobytes()
            groups.setdefault((layer.input, scaling.scale, scaling.zero, factors), []).append(layer)
    for layers in groups.values():
        scaling = scalings[layers[0].weight]
        source = layers[0].input
        if scaling.factors is not None:
            source = divided(model, source, scaling.factors, layers)
        quantized = _quantized(model, source, scaling, layers[0].weight)
        for layer in layers:
            _quantize_weight(model, layer, scaling)
            _take_back(model, layer, scalings[layer.weight].shift)
            layer.node.replace_input_with(0, quantized)
    drop_unused(model)
    return sum(map(len, groups.values()))


def rounded(array: Float32, scale: Float32 | float, zero: int = 0, kind: str = "int8") -> Float32:
    """What is left of an array in int8 or fp8 with this scale, or in uint8 with this zero point."""
    if zero:
        return ((np.clip(np.rint(array / scale) + zero, 0, 255) - zero) * scale).astype(np.float32)
    return (short_numbers(array / scale, kind).astype(np.float32) * scale).astype(np.float32)


def short_numbers(scaled: Float32, kind: str) -> Array:
    """Numbers that were divided by their scale, in 8 bits; what is too large becomes the largest."""
    largest = LARGEST[kind]
    clipped = np.clip(scaled, -largest, largest)
    return clipped.astype(FP8.numpy()) if kind == "fp8" else np.rint(clipped).astype(np.int8)


def weight_scale(weight: Float32, is_conv: bool, largest_weight: float = LARGEST["int8"]) -> Float32:
    """The scale of each output channel, in the weight's own rank so that it divides."""
    axes = (1, 2, 3) if is_conv else (0,)
    largest = np.abs(weight).max(axes, keepdims=True)
    return np.maximum(largest / largest_weight, np.finfo(np.float32).tiny).astype(np.float32)


def smoothed(weight: Float32, factors: Float32, is_conv: bool) -> Float32:
    """A weight whose input is divided by these factors."""
    return weight * (factors[None, :, None, None] if is_conv else factors[:, None])


def norm_before(value: ir.Value, readers: Sequence[ir.Node]) -> ir.Node | None:
    """The LayerNormalization whose output `value` is, if nothing but `readers` reads it; a Cast may lie between."""
    wanted = set(readers)
    while {user for user, _ in value.uses()} <= wanted:
        maker = value.producer()
        if maker is None or value.is_graph_output():
            return None
        if maker.op_type == "LayerNormalization":
            return maker
        if maker.op_type != "Cast" or maker.inputs[0] is None:
            return None
        value, wanted = maker.inputs[0], {maker}
    return None


def divided(model: ir.Model, value: ir.Value, factors: Float32, layers: Sequence[Layer]) -> ir.Value:
    """`value` divided by the factors of its channels: inside of the norm that makes it, or by a product of its own."""
    norm = norm_before(value, [layer.node for layer in layers])
    if norm is not None:
        write = Writer(model, f"{name_of(norm)}/int8/", before=norm)
        for index, name in ((1, "scale"), (2, "bias")):
            old = norm.inputs[index] if index < len(norm.inputs) else None
            array = _constant(old)
            if old is not None and array is not None and old.dtype is not None:
                norm.replace_input_with(index, write.constant(name, array / factors, old.dtype))
        return value
    write = Writer(model, f"{layers[0].weight}/int8/", before=layers[0].node)
    shape = (-1, 1, 1) if layers[0].is_conv else (-1,)
    assert value.dtype is not None
    inverse = write.constant("inverse_factors", (1 / factors).reshape(shape), value.dtype)
    return write("Mul", [value, inverse], "divided")


def _quantized(model: ir.Model, value: ir.Value, scaling: Scaling, name: str) -> ir.Value:
    """The value as it is after int8."""
    maker = value.producer()
    write = Writer(model, f"{name}/int8/", after=maker, before=None if maker else next(iter(model.graph)))
    dtype = value.dtype or F32
    short_type = UINT8 if scaling.zero else FP8 if scaling.kind == "fp8" else INT8
    size, zero = write.constant("input_scale", scaling.scale, dtype), write.constant("zero", scaling.zero, short_type)
    short = write("QuantizeLinear", [value, size, zero], "quantized", dtype=short_type)
    return write("DequantizeLinear", [short, size, zero], "input", dtype=dtype)


def _quantize_weight(model: ir.Model, layer: Layer, scaling: Scaling) -> None:
    weight, is_conv, kind = layer.numbers, layer.is_conv, scaling.kind
    if scaling.factors is not None:
        weight = smoothed(weight, scaling.factors, is_conv)
    scale = weight_scale(weight, is_conv, scaling.largest_weight)
    short_type = FP8 if kind == "fp8" else INT8
    old = layer.node.inputs[1]
    assert old is not None
    dtype = old.dtype or F32
    write = Writer(model, f"{layer.weight}/int8/", before=layer.node)
    numbers = write.constant("weight", short_numbers(weight / scale, kind), short_type)
    sizes = write.constant("weight_scale", scale.reshape(-1), dtype)
    zeros = write.constant("weight_zero", np.zeros(scale.size), short_type)
    axis = 0 if is_conv else 1
    wide = write("DequantizeLinear", [numbers, sizes, zeros], "weight", dtype=dtype, axis=axis)
    layer.node.replace_input_with(1, wide)


def _take_back(model: ir.Model, layer: Layer, shift: Float32 | None) -> None:
    """Let the bias of a layer take back the mean error of its output."""
    bias = layer.bias
    if bias is None or shift is None:
        return
    node, index = bias
    old = node.inputs[index]
    numbers = _constant(old)
    assert old is not None
    assert numbers is not None
    write = Writer(model, f"{layer.weight}/int8/", before=node)
    node.replace_input_with(index, write.constant("bias", numbers - shift, old.dtype or F32))


def _weight(value: ir.Value | None) -> ir.Value | None:
    """The initializer that a value is, or is cast from."""
    while value is not None and value.const_value is None:
        maker = value.producer()
        if maker is None or maker.op_type != "Cast":
            return None
        value = maker.inputs[0]
    return value


def _constant(value: ir.Value | None) -> Array | None:
    """The numbers of a constant, also of one that is cast."""
    return constant_of(_weight(value))
