"""What a request of AUTOMATIC1111's API wants: its fields as keywords of a picture, the model, and the LoRAs.

prompt            read with prompt_style "a1111"; its <lora:...> tags name LoRAs of the startup table
seed, n images    image i has seed + i
hires fix         "Latent" alone: `hires`, `hires_strength`, `hires_steps`
mask              white, or opaque, is painted; it is prepared here as the web UI prepares it
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, cast

from PIL import Image, ImageFilter, ImageOps

from sdopt.adapters.lora.tags import cut
from sdopt.dataclass import dataclass
from sdopt.errors import UsageError
from sdopt.image import masks
from sdopt.samplers import SAMPLERS
from sdopt.samplers.labels import from_labels
from sdopt.serve.context import Context
from sdopt.serve.fields import limit_default, options_of, picture
from sdopt.serve.orders import Encoding
from sdopt.serve.replies import HttpError
from sdopt.serve.sdapi_fields import FIELD_OF, IMG2IMG, KEYWORD_OF, LATENT, SETTINGS, TXT2IMG, read, refuse
from sdopt.serve.settings import Settings
from sdopt.serve.tasks import Wish

FORMATS: dict[str, Literal["PNG", "JPEG", "WEBP"]] = {"png": "PNG", "jpg": "JPEG", "jpeg": "JPEG", "webp": "WEBP"}
SAME = ("prompt", "negative_prompt", "steps", "cfg_scale", "width", "height")  # fields that are their keyword
PREVIEWS = 10  # of each image, for progress
IMG2IMG_STRENGTH = 0.75
FILL, ORIGINAL = 0, 1  # of inpainting_fill


@dataclass(frozen=True)
class Request:
    """A request, read: `fields` has every field, `settings` those of the model."""

    fields: Mapping[str, Any]
    settings: Mapping[str, Any]
    wish: Wish


def model_named(context: Context, name: str | None) -> str:
    """The served bundle of a checkpoint's name, title or hash; without a name the first. Raises: HttpError 404, 503."""
    first = context.model(None)
    if name is None:
        return first
    for own, described in context.models.items():
        digest = str(described["digest"])
        if name in (own, title(own, described), digest, digest[:10]):
            return own
    there = ", ".join(title(own, described) for own, described in context.models.items())
    raise HttpError(404, f"sd_model_checkpoint {name!r} not found; there are {there}", "sd_model_checkpoint")


def title(name: str, described: Mapping[str, Any]) -> str:
    """A checkpoint as the web UI shows it."""
    return f"{name} [{str(described['digest'])[:10]}]"


def txt2img(context: Context, body: Mapping[str, Any], settings: Mapping[str, Any], caller: str) -> Request:
    """Raises: HttpError 404, 422 that name the field."""
    if not body.get("enable_hr"):  # what is off is not read
        body = {name: value for name, value in body.items() if not name.startswith(("hr_", "firstphase_"))}
    fields = read(body, TXT2IMG)
    own: dict[str, Any] = {}
    if fields["enable_hr"]:
        if fields["hr_upscaler"] != LATENT:
            text = f"hr_upscaler {fields['hr_upscaler']!r} is not there; there is {LATENT}"
            raise refuse("hr_upscaler", text)
        own = {
            "hires": fields["hr_scale"],
            "hires_strength": fields["denoising_strength"],
            "hires_steps": fields["hr_second_pass_steps"] or None,
        }
    return _request(context, fields, settings, caller, own)


def img2img(context: Context, body: Mapping[str, Any], settings: Mapping[str, Any], caller: str) -> Request:
    """Raises: HttpError 404, 422 that name the field."""
    fields = read(body, IMG2IMG)
    if fields["init_images"] is None:
        raise refuse("init_images", "init_images is missing; send one picture in base64")
    settings = _settings(fields, settings)
    defaults = context.models[model_named(context, settings["sd_model_checkpoint"])]["defaults"]
    size = fields["width"] or defaults["width"], fields["height"] or defaults["height"]
    if size[0] * size[1] > max(context.settings.max_pixels, defaults["width"] * defaults["height"]):
        text = f"{size[0]}x{size[1]} pixels; this server makes pictures of up to {context.settings.max_pixels}"
        raise refuse("width", text)
    strength = fields["denoising_strength"]
    own = {"strength": IMG2IMG_STRENGTH if strength is None else strength, **_pictures(fields, size, context.settings)}
    return _request(context, fields, settings, caller, own)


