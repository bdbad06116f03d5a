"""Cut a UNet in two at a join of its up path: a full one gives its deep features, and a shallow one takes them.

    full      sample, timestep, ...        ->  noise_pred, deep
    shallow   sample, timestep, ..., deep  ->  noise_pred        the first down layers and the last up layers alone

A layer of the up path begins where hidden states and a skip from the down path are joined: a Concat of rank 4 on axis
1. Depth k cuts at the k-th last of them, and `deep` is its first input: what all deeper layers have computed.
Neighbouring steps have nearly the same deep features, so a shallow call may take those of an earlier full call. With
those of a full call on the same inputs, both graphs compute the same numbers.

    deep    [batch, channels, latent_height_over_n, latent_width_over_n]     n: 1, 2, 4, ... as the depth grows

Both are cut from the UNet with all of its weights; a shallow one keeps the few that it reads.
Ref: Ma et al. 2023, arXiv:2312.00858, section 3.3.
"""

from __future__ import annotations

import onnx_ir as ir

from sdopt.build.features import LATENT, halvings
from sdopt.bundle.joined import DEEP, divided
from sdopt.bundle.specs import TensorSpec
from sdopt.errors import UsageError
from sdopt.graph import I64, Writer, attribute, drop_unused, redirect


def keep_deep(model: ir.Model, depth: int) -> None:
    """Give the UNet its deep features as a second output, in place. Raises: UsageError for a depth that it has not."""
    value, dims = _cut(model, depth)
    value.name, value.shape = DEEP, ir.Shape(dims)
    model.graph.outputs.append(value)


def take_deep(model: ir.Model, depth: int) -> None:
    """Let the UNet take its deep features as an input, in place, and drop all that only they needed.

    Inputs that nothing reads any more go too: SDXL's last layers do not see the prompt.
    Raises: UsageError for a depth that it has not.
    """
    value, dims = _cut(model, depth)
    shape = ir.Shape(dims)
    given = ir.Value(name=DEEP, type=value.type, shape=shape)
    redirect(value, given)
    drop_unused(model)
    for one in model.graph.inputs:
        if one.shape is not None and one.shape[0] == shape[0] and _is_counted_alone(one):
            redirect(one, given)
    model.graph.inputs.append(given)
    model.graph.inputs[:] = [one for one in model.graph.inputs if one.uses()]


def deep_spec(model: ir.Model, depth: int) -> TensorSpec:
    """The tensor `deep` of a UNet. Raises: UsageError for a depth that it has not."""
    _, dims = _cut(model, depth)
    return TensorSpec(DEEP, "float32", tuple(d if isinstance(d, int) else str(d) for d in dims))


def joined_halves(write: Writer, deep: ir.Value) -> ir.Value:
    """[halves, B, channels, h, w] as the rows of a UNet, [halves * B, channels, h, w]."""
    assert deep.shape is not None
    size = write("Shape", [deep], "deep_size", dtype=I64, shape=(3,), start=2)
    to = write("Concat", [write.constant("deep_rows", [-1], I64), size], "deep_joined_size", axis=0, shape=(4,))
    return write("Reshape", [deep, to], "deep_joined", shape=(None, *deep.shape[2:]))


def parted_halves(write: Writer, kept: ir.Value, halves: int, rows: str) -> ir.Value:
    """The rows of a UNet as the output `deep`."""
    assert kept.shape is not None
    kept.name = f"{DEEP}/rows"
    size = write("Shape", [kept], "deep_size", dtype=I64, shape=(3,), start=1)
    to = write(
        "Concat", [write.constant("deep_halves", [halves, -1], I64), size], "deep_parted_size", axis=0, shape=(5,)
    )
    return write("Reshape", [kept, to], "deep_parted", shape=(halves, rows, *kept.shape[1:]), output=DEEP)


def _cut(model: ir.Model, depth: int) -> tuple[ir.Value, list[int | str | None]]:
    """The deep features of a depth, and their dimensions by name."""
    nodes = joins(model)
    if not 1 <= depth <= len(nodes):
        text = f"--cache-depth {depth}; allowed are 1 to {len(nodes)}: the up path of this UNet has so many layers"
        raise UsageError(text, "cache_depth")
    deep, skip = nodes[-depth].inputs
    assert deep is not None
    assert skip is not None
    assert deep.shape is not None
    rows, channels = (d if isinstance(d, int) else d.value for d in deep.shape[:2])
    return deep, [rows, channels, *(divided(side, 2 ** halvings(skip)) for side in LATENT)]


def joins(model: ir.Model) -> list[ir.Node]:
    """The nodes that join hidden states of the up path with a skip, in the order in which they run."""
    return [node for node in model.graph if node.op_type == "Concat" and _is_join(node)]


def _is_counted_alone(value: ir.Value) -> bool:
    """Whether nothing is read of an input but how many rows it has."""
    users = [node for node, _ in value.uses()]
    return all(node.op_type == "Shape" and attribute(node, "end") == 1 for node in users)


def _is_join(node: ir.Node) -> bool:
    shape = node.outputs[0].shape
    is_picture = shape is not None and len(shape) == 4 and attribute(node, "axis") == 1
    return is_picture and len(node.inputs) == 2 and all(one is not None and one.producer() for one in node.inputs)
