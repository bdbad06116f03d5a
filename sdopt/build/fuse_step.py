"""One graph of the UNet, guidance and the sampler's row: one call is one step, and the sample stays on the device.

    rows = packed(table, plan.guidance)                          # sdopt.samplers.packed; uploaded once
    for k in range(len(table)):
        out = step(sample=x, history=h, noise=draw() if table.draws[k] else zero, row=rows[k], **conditions)
        x, h = out["next_sample"], out["next_history"]           # on a device: carried, not fetched

What the graph computes. All but the UNet is in float32:

    timestep, guidance, rescale, c_in, c_skip, c_out, clean_x, clean_o, *update = row        # one row for each image
    input    = concat(c_in * sample, extra)                      # extra: only where the UNet takes more channels
    uncond, cond = split(unet(concat(input, input), timestep, concat(negative_*, *)))
    output   = uncond + guidance * (cond - uncond)
    kept     = c_skip * sample + c_out * output
    next_sample  = update @ [sample, kept, *history, noise]
    next_history = [kept, *history[:-1]]
    denoised     = clean_x * sample + clean_o * output

Inputs, all float32 unless `half` is told otherwise. B = "batch" is the number of images in every input: no input is
passed twice, because the graph itself joins the two halves of guidance.

    sample    [B, C, latent_height, latent_width]     the sample in the sampler's own frame, C latent channels; carried
    history   [H, B, C, latent_height, latent_width]  newest first; starts as zeros (0 * NaN is NaN); carried
    noise     [B, C, latent_height, latent_width]     always finite: zeros where the row's last weight is 0
    row       [B, row_width(H)]                       see sdopt.samplers.packed; images may be at different steps
    timestep_cond [B, width]                           the guidance scale as an embedding; only if the UNet takes it
    extra     [B, UNet's channels - C, latent_height, latent_width]   only if the UNet takes more channels than C
    encoder_hidden_states, text_embeds, time_ids ...  the UNet's other inputs, with its names and shapes, of the prompt
    negative_encoder_hidden_states ...                the same of the negative prompt; only in guided graphs
    control_image.NAME [B, channels, height, width]   what a ControlNet inside sees (see `join_control`), in both halves
    conditioning_scale.NAME [B, residuals]            how strong it is; negative_conditioning_scale.NAME: in the
                                                      negative half, zeros in guess mode
    down_block_feature_0 ...                          features of T2I-Adapters (see `sdopt.build.features`), in both
    feature_scale [B, 1]                              halves, and whether a call adds them
    deep [halves of guidance, B, channels, h, w]       deep features, of a shallow UNet (see `sdopt.build.shallow`)

Outputs (float32):

    next_sample   like sample            CARRIED: becomes `sample`
    next_history  like history           CARRIED: becomes `history`
    denoised      like sample            the sampler's estimate of the clean sample, for previews
    deep          like the input         of a full UNet with a feature cache; a board gives it to the shallow one

`guided=False` makes the graph of the conditional half alone. It has the same outputs and carried tensors, and the same
inputs without `negative_*`; it ignores the row's guidance. A loop launches it in the calls whose guidance is 1 or less,
so it may alternate between the two graphs from call to call.

A distilled UNet's guidance embedding is a table too, with one row for each call. The host computes it: its angles reach
thousands, where the sines of a GPU's fast arithmetic are not exact.
The mask of inpainting with a four-channel UNet is not in the graph. It changes the sample between calls
(`Canvas.restore_unmasked`), so such a request passes `sample` in every call. With `rescale=True` the graph rescales the
guided output; a row whose `rescale` is 0 leaves it exactly as it is.
Ref: Ho & Salimans 2022, arXiv:2207.12598, eq. 6; Lin et al. 2024, arXiv:2305.08891, section 3.4.
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from sdopt.build.shallow import joined_halves, parted_halves
from sdopt.bundle.joined import DEEP, FEATURE_SCALE, PICTURE
from sdopt.dataclass import dataclass
from sdopt.errors import UsageError
from sdopt.graph import BOOL, F32, I64, Writer, name_of, redirect
from sdopt.graph.control import is_feature
from sdopt.samplers.packed import HISTORY, SCALARS, row_width

CARRIED = {"next_sample": "sample", "next_history": "history"}  # output -> the input that it becomes
PREFIX = "step/"  # the names of the step's own nodes begin with it


def fuse_step(
    unet: ir.Model,
    *,
    guided: bool = True,
    rescale: bool = False,
    history: int = HISTORY,
    latent_channels: int | None = None,
) -> ir.Model:
    """Change `unet` in place into the graph of one step, and return it.

    `latent_channels` is how many channels the sample has, if that is fewer than the UNet takes: 4 of 9 for inpainting.
    Raises: UsageError if the graph is not a UNet (no sample, timestep and noise_pred), or a number makes no sense.
    """
    graph = unet.graph
    inner, times, embedding, others, predicted = _unet_values(unet)
    deep, kept = _deep(unet.graph.inputs), _deep(unet.graph.outputs)
    seen = [value for value in others if name_of(value).startswith(f"{PICTURE}.")]
    features = [value for value in others if is_feature(name_of(value)) or name_of(value) == FEATURE_SCALE]
    conditions = [value for value in others if value not in (*seen, *features)]
    assert inner.shape is not None
    batch, unet_channels, *size = (d if isinstance(d, int) else d.value for d in inner.shape)
    assert isinstance(unet_channels, int)
    channels = unet_channels if latent_channels is None else latent_channels
    if not 0 < channels <= unet_channels or history < 1:
        raise UsageError(
            f"latent_channels = {channels} of the UNet's {unet_channels}, history = {history}; both 1 or more"
        )
    of_prompts = [value.shape[0] for value in (*conditions, deep) if value is not None and value.shape is not None]
    rows = str(of_prompts[0]) if of_prompts else str(batch)
    doubles = guided and rows == str(batch)  # else the UNet itself repeats the sample, where it first meets the prompt
    latent = (rows, channels, *size)
    step_inputs = _Inputs(
        sample=_value("sample", latent),
        history=_value("history", (history, *latent)),
        noise=_value("noise", latent),
        row=_value("row", (rows, row_width(history))),
        extra=_value("extra", (rows, unet_channels - channels, *size)) if channels < unet_channels else None,
        embedding=None if embedding is None else _value("timestep_cond", (rows, *_any_rows(embedding)[1:])),
        pictures=tuple(_value(name_of(value), (rows, *_any_rows(value)[1:])) for value in seen),
        features=tuple(_value(name_of(value), (rows, *_any_rows(value)[1:])) for value in features),
        deep=None if deep is None else _value(DEEP, (1 + guided, rows, *_any_rows(deep)[1:])),
    )
    if guided:
        _rename_dimension(unet, rows, None)  # in the UNet there are two rows for each image
    _rename_dimension(unet, str(batch), rows)
    negatives = [_value(f"negative_{name_of(c)}", c.shape, c.dtype or F32) for c in conditions] if guided else []
    before = Writer(unet, PREFIX, before=next(iter(graph)))
    row = _columns(before, step_inputs.row, history)
    redirect(inner, _doubled(before, _input(before, step_inputs, row), doubles, "both"), unless=_is_of_step)
    redirect(times, _doubled(before, row["timestep"], doubles, "both_times"), unless=_is_of_step)
    if embedding is not None and step_inputs.embedding is not None:
        redirect(embedding, _doubled(before, step_inputs.embedding, guided, "both_embeddings"), unless=_is_of_step)
    for value, picture in zip(seen, step_inputs.pictures, strict=True):
        redirect(value, _doubled(before, picture, doubles, f"both_{name_of(picture)}"), unless=_is_of_step)
    for value, feature in zip(features, step_inputs.features, strict=True):
        redirect(value, feature)  # the UNet itself repeats it
    if deep is not None and step_inputs.deep is not None:
        redirect(deep, joined_halves(before, step_inputs.deep), unless=_is_of_step)
    for negative, given in zip(negatives, conditions, strict=bool(negatives)):
        joined = before("Concat", [negative, given], f"both_{name_of(given)}", axis=0, shape=_any_rows(given))
        redirect(given, joined, unless=_is_of_step)
    after = Writer(unet, PREFIX)
    output = _guided(after, predicted, row, rescale) if guided else predicted
    graph.inputs[:] = [*step_inputs.all(), *conditions, *negatives]
    outputs = _advanced(after, step_inputs, row, output)
    graph.outputs[:] = [*outputs, *([] if kept is None else [parted_halves(after, kept, 1 + guided, rows)])]
    graph.name = "step"
    return unet


@dataclass(frozen=True)
class _Inputs:
    """The inputs of the step that are not the UNet's."""

    sample: ir.Value
    history: ir.Value
    noise: ir.Value
    row: ir.Value
    extra: ir.Value | None
    embedding: ir.Value | None
    pictures: tuple[ir.Value, ...]
    features: tuple[ir.Value, ...]
    deep: ir.Value | None

    def all(self) -> list[ir.Value]:
        values = (self.sample, self.history, self.noise, self.row, self.embedding, self.extra, self.deep)
        return [*(value for value in values if value is not None), *self.pictures, *self.features]


