"""Give a UNet inputs for image prompts: a second attention beside each cross-attention, over tokens of pictures.

| input                                      | what it is                                                              |
|--------------------------------------------|-------------------------------------------------------------------------|
| image_keys, image_values                   | those of all cross-attentions, side by side                             |
| [batch, adapters, image_tokens, features]  |                                                                         |
| image_mask [batch, adapters, image_tokens] | is added to the logits: 0, or -30000 where there is no token            |
| image_scales [batch, adapters, layers]     | how strong each adapter is in each cross-attention                      |

    attention(q, k, v) + sum over adapters of scale * attention(q, image_key, image_value)

The keys and values depend on the picture alone, so they are computed once for all steps. They come in the order in
which IP-Adapters number them: downward path, upward path, middle. The new graph also has the inputs for residuals of
`sdopt.graph.control`, and reads the same weights.
Ref: Ye et al. 2023, arXiv:2308.06721, section 3.2.2, eq. 5.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import onnx_ir as ir

from sdopt.bundle.specs import TensorSpec
from sdopt.dataclass import dataclass
from sdopt.errors import CheckpointError
from sdopt.graph import F32, I64, Writer, load, names
from sdopt.graph.control import add_residual_inputs

KEYS, VALUES, MASK, SCALES = "image_keys", "image_values", "image_mask", "image_scales"
TOKENS = ("batch", "adapters", "image_tokens")
QUERY = re.compile(r"((down_blocks|up_blocks|mid_block)\.[\w.]+\.attn2)\.to_q\.weight")
ORDER = ("down_blocks", "up_blocks", "mid_block")


@dataclass(frozen=True)
class Layer:
    """One cross-attention: how the names of its parameters begin, its features, and its heads."""

    name: str
    width: int
    heads: int


def in_order(parameters: Iterable[str]) -> list[str]:
    """The cross-attentions among a UNet's parameters, by name, in the order in which IP-Adapters number them."""
    found = [match for match in map(QUERY.fullmatch, parameters) if match]

    def key(match: re.Match[str]) -> tuple[int, list[int]]:
        return ORDER.index(match[2]), [int(number) for number in re.findall(r"\.(\d+)", match[1])]

    return [match[1] for match in sorted(found, key=key)]


def image_inputs(width: int, layers: int) -> tuple[TensorSpec, ...]:
    """The inputs for image prompts; `width`: the features of all layers together."""
    return (
        TensorSpec(KEYS, "float32", (*TOKENS, width)),
        TensorSpec(VALUES, "float32", (*TOKENS, width)),
        TensorSpec(MASK, "float32", TOKENS),
        TensorSpec(SCALES, "float32", ("batch", "adapters", layers)),
    )


def write_image_prompted_graph(path: Path, target: Path, layers: Sequence[Layer], places: Sequence[int] = ()) -> None:
    """Write the UNet at `path` with the inputs of `unet_controlled` and those of image prompts to `target`.

    Its weights are in the same file. `places`: see `sdopt.graph.control.write_controlled_graph`.
    Raises: CheckpointError if the graph is not built as a UNet of diffusers is.
    """
    model = load(path)
    add_residual_inputs(model, places)
    add_image_inputs(model, layers)
    ir.save(model, target)


def add_image_inputs(model: ir.Model, layers: Sequence[Layer]) -> None:
    """Add the inputs to `model` in place; see above."""
    specs = image_inputs(sum(layer.width for layer in layers), len(layers))
    given = [ir.Value(name=s.name, type=ir.TensorType(F32), shape=ir.Shape(s.shape)) for s in specs]
    model.graph.inputs.extend(given)
    keys, values, mask, scales = given
    write = Writer(model, "image/", before=next(iter(model.graph)))
    widths = [layer.width for layer in layers]
    apart = [
        _split(model, write, keys, widths, "keys"),
        _split(model, write, values, widths, "values"),
        _split(model, write, scales, [1] * len(layers), "scales"),
    ]
    everywhere = write(
        "Unsqueeze", [mask, write.constant("axes", [2, 3], I64)], "mask", shape=(*TOKENS[:2], 1, 1, None)
    )
    for layer, key, value, scale in zip(layers, *apart, strict=True):
        _attend(model, layer, (key, value, scale), everywhere)


def _split(model: ir.Model, write: Writer, value: ir.Value, lengths: Sequence[int], name: str) -> list[ir.Value]:
    """A value's last dimension in pieces of these lengths."""
    assert value.shape is not None
    outputs = [
        ir.Value(name=f"image/{name}_{i}", type=ir.TensorType(F32), shape=ir.Shape([*value.shape[:-1], length]))
        for i, length in enumerate(lengths)
    ]
    sizes = write.constant(f"{name}_widths", lengths, I64)
    write.insert(ir.node("Split", [value, sizes], {"axis": -1}, outputs=outputs, name=f"image/{name}"))
    return outputs


