"""The UNet with guidance and the sampler's row inside: one call is one step, and the sample never leaves the device.

    rows = packed(table, plan.guidance)                          # sdopt.samplers.packed; uploaded once
    for k in range(len(table)):
        out = step(sample=x, history=h, noise=draw() if table.draws[k] else zero, row=rows[k], **conditions)
        x, h = out["next_sample"], out["next_history"]           # on a device: carried, not fetched

What the graph computes, all of it in float32 but the UNet itself:

    timestep, guidance, rescale, c_in, c_skip, c_out, clean_x, clean_o, *update = row        # for each image its own
    input    = concat(c_in * sample, extra)                      # extra: only where the UNet takes more channels
    uncond, cond = split(unet(concat(input, input), timestep, concat(negative_*, *)))
    output   = uncond + guidance * (cond - uncond)
    kept     = c_skip * sample + c_out * output
    next_sample  = update @ [sample, kept, *history, noise]
    next_history = [kept, *history[:-1]]
    denoised     = clean_x * sample + clean_o * output

Inputs (all float32 unless `half` is told otherwise; dimensions by name; B = "batch", the number of images, in every one
of them: nothing is passed in double, the graph joins the two halves itself):

    sample    [B, C, latent_height, latent_width]     the sample in the sampler's own frame, C latent channels; carried
    history   [H, B, C, latent_height, latent_width]  newest first; starts as zeros (0 * NaN is NaN); carried
    noise     [B, C, latent_height, latent_width]     finite always: zeros where the row's last weight is 0
    row       [B, row_width(H)]                       see sdopt.samplers.packed; images may be at different steps
    timestep_cond [B, width]                           only a UNet that takes it: the guidance scale as an embedding
    extra     [B, UNet's channels - C, latent_height, latent_width]   only a UNet with more channels than the latents
    encoder_hidden_states, text_embeds, time_ids ...  the UNet's other inputs, with its names and shapes: the prompt's
    negative_encoder_hidden_states ...                the same once more, for the unconditional half; guided graphs only

Outputs (float32):

    next_sample   like sample            CARRIED: becomes `sample`
    next_history  like history           CARRIED: becomes `history`
    denoised      like sample            what the sampler believes the clean sample to be: for previews

`guided=False` is the graph of the conditional half alone: same inputs without `negative_*`, same outputs, same row (its
guidance is ignored), same carried tensors. It is the one to launch in the calls whose guidance is 1 or less, so that a
loop may change between the two from call to call.

The guidance embedding of a distilled UNet comes as a table of rows too, one for each call. The host computes it: its
angles reach thousands, and the sines of a GPU's fast arithmetic are not exact there.
The mask of inpainting with a four-channel UNet is not in the graph: it changes the sample between calls
(`Canvas.restore_unmasked`), so such a request gives `sample` anew for each call. Rescaled guidance is in the graph with
`rescale=True`; a row whose `rescale` is 0 leaves the guided output exactly as it is.
Ref: Ho & Salimans 2022, arXiv:2207.12598, eq. 6; Lin et al. 2024, arXiv:2305.08891, section 3.4.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from sdopt.errors import UsageError
from sdopt.graph import BOOL, F32, I64, Writer, name_of, redirect
from sdopt.samplers.packed import HISTORY, SCALARS, row_width

CARRIED = {"next_sample": "sample", "next_history": "history"}  # output -> the input that it becomes
PREFIX = "step/"  # names of the nodes that are the sampler's and not the UNet's


def fuse_step(
    unet: ir.Model,
    *,
    guided: bool = True,
    rescale: bool = False,
    history: int = HISTORY,
    latent_channels: int | None = None,
) -> ir.Model:
    """`unet`, changed into the graph of one whole step.

    `latent_channels` are the sample's, where the UNet takes more (an inpainting UNet: 4 of 9); the UNet's own if None.
    Raises: UsageError if the graph is not a UNet (no sample, timestep and noise_pred), or a number makes no sense.
    """
    graph = unet.graph
    inner, times, embedding, conditions, predicted = _unet_values(unet)
    assert inner.shape is not None
    batch, of_unet, *size = (d if isinstance(d, int) else d.value for d in inner.shape)
    assert isinstance(of_unet, int)
    channels = of_unet if latent_channels is None else latent_channels
    if not 0 < channels <= of_unet or history < 1:
        raise UsageError(f"latent_channels = {channels} of the UNet's {of_unet}, history = {history}; both 1 or more")
    rows = str(conditions[0].shape[0]) if conditions and conditions[0].shape is not None else str(batch)
    doubles = guided and rows == str(batch)  # else the graph itself repeats the sample, where the prompt comes in
    latent = (rows, channels, *size)
    ends = _Ends(
        sample=_value("sample", latent),
        history=_value("history", (history, *latent)),
        noise=_value("noise", latent),
        row=_value("row", (rows, row_width(history))),
        extra=_value("extra", (rows, of_unet - channels, *size)) if channels < of_unet else None,
        embedding=None if embedding is None else _value("timestep_cond", (rows, *_any(embedding)[1:])),
    )
    if guided:
        _rename(unet, rows, None)  # inside of a UNet that gets two rows per image, it is not the number of images
    _rename(unet, str(batch), rows)
    negatives = [_value(f"negative_{name_of(c)}", c.shape, c.dtype or F32) for c in conditions] if guided else []
    before = Writer(unet, PREFIX, before=next(iter(graph)))
    row = _columns(before, ends.row, history)
    redirect(inner, _doubled(before, _input(before, ends, row), doubles, "both"), unless=_ours)
    redirect(times, _doubled(before, row["timestep"], doubles, "both_times"), unless=_ours)
    if embedding is not None and ends.embedding is not None:
        redirect(embedding, _doubled(before, ends.embedding, guided, "both_embeddings"), unless=_ours)
    for negative, given in zip(negatives, conditions, strict=bool(negatives)):
        joined = before("Concat", [negative, given], f"both_{name_of(given)}", axis=0, shape=_any(given))
        redirect(given, joined, unless=_ours)
    after = Writer(unet, PREFIX)
    output = _guided(after, predicted, row, rescale) if guided else predicted
    graph.inputs[:] = [*ends.all(), *conditions, *negatives]
    graph.outputs[:] = _advanced(after, ends, row, output)
    graph.name = "step"
    return unet


@dataclass(frozen=True)
class _Ends:
    """The inputs that are the sampler's."""

    sample: ir.Value
    history: ir.Value
    noise: ir.Value
    row: ir.Value
    extra: ir.Value | None
    embedding: ir.Value | None

    def all(self) -> list[ir.Value]:
        values = (self.sample, self.history, self.noise, self.row, self.embedding, self.extra)
        return [value for value in values if value is not None]