def _pictures(fields: Mapping[str, Any], size: tuple[int, int], limits: Settings) -> dict[str, Any]:
    """The keywords of the picture to begin from, and of its mask."""
    image, mode = picture("init_images", fields["init_images"][0], limits), fields["resize_mode"]
    if mode == 3:
        raise refuse("resize_mode", "resize_mode 3 (latent) is not there; there are 0, 1 and 2")
    if not fields["mask"]:
        return {"image": _resized(image, mode, size)}
    if fields["inpainting_fill"] not in (FILL, ORIGINAL):
        text = f"inpainting_fill {fields['inpainting_fill']} (latents) is not there; there are 0 and 1"
        raise refuse("inpainting_fill", text)
    mask, blur = _mask(picture("mask", fields["mask"], limits)), _blur(fields)
    if fields["inpainting_mask_invert"]:
        mask = ImageOps.invert(mask)
    if not fields["inpaint_full_res"]:
        image, mask = _resized(image, mode, size), _resized(mask, mode, size)
    if mask.size != image.size:
        text = f"mask is {mask.width}x{mask.height} pixels, and init_images[0] {image.width}x{image.height}"
        raise refuse("mask", f"{text}; send pictures of one size")
    if fields["inpainting_fill"] == FILL:
        image = masks.filled_from_around(image, mask.filter(ImageFilter.GaussianBlur(blur)))
    own: dict[str, Any] = {"image": image, "mask_image": mask, "mask_blur": blur}
    if fields["inpaint_full_res"]:
        own["padding_mask_crop"] = fields["inpaint_full_res_padding"]
    return own


def _mask(image: Image.Image) -> Image.Image:
    """White where the picture is painted: a mask with transparency is painted where it is opaque."""
    if "A" in image.getbands():
        alpha = image.getchannel("A")
        if alpha.getextrema() != (255, 255):
            return alpha.point([255 * (shade > 128) for shade in range(256)])
    return image.convert("L")


def _blur(fields: Mapping[str, Any]) -> float:
    """The radius of the mask's blur. Raises: HttpError 422 where the two directions differ."""
    x, y = fields["mask_blur_x"], fields["mask_blur_y"]
    one = x if y is None else y
    if one is None:
        return float(fields["mask_blur"])
    if x != y:
        raise refuse("mask_blur_x", f"mask_blur_x = {x} and mask_blur_y = {y}; allowed is one radius: mask_blur")
    return float(one)


def _resized(image: Image.Image, mode: int, size: tuple[int, int]) -> Image.Image:
    """A picture as resize_mode 1 (crop) and 2 (fill) make it; what mode 0 makes, the pipeline makes itself."""
    if mode == 0 or image.size == size:
        return image
    image = image if image.mode == "L" else image.convert("RGB")
    return masks.covering(image, *size) if mode == 1 else masks.filled(image, *size)