def _unet_values(unet: ir.Model) -> tuple[ir.Value, ir.Value, ir.Value | None, list[ir.Value], ir.Value]:
    """(sample, timestep, timestep_cond if it takes it, the other inputs, noise_pred) of a UNet."""
    inputs = {name_of(value): value for value in unet.graph.inputs}
    outputs = [name_of(value) for value in unet.graph.outputs]
    if not {"sample", "timestep"} <= inputs.keys() or outputs not in (["noise_pred"], ["noise_pred", DEEP]):
        raise UsageError(
            f"fuse_step takes a UNet, sample and timestep -> noise_pred; this graph is {', '.join(inputs)} -> "
            f"{', '.join(outputs)}"
        )
    others = [value for name, value in inputs.items() if name not in ("sample", "timestep", "timestep_cond", DEEP)]
    return inputs["sample"], inputs["timestep"], inputs.get("timestep_cond"), others, unet.graph.outputs[0]


def _deep(values: Sequence[ir.Value]) -> ir.Value | None:
    """The deep features among the inputs or the outputs of a UNet."""
    return next((value for value in values if name_of(value) == DEEP), None)


def _rename_dimension(unet: ir.Model, dimension: str, name: str | None) -> None:
    """Rename a dimension of all values that nodes compute; with None it has no name any more."""

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