def _unet_values(unet: ir.Model) -> tuple[ir.Value, ir.Value, ir.Value | None, list[ir.Value], ir.Value]:
    """(sample, timestep, timestep_cond if it takes it, the other inputs, noise_pred) of a UNet."""
    inputs = {name_of(value): value for value in unet.graph.inputs}
    outputs = [name_of(value) for value in unet.graph.outputs]
    if not {"sample", "timestep"} <= inputs.keys() or outputs != ["noise_pred"]:
        raise UsageError(
            f"fuse_step takes a UNet, sample and timestep -> noise_pred; this graph is {', '.join(inputs)} -> "
            f"{', '.join(outputs)}"
        )
    others = [value for name, value in inputs.items() if name not in ("sample", "timestep", "timestep_cond")]
    return inputs["sample"], inputs["timestep"], inputs.get("timestep_cond"), others, unet.graph.outputs[0]


def _rename(unet: ir.Model, dimension: str, name: str | None) -> None:
    """Call a dimension of the values inside `name`; None: no name is known."""

    def renamed(d: int | ir.SymbolicDim) -> int | str | None:
        if isinstance(d, int):
            return d
        return name if d.value == dimension else d.value

    for node in unet.graph:
        for value in node.outputs:
            if value.shape is not None:
                value.shape = ir.Shape([renamed(d) for d in value.shape])


def _value(name: str, shape: object, dtype: ir.DataType = F32) -> ir.Value:
    return ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape))  # type: ignore[arg-type]


def _any(value: ir.Value) -> list[int | str | None]:
    """The shape of a value joined with another of its kind: the first dimension is not known by a name."""
    assert value.shape is not None
    return [None, *(d if isinstance(d, int) else d.value for d in value.shape[1:])]


def _ours(node: ir.Node) -> bool:
    return name_of(node).startswith(PREFIX)


def _columns(write: Writer, row: ir.Value, history: int) -> dict[str, ir.Value]:
    """The rows' entries by name: [B] for the timestep, [H, B, 1, 1, 1] for the history, else [B, 1, 1, 1]."""
    assert row.shape is not None
    first = row.shape[0]
    batch = first if isinstance(first, int) else first.value
    names = (*SCALARS, "update_x", "update_kept", "update_history", "update_noise")
    lengths = [history if name == "update_history" else 1 for name in names]
    outputs = [_value(f"{PREFIX}{name}", (batch, n)) for name, n in zip(names, lengths, strict=True)]
    sizes = write.constant("row_lengths", lengths, I64)
    write.insert(ir.node("Split", [row, sizes], {"axis": 1}, outputs=outputs, name=f"{PREFIX}row"))
    columns: dict[str, ir.Value] = dict(zip(names, outputs, strict=True))
    flat, column = write.constant("flat", [-1], I64), write.constant("column", [-1, 1, 1, 1], I64)
    for name, value in columns.items():
        if name == "timestep":
            columns[name] = write("Reshape", [value, flat], f"{name}s", shape=(batch,))
        elif name != "update_history":
            columns[name] = write("Reshape", [value, column], f"{name}_column", shape=(batch, 1, 1, 1))
    weights = write("Transpose", [columns["update_history"]], "weights_by_age", perm=[1, 0], shape=(history, batch))
    deep = write.constant("deep_column", [history, -1, 1, 1, 1], I64)
    columns["update_history"] = write("Reshape", [weights, deep], "weights", shape=(history, batch, 1, 1, 1))
    return columns