def _attend(model: ir.Model, layer: Layer, image: tuple[ir.Value, ir.Value, ir.Value], mask: ir.Value) -> None:
    """Add the second attention to one layer: in front of the linear that mixes its heads.

    The sizes of all dimensions are [batch, adapters, heads, queries, image_tokens]; each adapter has a softmax.
    """
    query = _reader(model, f"{layer.name}.to_q.weight").outputs[0]
    mix = _reader(model, f"{layer.name}.to_out.0.weight")
    text = mix.inputs[0]
    assert query.shape is not None
    assert text is not None
    write = Writer(model, f"{layer.name}.image/", before=mix)
    shared = Writer(model, "image/")
    heads, features = layer.heads, layer.width // layer.heads
    by_heads = shared.constant(f"heads_{heads}_{features}", [0, 0, heads, features], I64)
    by_image = shared.constant(f"images_{heads}_{features}", [0, 0, 0, heads, features], I64)
    merged = shared.constant(f"merged_{layer.width}", [0, 0, layer.width], I64)
    key, value, scale = image
    key = write("Reshape", [key, by_image], "key_heads", shape=(*TOKENS, heads, features))
    key = write("Transpose", [key], "key", shape=(*TOKENS[:2], heads, features, TOKENS[2]), perm=(0, 1, 3, 4, 2))
    key = write("Mul", [key, shared.constant(f"scale_{features}", 1 / math.sqrt(features), F32)], "key_scaled")
    value = write("Reshape", [value, by_image], "value_heads", shape=(*TOKENS, heads, features))
    value = write("Transpose", [value], "value", shape=(*TOKENS[:2], heads, TOKENS[2], features), perm=(0, 1, 3, 2, 4))
    strength = write("Unsqueeze", [scale, shared.constant("axes", [2, 3], I64)], "scale", shape=(*TOKENS[:2], 1, 1, 1))
    value = write("Mul", [value, strength], "value_scaled")
    batch, queries = text.shape[:2] if text.shape is not None else (None, None)
    if query.shape[0] != batch:  # one query for both halves of guidance (see `sdopt.export.guidance_prefix`)
        query = _both_halves(write, query, image[0], (batch, queries, layer.width))
    query = write("Reshape", [query, by_heads], "query_heads", shape=(batch, queries, heads, features))
    query = write("Transpose", [query], "query", shape=(batch, heads, queries, features), perm=(0, 2, 1, 3))
    first = shared.constant("first", [1], I64)
    query = write("Unsqueeze", [query, first], "query_each", shape=(batch, 1, heads, queries, features))
    sizes = (batch, TOKENS[1], heads, queries)
    logits = write("MatMul", [query, key], "logits", shape=(*sizes, TOKENS[2]))
    weights = write("Softmax", [write("Add", [logits, mask], "masked")], "weights", axis=-1)
    each = write("MatMul", [weights, value], "each", shape=(*sizes, features))
    total = write("ReduceSum", [each, first], "sum", shape=(batch, heads, queries, features), keepdims=0)
    side_by_side = write("Transpose", [total], "apart", shape=(batch, queries, heads, features), perm=(0, 2, 1, 3))
    pictured = write("Reshape", [side_by_side, merged], "merged", shape=(batch, queries, layer.width))
    mix.replace_input_with(0, write("Add", [text, pictured], "added"))


def _both_halves(write: Writer, query: ir.Value, keys: ir.Value, shape: Sequence[object]) -> ir.Value:
    """The query, repeated to the batch of the keys."""
    rows = write("Shape", [query], "images", dtype=I64, shape=(1,), start=0, end=1)
    batch = write("Shape", [keys], "batch", dtype=I64, shape=(1,), start=0, end=1)
    halves = write("Div", [batch, rows], "halves")
    counts = write("Concat", [halves, write.constant("ones", [1, 1], I64)], "counts", shape=(3,), axis=0)
    return write("Tile", [query, counts], "both", shape=shape)


def _reader(model: ir.Model, parameter: str) -> ir.Node:
    """The one MatMul that reads a parameter. Raises: CheckpointError if there is no such node."""
    for _, value in names.parameters(model).get(parameter, ()):
        readers = [node for node, _ in value.uses()]
        casts = [cast.outputs[0] for cast in readers if cast.op_type == "Cast"]  # of weights that are stored in half
        readers += [node for output in casts for node, _ in output.uses()]
        products = [node for node in readers if node.op_type == "MatMul"]
        if len(products) == 1:
            return products[0]
    raise CheckpointError(f"unet: no linear reads {parameter}; please report it")
