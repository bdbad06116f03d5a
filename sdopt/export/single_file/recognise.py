"""Which published model a single file is of, by the names and shapes of its tensors."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace

from sdopt.errors import CheckpointError
from sdopt.export.single_file.file import SingleFile
from sdopt.export.single_file.published import DDIM, PUBLISHED, VELOCITY, Published

UNET = "model.diffusion_model."
FIRST = f"{UNET}input_blocks.0.0.weight"
GUIDANCE = f"{UNET}time_embed.cond_proj.weight"
TRANSFORMER = f"({UNET})?(joint|double)_blocks\\.0\\..*"  # of Stable Diffusion 3 and Flux
LAST_NORM = f"{UNET}output_blocks.11.1.transformer_blocks.0.norm1.bias"

# how names of a file without that UNet look -> what it is, and what to do
REFUSED: Mapping[str, str] = {
    r"lora_(unet|te\d?)_.*|.*[._]lora[._]?(up|down|A|B)\..*": (
        "has the tensors of a LoRA; merge it into the model that it was made for, and export that"
    ),
    r"control_model\..*|input_hint_block\..*|controlnet_.*": (
        "has the tensors of a ControlNet; add it to the bundle of the model that it was made for: sdopt export FILE "
        "--onto BUNDLE --name NAME"
    ),
    r"emb_params|string_to_param\..*|clip_[lg]": (
        "holds learnt words; load them into a pipeline with pipe.load_embedding(file)"
    ),
    r"(down_blocks|mid_block|up_blocks)\..*|encoder\.(down|conv_in|layers).*|decoder\..*|text_model\..*": (
        "is one component; export the folder of the pipeline that it belongs to"
    ),
}
EDM = re.compile(r"edm_(mean|std)|edm_vpred\..*")
# channels that a UNet takes beside the 4 of the latents -> what they are
INPUTS = {5: "a depth map", 7: "the small picture (an upscaler)", 8: "a second picture (Pix2Pix)"}
WIDTHS = {768: "sd1", 1024: "sd2", 2048: "sdxl-base", 1280: "sdxl-refiner"}  # of the text that the UNet takes
PLACES = {  # of a text encoder, if the width is no published one
    "cond_stage_model.transformer.": "sd1",
    "cond_stage_model.model.": "sd2",
    "conditioner.embedders.1.": "sdxl-base",
    "conditioner.embedders.0.": "sdxl-refiner",
}


def recognise(file: SingleFile) -> tuple[str, Published]:
    """The name of the published model in PUBLISHED, and its configurations as the file's marks change them.

    Raises: CheckpointError that says what the file is, if it is no such model.
    """
    require_model(file)
    if has_transformer(file):
        raise CheckpointError(
            f"{file.path} is of Stable Diffusion 3 or Flux: name a diffusers folder of the same model, or its id on "
            "the hub, with --config; its configurations and T5's tokenizer are read, and the models that the file lacks"
        )
    kind = _kind(file)
    channels = file.shapes[FIRST][1]
    if channels == 9:
        kind = f"{kind.removesuffix('-base')}-inpaint"
    elif channels != 4:
        takes = INPUTS.get(channels, f"{channels} channels")
        raise CheckpointError(f"{file.path}: its UNet takes {takes}, and not 4 or 9 channels; it is not exported")
    elif GUIDANCE in file.shapes:
        kind = f"{kind.removesuffix('-base')}-lcm"
    elif kind == "sd2" and not _predicts_velocity(file):
        kind = "sd2-base"
    if kind not in PUBLISHED:
        raise CheckpointError(
            f"{file.path} is of none of these models: {', '.join(PUBLISHED)}; name a diffusers folder of the same "
            "model with --config"
        )
    return kind, _marked(file, PUBLISHED[kind])


def require_model(file: SingleFile) -> None:
    """Raises: CheckpointError that says what the file is, if it has no denoiser of the original code."""
    if any(EDM.fullmatch(name) for name in file.shapes):
        raise CheckpointError(f"{file.path} has the noise levels of EDM, which are not exported")
    if len(file.shapes.get(FIRST, ())) == 4 or has_transformer(file):
        return
    for pattern, what in REFUSED.items():
        if any(re.fullmatch(pattern, name) for name in file.shapes):
            raise CheckpointError(f"{file.path} {what}")
    names = ", ".join(sorted(file.shapes)[:3])
    raise CheckpointError(
        f"{file.path} has no UNet in the original layout (no {FIRST}); it has {names or 'no tensors'}. "
        "Give a diffusers folder, or a file with the UNet, the VAE and the text encoder of Stable Diffusion or SDXL"
    )


def has_transformer(file: SingleFile) -> bool:
    """Whether a file has a transformer of Stable Diffusion 3 or Flux, in the names of their own code."""
    return any(re.fullmatch(TRANSFORMER, name) for name in file.shapes)


def _kind(file: SingleFile) -> str:
    """The published model, as if it were one that takes 4 channels."""
    attention = re.compile(re.escape(UNET) + r".*\.attn2\.to_k\.weight")
    width = next((shape[-1] for name, shape in file.shapes.items() if attention.fullmatch(name)), 0)
    if width in WIDTHS:
        return WIDTHS[width]
    return next((kind for place, kind in PLACES.items() if file.has(place)), "sd1")


def _predicts_velocity(file: SingleFile) -> bool:
    """Whether a model of Stable Diffusion 2 predicts velocity: its tensors have equal shapes either way.

    Training on velocity moved the biases of the last norm farther from 0, where they began. Those of a model that was
    never trained are 0: it counts as one of velocity, as in diffusers.
    Ref: github.com/comfyanonymous/ComfyUI, comfy/supported_models.py, SD20.model_type
    """
    if "v_pred" in file.shapes:
        return True
    if "global_step" in file.shapes and int(file.tensor("global_step").flatten()[0]) == 875000:
        return False  # stable-diffusion-2-base. Ref: diffusers, loaders/single_file_utils.py
    if LAST_NORM not in file.shapes:
        return True
    deviation = float(file.tensor(LAST_NORM).float().std(correction=0))
    return deviation == 0 or deviation > 0.09


def _marked(file: SingleFile, published: Published) -> Published:
    """The configurations, with what the marks `v_pred` and `ztsnr` of a file say of its scheduler.

    Ref: github.com/comfyanonymous/ComfyUI, comfy/supported_models.py
    """
    zero_snr = "ztsnr" in file.shapes
    lacks_it = published.scheduler["_class_name"] == "PNDMScheduler"
    scheduler = {
        **(DDIM if zero_snr and lacks_it else published.scheduler),
        **(VELOCITY if "v_pred" in file.shapes else {}),
        **({"rescale_betas_zero_snr": True} if zero_snr else {}),
    }
    index = {**published.index, "scheduler": ["diffusers", scheduler["_class_name"]]}
    return replace(published, index=index, scheduler=scheduler)