def _input(write: Writer, ends: _Ends, row: dict[str, ir.Value]) -> ir.Value:
    """c_in * sample, with the further channels of an inpainting UNet."""
    scaled = write("Mul", [ends.sample, row["c_in"]], "scaled")
    if ends.extra is None:
        return scaled
    assert scaled.shape is not None
    shape = [scaled.shape[0], None, *scaled.shape[2:]]
    return write("Concat", [scaled, ends.extra], "input", axis=1, shape=ir.Shape(shape))


def _doubled(write: Writer, value: ir.Value, doubles: bool, name: str) -> ir.Value:
    return write("Concat", [value, value], name, axis=0, shape=_any(value)) if doubles else value


def _guided(write: Writer, predicted: ir.Value, row: dict[str, ir.Value], rescale: bool) -> ir.Value:
    """uncond + guidance * (cond - uncond), if asked for with the standard deviation of cond."""
    uncond, cond = (_value(f"{PREFIX}{name}", ()) for name in ("uncond", "cond"))
    for half in (uncond, cond):
        half.shape = ir.Shape([None, *_any(predicted)[1:]])
    write.insert(
        ir.node("Split", [predicted], {"axis": 0, "num_outputs": 2}, outputs=[uncond, cond], name=PREFIX + "halves")
    )
    difference = write("Sub", [cond, uncond], "difference")
    guided = write("Add", [uncond, write("Mul", [difference, row["guidance"]], "push")], "guided")
    return _rescaled(write, guided, cond, row["rescale"]) if rescale else guided


def _rescaled(write: Writer, guided: ir.Value, cond: ir.Value, share: ir.Value) -> ir.Value:
    """guided * (1 + share * (std(cond) / std(guided) - 1)); at a share of 0 exactly `guided`, also where its std is 0.

    Ref: Lin et al. 2024, arXiv:2305.08891, section 3.4.
    """
    axes = write.constant("image_axes", [1, 2, 3], I64)
    spreads = list[ir.Value]()
    for name, value in (("cond", cond), ("guided", guided)):
        mean = write("ReduceMean", [value, axes], f"mean_{name}", keepdims=1, shape=(None, 1, 1, 1))
        centred = write("Sub", [value, mean], f"centred_{name}", shape=value.shape)
        square = write("Mul", [centred, centred], f"square_{name}")
        spreads.append(write("ReduceSum", [square, axes], f"spread_{name}", keepdims=1, shape=(None, 1, 1, 1)))
    ratio = write("Sqrt", [write("Div", spreads, "ratio2")], "ratio")
    one = write.constant("one", [1.0], F32)
    scale = write("Add", [write("Mul", [write("Sub", [ratio, one], "excess"), share], "share"), one], "scale")
    rescaled = write("Mul", [guided, scale], "rescaled_fully")
    asked = write("Greater", [share, write.constant("no_share", [0.0], F32)], "rescales", dtype=BOOL)
    return write("Where", [asked, rescaled, guided], "rescaled", dtype=F32, shape=guided.shape)


def _advanced(write: Writer, ends: _Ends, row: dict[str, ir.Value], output: ir.Value) -> list[ir.Value]:
    """The outputs: the sampler's row applied."""
    x = ends.sample
    assert ends.history.shape is not None
    assert x.shape is not None
    depth, *latent = ends.history.shape
    kept = _mixed(write, x, output, row["c_skip"], row["c_out"], "kept")
    zero, last = write.constant("zero", [0], I64), write.constant("minus_one", [-1], I64)
    terms = write("Mul", [ends.history, row["update_history"]], "past_terms")
    past = write("ReduceSum", [terms, zero], "past", keepdims=0, shape=latent)
    noise = write("Mul", [ends.noise, row["update_noise"]], "noise_term")
    moved = _mixed(write, x, kept, row["update_x"], row["update_kept"], "moved")
    newest = write("Unsqueeze", [kept, zero], "newest", shape=(1, *latent))
    older = write("Slice", [ends.history, zero, last, zero], "older", shape=(None, *latent))
    return [
        write("Add", [write("Add", [moved, past], "moved_on"), noise], "next_sample", output="next_sample"),
        write(
            "Concat",
            [newest, older] if depth != 1 else [newest],
            "next_history",
            axis=0,
            shape=ends.history.shape,
            output="next_history",
        ),
        _mixed(write, x, output, row["clean_x"], row["clean_o"], "denoised", output="denoised"),
    ]


def _mixed(
    write: Writer, x: ir.Value, other: ir.Value, a: ir.Value, b: ir.Value, name: str, output: str | None = None
) -> ir.Value:
    """a * x + b * other."""
    terms = [write("Mul", [x, a], f"{name}_a"), write("Mul", [other, b], f"{name}_b", shape=x.shape)]
    return write("Add", terms, name, output=output)
