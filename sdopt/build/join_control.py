"""Join ControlNets and the UNet into one graph, so that residuals stay where they are computed.

    before   unet_controlled   sample, timestep, text ..., residuals                    -> noise_pred
             controlnet        sample, timestep, text ..., control_image,
                               conditioning_scale                                       -> residuals
    after                      sample, timestep, text ...,
                               control_image.NAME, conditioning_scale.NAME of each net  -> noise_pred

Every net reads the UNet's inputs; of an inpainting UNet's sample it reads the first channels, those of the latents.
The residuals of several nets are added up. Without a net the inputs for residuals are gone. Nodes, values and weights
of a net are named `adapters/NAME/...`: no parameter of the UNet is called so, and a LoRA does not change them.
Ref: Zhang et al. 2023, arXiv:2302.05543, section 3.2.
"""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir

from sdopt.bundle.adapter import ADAPTERS
from sdopt.bundle.joined import PICTURE, SCALE, picture_input, scale_input
from sdopt.errors import UsageError
from sdopt.graph import I64, Writer, name_of, redirect
from sdopt.graph.control import is_residual

OWN = {PICTURE: picture_input, SCALE: scale_input}
SHARED_LENGTHS = ("batch", "images", "tokens", "latent_height", "latent_width", "height", "width")


def join_control(unet: ir.Model, nets: Mapping[str, ir.Model]) -> ir.Model:
    """Change `unet`, a graph with inputs for residuals, in place, and return it. `nets`: the nets' graphs, by name.

    Weights stay in their files.
    Raises: UsageError for a net that is made for another UNet, or is written in another opset.
    """
    graph, first = unet.graph, next(iter(unet.graph))
    inputs = {name_of(value): value for value in graph.inputs}
    residuals = {name: inputs.pop(name) for name in list(inputs) if is_residual(name)}
    sums: dict[str, ir.Value] = {}
    own: list[ir.Value] = []
    for name, net in nets.items():
        _refuse_other(name, net, unet, residuals)
        prefix = f"{ADAPTERS}/{name}/"
        write = Writer(unet, prefix, before=first)
        given = dict[str, ir.Value]()
        for value in net.graph.inputs:
            key = name_of(value)
            if key in OWN:
                given[key] = ir.Value(name=OWN[key](name), type=value.type, shape=value.shape)
                own.append(given[key])
            else:
                given[key] = _first_channels(write, inputs[key], value)
        for key, value in _copied(unet, net, prefix, given, first).items():
            # A net's residual may have one pixel for all: the sum has the sizes of the larger.
            both = [value] if key not in sums else [sums[key], value]
            sums[key] = value if len(both) == 1 else write("Add", both, f"sum_{key}", shape=_any_size(value))
    for key, value in residuals.items():
        if key in sums:
            redirect(value, sums[key])
        else:
            _leave_out(value)
    graph.inputs[:] = [*inputs.values(), *own]
    return unet


def _leave_out(given: ir.Value) -> None:
    """Let the graph be as if `given`, an input that is added to something, were not added to it."""
    for node, index in tuple(given.uses()):
        other = node.inputs[1 - index]
        assert other is not None
        redirect(node.outputs[0], other)
        unet_graph = node.graph
        assert unet_graph is not None
        unet_graph.remove(node, safe=True)


def _refuse_other(name: str, net: ir.Model, unet: ir.Model, residuals: Mapping[str, ir.Value]) -> None:
    """Raises: UsageError unless the net reads what the UNet reads, and gives what the UNet takes, in its opset."""
    again = f"export it again: sdopt export CONTROLNET --onto BUNDLE --name {name} --force"
    reads = {name_of(v): _lengths(v) for v in net.graph.inputs if name_of(v) not in ("sample", *OWN)}
    there = {name_of(v): _lengths(v) for v in unet.graph.inputs}
    gives, takes = ({name_of(v): _lengths(v) for v in vs} for vs in (net.graph.outputs, residuals.values()))
    if gives != takes or any(there.get(key) != lengths for key, lengths in reads.items()):
        raise UsageError(
            f"{name}: it is made for another model. It reads {reads} and gives {gives}; the UNet reads {there}; {again}"
        )
    opsets = {domain: net.graph.opset_imports[domain] for domain in net.graph.opset_imports}
    if any(unet.graph.opset_imports.setdefault(domain, opset) != opset for domain, opset in opsets.items()):
        raise UsageError(f"{name}: it is in opset {opsets['']}, the UNet in {unet.graph.opset_imports['']}; {again}")


def _lengths(value: ir.Value) -> list[int]:
    """The lengths of a value that never change."""
    return [] if value.shape is None else [d for d in value.shape if isinstance(d, int)]


def _first_channels(write: Writer, given: ir.Value, wanted: ir.Value) -> ir.Value:
    """What a net reads of an input of the UNet: of a sample with further channels, its first ones."""
    assert given.shape is not None
    assert wanted.shape is not None
    if len(wanted.shape) != 4 or given.shape[1] == wanted.shape[1]:
        return given
    start, stop, axis = (write.constant(f"channels_{n}", [n], I64) for n in (0, wanted.shape[1], 1))
    return write("Slice", [given, start, stop, axis], name_of(given), shape=wanted.shape)


def _copied(
    unet: ir.Model, net: ir.Model, prefix: str, given: Mapping[str, ir.Value], before: ir.Node
) -> dict[str, ir.Value]:
    """Copy a net's nodes and weights into the UNet's graph; its outputs there, by name. `given`: its inputs there."""
    values: dict[ir.Value, ir.Value] = {value: given[name_of(value)] for value in net.graph.inputs}
    for name, value in net.graph.initializers.items():
        values[value] = _named(value, prefix)
        tensor = values[value].const_value = value.const_value
        assert tensor is not None
        tensor.name = prefix + name
        unet.graph.register_initializer(values[value])
    for node in net.graph:
        outputs = [_named(value, prefix) for value in node.outputs]
        values |= zip(node.outputs, outputs, strict=True)
        inputs = [None if value is None else values[value] for value in node.inputs]
        copy = ir.node(node.op_type, inputs, domain=node.domain, outputs=outputs, name=prefix + name_of(node))
        copy.attributes.update(node.attributes)
        unet.graph.insert_before(before, copy)
    return {name_of(value): values[value] for value in net.graph.outputs}


def _named(value: ir.Value, prefix: str) -> ir.Value:
    """A value of the same type under its new name. Lengths that only the net has a name for get the prefix too."""
    copy = ir.Value(name=prefix + name_of(value), type=value.type)
    if value.shape is not None:
        lengths = [d if isinstance(d, int) else d.value for d in value.shape]
        copy.shape = ir.Shape(
            [d if d is None or isinstance(d, int) or d in SHARED_LENGTHS else f"{prefix}{d}" for d in lengths]
        )
    return copy


def _any_size(value: ir.Value) -> list[int | str | None]:
    assert value.shape is not None
    batch, channels = (d if isinstance(d, int) else d.value for d in value.shape[:2])
    return [batch, channels, None, None]
