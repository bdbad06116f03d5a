"""The UNet with guidance and the sampler's row inside: one call is one step, and the sample never leaves the device.

    rows = packed(table, plan.guidance)                          # sdopt.samplers.packed; uploaded once
    for k in range(len(table)):
        out = step(sample=x, history=h, noise=draw() if table.draws[k] else zero, row=rows[k], **conditions)
        x, h = out["next_sample"], out["next_history"]           # on a device: carried, not fetched

What the graph computes, all of it in float32 but the UNet itself:

    timestep, guidance, rescale, c_in, c_skip, c_out, clean_x, clean_o, *update = row
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
    row       [row_width(H)]                          see sdopt.samplers.packed
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

Left out: the mask of inpainting with a four-channel UNet (`Canvas.hold`), which changes the sample between calls; such a
request uses the UNet alone, or gives `sample` anew for each call. `rescale` (Lin et al. 2024) is in the graph only when asked for
(`rescale=True`); otherwise that column is ignored, and a request that rescales uses the UNet alone.
Ref: Ho & Salimans 2022, arXiv:2207.12598, eq. 6.
"""

from __future__ import annotations

import onnx_ir as ir

from sdopt.samplers.packed import HISTORY

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
    Raises: UsageError if the graph is not a UNet: no sample, timestep and noise_pred.
    """
    raise NotImplementedError