def _settings(fields: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """The caller's settings with those that this request overrides."""
    given: Mapping[str, Any] = fields["override_settings"] or {}
    read(given, SETTINGS, "override_settings")
    return {**settings, **{name: value for name, value in given.items() if value is not None}}


def _request(
    context: Context, fields: dict[str, Any], settings: Mapping[str, Any], caller: str, own: Mapping[str, Any]
) -> Request:
    settings = _settings(fields, settings)
    bundle = model_named(context, settings["sd_model_checkpoint"])
    _refuse_scripts(fields["alwayson_scripts"] or {})
    described = context.models[bundle]
    prompt, loras = _loras(fields, described)
    options = {KEYWORD_OF[name]: fields[name] for name in SAME if fields[name] not in (None, "")}
    options |= {"prompt": prompt, "prompt_style": "a1111", **_sampling(fields), **own}
    if fields["seed"] >= 0:
        options["seed"] = fields["seed"]
    if settings["CLIP_stop_at_last_layers"] > 1:
        options["clip_skip"] = settings["CLIP_stop_at_last_layers"] - 1
    number = fields["batch_size"] * fields["n_iter"]
    if number > context.settings.max_images:
        text = f"batch_size {fields['batch_size']} x n_iter {fields['n_iter']}: {number} images"
        raise refuse("batch_size", f"{text}; this server makes up to {context.settings.max_images} a request")
    try:
        options = options_of(options, (), context.settings)
        limit_default(options, described, context.settings)
    except HttpError as error:
        raise renamed(error) from error
    wish = Wish(
        bundle, options, number, loras, caller, Encoding(FORMATS[settings["samples_format"]]),
        PREVIEWS if described["has_previews"] else 0,
    )  # fmt: skip
    return Request(fields, settings, wish)


def _sampling(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The keywords of the sampler. Raises: HttpError 404 for one that is unknown, as the web UI does; 422."""
    name = fields["sampler_name"] or fields["sampler_index"]
    eta, scheduler = fields["eta"], fields["scheduler"]
    if not name:
        return _scheduler_alone(scheduler) | ({} if eta in (None, 1) else {"eta": eta})
    try:
        sampler, schedule = from_labels(name, scheduler)
    except UsageError as error:
        if error.param == "schedule":
            raise refuse("scheduler", str(error)) from error
        raise HttpError(404, f"Sampler not found: sampler_name: {error}", "sampler_name", "not_found") from error
    own = {"sampler": sampler} if schedule is None else {"sampler": sampler, "schedule": schedule}
    entry = SAMPLERS[sampler]
    if entry.takes_eta:
        return own if eta is None else {**own, "eta": eta}
    if eta not in (None, 1) and (eta or entry.stochastic):
        raise refuse("eta", f"eta {eta}: {name} adds the noise that its rows have; leave it out")
    return own


def _scheduler_alone(scheduler: str | None) -> dict[str, Any]:
    """The schedule of the checkpoint's own sampler."""
    try:
        schedule = from_labels("Euler", scheduler)[1]
    except UsageError as error:
        raise refuse("scheduler", str(error)) from error
    return {} if schedule is None else {"schedule": schedule}


def _refuse_scripts(scripts: Mapping[str, Any]) -> None:
    """Raises: HttpError 422 for a script that does something; clients send others with no arguments."""
    for name, script in scripts.items():
        args: Any = cast("dict[str, Any]", script).get("args", []) if isinstance(script, dict) else script
        if args not in ([], [False], None):
            raise refuse("alwayson_scripts", f"alwayson_scripts: there is no script {name}; leave it out")


def _loras(fields: Mapping[str, Any], described: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """The prompt without its tags, and the weights of the LoRAs that they name."""
    try:
        prompt, tags = cut(fields["prompt"])
        if cut(fields["negative_prompt"])[1]:
            raise refuse("negative_prompt", "negative_prompt has a <lora:...> tag; tags belong into prompt")
    except UsageError as error:
        raise refuse("prompt", str(error)) from error
    count = int(described["text_encoders"])
    parts = (described["denoiser"], *(f"text_encoder{'' if i == 0 else f'_{i + 1}'}" for i in range(count)))
    weights: dict[str, Any] = {}
    for tag in tags:
        if tag.name not in described["loras"]:
            there = ", ".join(described["loras"]) or "none; sdopt serve --lora NAME=FILE adds one"
            raise refuse("prompt", f"<lora:{tag.name}>: there is no such LoRA; there are {there}")
        weights[tag.name] = tag.unet if tag.unet == tag.text_encoder else tag.weights(parts)
    return prompt, weights


def renamed(error: HttpError) -> HttpError:
    """An error of a keyword, as that of the field which stands for it."""
    field = FIELD_OF.get(error.param or "", error.param)
    text = error.message if field is None or field in error.message else f"{field}: {error.message}"
    return HttpError(error.status, text, field, error.code, error.retry_after)