def _any_rows(value: ir.Value) -> list[int | str | None]:
    """The shape of `value` with an unnamed first dimension, as two joined halves have it."""
    assert value.shape is not None
    return [None, *(d if isinstance(d, int) else d.value for d in value.shape[1:])]


def _is_of_step(node: ir.Node) -> bool:
    return name_of(node).startswith(PREFIX)


def _columns(write: Writer, row: ir.Value, history: int) -> dict[str, ir.Value]:
    """The entries of the rows by name: [B] for the timestep, [H, B, 1, 1, 1] for the history, else [B, 1, 1, 1]."""
    assert row.shape is not None
    rows = row.shape[0]
    batch = rows if isinstance(rows, int) else rows.value
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


def _input(write: Writer, step_inputs: _Inputs, row: dict[str, ir.Value]) -> ir.Value:
    """c_in * sample, joined with the extra channels of an inpainting UNet."""
    scaled = write("Mul", [step_inputs.sample, row["c_in"]], "scaled")
    if step_inputs.extra is None:
        return scaled
    assert scaled.shape is not None
    shape = [scaled.shape[0], None, *scaled.shape[2:]]
    return write("Concat", [scaled, step_inputs.extra], "input", axis=1, shape=ir.Shape(shape))


def _doubled(write: Writer, value: ir.Value, doubles: bool, name: str) -> ir.Value:
    return write("Concat", [value, value], name, axis=0, shape=_any_rows(value)) if doubles else value


def _guided(write: Writer, predicted: ir.Value, row: dict[str, ir.Value], rescale: bool) -> ir.Value:
    """uncond + guidance * (cond - uncond); with `rescale` its standard deviation is moved towards that of cond."""
    uncond, cond = (_value(f"{PREFIX}{name}", ()) for name in ("uncond", "cond"))
    for half in (uncond, cond):
        half.shape = ir.Shape(_any_rows(predicted))
    write.insert(
        ir.node("Split", [predicted], {"axis": 0, "num_outputs": 2}, outputs=[uncond, cond], name=PREFIX + "halves")
    )
    difference = write("Sub", [cond, uncond], "difference")
    guided = write("Add", [uncond, write("Mul", [difference, row["guidance"]], "push")], "guided")
    return _rescaled(write, guided, cond, row["rescale"]) if rescale else guided


def _rescaled(write: Writer, guided: ir.Value, cond: ir.Value, phi: ir.Value) -> ir.Value:
    """guided * (1 + phi * (std(cond) / std(guided) - 1)). At phi = 0 exactly `guided`, even if its std is 0.

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
    excess = write("Sub", [ratio, one], "excess")
    scale = write("Add", [write("Mul", [excess, phi], "share"), one], "scale")
    rescaled = write("Mul", [guided, scale], "rescaled_fully")
    rescales = write("Greater", [phi, write.constant("no_share", [0.0], F32)], "rescales", dtype=BOOL)
    return write("Where", [rescales, rescaled, guided], "rescaled", dtype=F32, shape=guided.shape)


def _advanced(write: Writer, step_inputs: _Inputs, row: dict[str, ir.Value], output: ir.Value) -> list[ir.Value]:
    """The outputs of the step: the sampler's row applied to the UNet's output."""
    x = step_inputs.sample
    assert step_inputs.history.shape is not None
    assert x.shape is not None
    depth, *latent = step_inputs.history.shape
    kept = _mixed(write, x, output, row["c_skip"], row["c_out"], "kept")
    zero, last = write.constant("zero", [0], I64), write.constant("minus_one", [-1], I64)
    terms = write("Mul", [step_inputs.history, row["update_history"]], "past_terms")
    past = write("ReduceSum", [terms, zero], "past", keepdims=0, shape=latent)
    noise = write("Mul", [step_inputs.noise, row["update_noise"]], "noise_term")
    moved = _mixed(write, x, kept, row["update_x"], row["update_kept"], "moved")
    newest = write("Unsqueeze", [kept, zero], "newest", shape=(1, *latent))
    older = write("Slice", [step_inputs.history, zero, last, zero], "older", shape=(None, *latent))
    return [
        write("Add", [write("Add", [moved, past], "moved_on"), noise], "next_sample", output="next_sample"),
        write(
            "Concat",
            [newest, older] if depth != 1 else [newest],
            "next_history",
            axis=0,
            shape=step_inputs.history.shape,
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
