"""The fields of AUTOMATIC1111's txt2img and img2img, each declared once, and the keywords that they stand for.

A field with a meaning here has the kind of its keyword. A field that this server has nothing for may have the value
that asks for nothing, and no other. What a request leaves out is the bundle's own.
Ref: AUTOMATIC1111/stable-diffusion-webui, modules/api/models.py, modules/processing.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sdopt.errors import UsageError, choices
from sdopt.request.keyword import Keyword
from sdopt.request.keywords import KEYWORDS
from sdopt.request.kinds import Choice, Integer, Number, Switch
from sdopt.serve.kinds import Base64, List, Matching, Only, Table, Text
from sdopt.serve.replies import HttpError

LATENT = "Latent"
ID = Matching("[A-Za-z0-9][A-Za-z0-9().:_-]{0,79}", "up to 80 letters, digits, '-', '_' and brackets")  # "task(abc)"
KEYWORD_OF = {  # field -> keyword; errors of a keyword name the field
    "prompt": "prompt",
    "negative_prompt": "negative_prompt",
    "steps": "num_inference_steps",
    "cfg_scale": "guidance_scale",
    "width": "width",
    "height": "height",
    "seed": "seed",
    "eta": "eta",
    "sampler_name": "sampler",
    "scheduler": "schedule",
    "hr_scale": "hires",
    "hr_second_pass_steps": "hires_steps",
    "denoising_strength": "strength",
    "init_images": "image",
    "mask": "mask_image",
    "mask_blur": "mask_blur",
    "inpaint_full_res_padding": "padding_mask_crop",
}
FIELD_OF = {  # keyword -> field; what has no field of its own is in another one
    **{keyword: field for field, keyword in KEYWORD_OF.items()},
    "hires_strength": "denoising_strength",
    "size": "width",
    "lora": "prompt",
    "adapter_weights": "prompt",
    "clip_skip": "override_settings",
    "model": "override_settings",
}


def _like(field: str, default: Any = None, help: str = "") -> Keyword:
    """A field that is a keyword under another name."""
    keyword = KEYWORDS[KEYWORD_OF[field]]
    return Keyword(help or keyword.help, keyword.kind, default, keyword.otherwise)


def _only(*values: Any, instead: str) -> Keyword:
    return Keyword(f"not there: {instead}", Only(values, instead), values[0])


_ONE_NOISE = "images are made from one seed; send another seed"
_SAMPLERS_OWN = "samplers add the noise that their own rows have"
_SAME_MODEL = "both passes have the same model, sampler and prompts; leave it out"
_BOTH: dict[str, Keyword] = {
    "prompt": Keyword("what to draw; (word:1.3) and <lora:name:0.8> have their meaning", Text(), ""),
    "negative_prompt": Keyword("what to steer away from", Text(), ""),
    "seed": Keyword("of the first image; image i has seed + i; -1 draws one", Integer(-1, 2**64 - 1), -1),
    "steps": _like("steps"),
    "cfg_scale": _like("cfg_scale"),
    "width": _like("width"),
    "height": _like("height"),
    "sampler_name": Keyword("GET /sdapi/v1/samplers lists them", Text('"Euler a"'), None, "the checkpoint's own"),
    "sampler_index": Keyword("the older name of sampler_name", Text('"Euler a"'), None, "the checkpoint's own"),
    "scheduler": Keyword("GET /sdapi/v1/schedulers lists them", Text('"Karras"'), None, "the sampler's own"),
    "batch_size": Keyword("images at once", Integer(1, 64), 1),
    "n_iter": Keyword("how many times batch_size images", Integer(1, 64), 1),
    "eta": Keyword("the noise of DDIM and TCD", Number(0, 1), None, "the sampler's own"),
    "denoising_strength": Keyword("how much is replaced, 0 to 1", Number(0, 1), None, "0.75, of hires fix 0.7"),
    "override_settings": Keyword("sd_model_checkpoint, CLIP_stop_at_last_layers, samples_format", Table()),
    "override_settings_restore_afterwards": Keyword("false keeps override_settings for later requests", Switch(), True),
    "send_images": Keyword("whether the answer has the images", Switch(), True),
    "do_not_save_samples": Keyword("no file is ever written", Switch(), False),
    "do_not_save_grid": Keyword("no file is ever written", Switch(), False),
    "force_task_id": Keyword("the id of this request, for progress and interrupt", ID),
    # what this server has nothing for
    "styles": _only([], instead="there are no styles; write them into prompt"),
    "subseed": _only(-1, 0, instead=_ONE_NOISE),
    "subseed_strength": _only(0, instead=_ONE_NOISE),
    "seed_resize_from_h": _only(-1, 0, instead=_ONE_NOISE),
    "seed_resize_from_w": _only(-1, 0, instead=_ONE_NOISE),
    "s_churn": _only(0, instead=_SAMPLERS_OWN),
    "s_tmin": _only(0, instead=_SAMPLERS_OWN),
    "s_tmax": _only(0, instead=_SAMPLERS_OWN),
    "s_noise": _only(1, instead=_SAMPLERS_OWN),
    "s_min_uncond": _only(0, instead="send guidance_interval to /v1/images/generations"),
    "restore_faces": _only(False, instead="there is no face restorer"),
    "tiling": _only(False, instead="pictures have edges"),
    "save_images": _only(False, instead="this server writes no files; the answer has the images"),
    "script_name": _only("", instead="there are no scripts"),
    "script_args": _only([], instead="there are no scripts"),
    "alwayson_scripts": Keyword("scripts with args [] alone: there are none", Table(), None),
    "infotext": _only("", instead="send its values as fields; POST /sdapi/v1/png-info reads them"),
    "comments": _only({}, instead="a picture carries what makes it again, and nothing else"),
    "disable_extra_networks": _only(False, instead="leave out the <lora:...> tags"),
    "refiner_checkpoint": _only("", instead="there is no refiner"),
    "refiner_switch_at": _only(0, 1, instead="there is no refiner"),
}
TXT2IMG: dict[str, Keyword] = {
    **_BOTH,
    "enable_hr": Keyword("hires fix: the image is made small, then enlarged with new details", Switch(), False),
    "hr_scale": _like("hr_scale", 2.0),
    "hr_upscaler": Keyword("of hires fix", Text(f'"{LATENT}"'), LATENT),
    "hr_second_pass_steps": Keyword("steps of the second pass; 0: the same", Integer(0), 0),
    "hr_resize_x": _only(0, instead="send hr_scale"),
    "hr_resize_y": _only(0, instead="send hr_scale"),
    "hr_checkpoint_name": _only("", "Use same checkpoint", instead=_SAME_MODEL),
    "hr_sampler_name": _only("", "Use same sampler", instead=_SAME_MODEL),
    "hr_scheduler": _only("", "Use same scheduler", instead=_SAME_MODEL),
    "hr_prompt": _only("", instead=_SAME_MODEL),
    "hr_negative_prompt": _only("", instead=_SAME_MODEL),
    "firstphase_width": _only(0, instead="width is that of the first pass"),
    "firstphase_height": _only(0, instead="height is that of the first pass"),
}
IMG2IMG: dict[str, Keyword] = {
    **_BOTH,
    "init_images": Keyword("one picture to begin from", List(Base64(), 1, 1), optional=False),
    "mask": Keyword("white, or opaque where it has transparency: painted anew", Base64()),
    "mask_blur": _like("mask_blur", 4.0),
    "mask_blur_x": Keyword("mask_blur, which is the same in both directions", Number(0, 1000)),
    "mask_blur_y": Keyword("mask_blur, which is the same in both directions", Number(0, 1000)),
    "mask_round": _only(True, instead="a pixel is painted or kept"),
    "inpainting_mask_invert": Keyword("1 paints what is black", Integer(0, 1), 0),
    "inpainting_fill": Keyword("what is under the mask at first: 0 colours around it, 1 the picture", Integer(0, 3), 0),
    "inpaint_full_res": Keyword("paint only the mask's region, at full size", Switch(), True),
    "inpaint_full_res_padding": _like("inpaint_full_res_padding", 0),
    "resize_mode": Keyword("0 stretch, 1 crop, 2 fill the bars beside it", Integer(0, 3), 0),
    "include_init_images": Keyword("whether parameters of the answer has them", Switch(), False),
    "initial_noise_multiplier": _only(1, instead="noise has the sampler's own size"),
    "image_cfg_scale": Keyword("for models that edit by instruction; there is none", Number(0, 100), None),
    "latent_mask": _only("", instead="send mask"),
}
SETTINGS: dict[str, Keyword] = {
    "sd_model_checkpoint": Keyword("GET /sdapi/v1/sd-models lists them", Text('"emoji"'), None, "the first one"),
    "CLIP_stop_at_last_layers": Keyword("1 uses all layers of the text encoder", Integer(1, 12), 1),
    "samples_format": Keyword("of the images", Choice(("png", "jpg", "jpeg", "webp"), '"png"'), "png"),
}


def refuse(field: str, text: str) -> HttpError:
    """The error of a field that is wrong."""
    return HttpError(422, text, field, "invalid_value")


def read(body: Mapping[str, Any], table: Mapping[str, Keyword], where: str = "") -> dict[str, Any]:
    """Every field of a table, checked, with the default of those that are left out or null.

    Raises: HttpError 422 that names the field; `where`: the field that has these.
    """
    for name in body:
        if name not in table:
            there = choices(name, table)
            raise refuse(where or name, f"unknown field {name}; there are {there}")
    try:
        return {
            name: field.default if body.get(name) is None else field.check(name, body[name])
            for name, field in table.items()
        }
    except UsageError as error:
        raise refuse(where or error.param or "", str(error)) from error
