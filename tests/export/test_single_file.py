"""One .safetensors file is the folder that it was made from; it is recognised; and nothing of it is lost in silence."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from sdopt.errors import CheckpointError
from sdopt.export import describe, export, families
from sdopt.export.checkpoint import Checkpoint
from sdopt.export.single_file import clip, convert
from sdopt.export.single_file.file import SingleFile
from sdopt.export.single_file.published import PUBLISHED, Published
from sdopt.export.single_file.recognise import recognise
from sdopt.export.source import open_checkpoint, read_folder
from tests import tiny
from tests.export import ldm

PROJECTED = {"hidden_size": 12, "intermediate_size": 24, "num_hidden_layers": 3, "projection_dim": 12}


def xl_encoder() -> Any:
    """As wide as its projection, as OpenCLIP's is."""
    return tiny.text_encoder(True, **PROJECTED, hidden_act="gelu")


def as_sd2(folder: Path) -> Path:
    encoder = tiny.text_encoder(hidden_act="gelu", num_hidden_layers=3)
    return tiny.sd(folder, text_encoder=encoder, unet=tiny.unet(layers_per_block=2, use_linear_projection=True))


def as_lcm(folder: Path) -> Path:
    from diffusers import LCMScheduler

    unet, scheduler = tiny.unet(time_cond_proj_dim=6), LCMScheduler(**tiny.BETAS)
    return tiny.sd(folder, "LatentConsistencyModelPipeline", unet=unet, scheduler=scheduler)


def as_xl(folder: Path, **changes: Any) -> Path:
    unet = tiny.unet_xl(projection_class_embeddings_input_dim=36, transformer_layers_per_block=(1, 2), **changes)
    return tiny.sdxl(folder, text_encoder_2=xl_encoder(), unet=unet)


def as_refiner(folder: Path) -> Path:
    unet = tiny.unet_xl(5, cross_attention_dim=12, projection_class_embeddings_input_dim=32)
    own: dict[str, Any] = {"requires_aesthetics_score": True, "force_zeros_for_empty_prompt": False}
    own |= {"text_encoder": None, "tokenizer": None, "text_encoder_2": xl_encoder(), "unet": unet}
    return tiny.sdxl(folder, "StableDiffusionXLImg2ImgPipeline", **own)


MODELS: dict[str, Callable[[Path], Path]] = {
    "sd1": tiny.sd,
    "sd1-inpaint": lambda folder: tiny.sd(folder, "StableDiffusionInpaintPipeline", unet=tiny.unet(in_channels=9)),
    "sd1-lcm": as_lcm,
    "sd2": as_sd2,
    "sdxl": as_xl,
    "sdxl-inpaint": lambda folder: as_xl(folder, in_channels=9),
    "sdxl-refiner": as_refiner,
}


@pytest.mark.parametrize("name", MODELS)
def test_a_file_is_the_folder_that_it_was_made_from(name: str, tmp_path: Path) -> None:
    folder = MODELS[name](tmp_path / "folder")
    path = ldm.write_single_file(folder, tmp_path / "model.safetensors", is_open=name == "sd2")
    with open_checkpoint(str(folder)) as original, open_checkpoint(str(path), config=str(folder)) as single:
        assert describe(single).conditioning == describe(original).conditioning
        assert single.classes == original.classes
        for component in set(single.classes) & set(families.models()):
            ours, theirs = single.load(component).state_dict(), original.load(component).state_dict()
            assert ours.keys() == theirs.keys()
            assert all(torch.equal(ours[key], theirs[key]) for key in theirs), component


def test_the_bundle_of_a_file_is_that_of_its_folder(tiny_checkpoint: Path, tiny_bundle: Path, tmp_path: Path) -> None:
    path, target = ldm.write_single_file(tiny_checkpoint, tmp_path / "model.safetensors"), tmp_path / "bundle"
    lines: list[str] = []
    export(path, target, config=str(tiny_checkpoint), offline=True, verify=False, report=lines.append)
    names = {file.relative_to(tiny_bundle) for file in tiny_bundle.rglob("*") if file.is_file()}
    assert names == {file.relative_to(target) for file in target.rglob("*") if file.is_file()}
    differing = {name.name for name in names if (target / name).read_bytes() != (tiny_bundle / name).read_bytes()}
    assert differing == {"manifest.json"}  # which names the source, and says that nothing was verified


# --- nothing is lost in silence


@pytest.fixture
def tensors(tiny_checkpoint: Path, tmp_path: Path) -> dict[str, Any]:
    """Those of a sound file."""
    from safetensors.torch import load_file

    return load_file(ldm.write_single_file(tiny_checkpoint, tmp_path / "sound.safetensors"))


def opened(tensors: dict[str, Any], folder: Path, config: Path) -> Checkpoint:
    from safetensors.torch import save_file

    save_file(tensors, folder / "model.safetensors")
    with open_checkpoint(str(folder / "model.safetensors"), config=str(config), offline=True) as checkpoint:
        return checkpoint


def refusal(tensors: dict[str, Any], folder: Path, config: Path) -> str:
    with pytest.raises(CheckpointError) as error:
        opened(tensors, folder, config)
    return str(error.value)


QUERY = "input_blocks.1.1.transformer_blocks.0.attn1.to_q"


@pytest.mark.parametrize(
    ("name", "parameter"),
    [
        (f"model.diffusion_model.{QUERY}.weight", "unet's down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"),
        ("model.diffusion_model.middle_block.1.norm.bias", "unet's mid_block.attentions.0.norm.bias"),
        ("first_stage_model.decoder.mid.attn_1.q.weight", "vae's decoder.mid_block.attentions.0.to_q.weight"),
        (
            "cond_stage_model.transformer.text_model.final_layer_norm.weight",
            "text_encoder's text_model.final_layer_norm.weight",
        ),
    ],
)
def test_a_tensor_of_another_name_is_in_both_lists(
    name: str, parameter: str, tensors: dict[str, Any], tmp_path: Path, tiny_checkpoint: Path
) -> None:
    module, _, leaf = name.rpartition(".")
    tensors[f"{module}.base_layer.{leaf}"] = tensors.pop(name)
    tensors[f"{module}.lora_up.weight"] = torch.zeros(2, 2)
    message = refusal(tensors, tmp_path, tiny_checkpoint)
    assert f"lack {name} ({parameter}" in message
    assert f"have {module}.base_layer.{leaf}, {module}.lora_up.weight, which the model does not have" in message
    assert "a LoRA that is not merged" in message


def test_a_tensor_of_another_shape_or_of_integers_is_named(
    tensors: dict[str, Any], tmp_path: Path, tiny_checkpoint: Path
) -> None:
    first, last = "model.diffusion_model.input_blocks.0.0.weight", "model.diffusion_model.out.2.bias"
    tensors[first] = torch.zeros(12, 9, 3, 3)
    tensors[last] = tensors[last].to(torch.int8)
    message = refusal(tensors, tmp_path, tiny_checkpoint)
    assert f"of another shape: {first} is (12, 9, 3, 3), unet's conv_in.weight is (12, 4, 3, 3)" in message
    assert f"not floating point numbers: {last} (I8)" in message


def test_a_file_without_a_component_says_which(tensors: dict[str, Any], tmp_path: Path, tiny_checkpoint: Path) -> None:
    rest = {name: tensor for name, tensor in tensors.items() if not name.startswith("first_stage_model.")}
    message = refusal(rest, tmp_path, tiny_checkpoint)
    assert re.search(r"lack first_stage_model\.encoder\.conv_in\.\w+ \(vae's encoder.conv_in.\w+\)", message)


def test_weights_that_are_not_finite_are_named_before_anything_is_traced(
    tensors: dict[str, Any], tmp_path: Path, tiny_checkpoint: Path
) -> None:
    tensors["first_stage_model.encoder.conv_in.bias"][0] = float("nan")
    opened(tensors, tmp_path, tiny_checkpoint)
    lines: list[str] = []
    with pytest.raises(CheckpointError, match=r"model.safetensors.vae: encoder.conv_in.bias has NaN") as caught:
        export(tmp_path / "model.safetensors", tmp_path / "bundle", config=str(tiny_checkpoint), report=lines.append)
    assert str(caught.value).startswith(str(tmp_path / "model.safetensors"))  # and not a folder that is gone
    assert not lines


def test_what_published_files_have_beside_their_models_is_no_fault(
    tensors: dict[str, Any], tmp_path: Path, tiny_checkpoint: Path
) -> None:
    levels = "alphas_cumprod alphas_cumprod_prev betas log_one_minus_alphas_cumprod posterior_mean_coef1 logvar"
    levels += " posterior_mean_coef2 posterior_variance posterior_log_variance_clipped sqrt_alphas_cumprod"
    levels += " sqrt_one_minus_alphas_cumprod sqrt_recip_alphas_cumprod sqrt_recipm1_alphas_cumprod global_step"
    tensors |= {name: torch.zeros(3) for name in levels.split()}
    tensors |= {
        "model_ema.diffusion_modelinput_blocks00weight": torch.zeros(3),
        "first_stage_model.loss.logvar": torch.zeros(3),
        "cond_stage_model.transformer.text_model.embeddings.position_ids": torch.arange(7)[None],
        "cond_stage_model.logit_scale": torch.zeros(1),
    }
    assert opened(tensors, tmp_path, tiny_checkpoint).provenance["file"] == "model.safetensors"


def test_the_last_layer_of_openclip_is_skipped_as_stable_diffusion_2_does(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    folder = as_sd2(tmp_path / "folder")
    tensors = load_file(ldm.write_single_file(folder, tmp_path / "sound.safetensors", is_open=True))
    place = "cond_stage_model.model.transformer.resblocks."
    last = {
        f"{place}3.{name.removeprefix(f'{place}2.')}": tensor.clone()
        for name, tensor in tensors.items()
        if name.startswith(f"{place}2.")
    }
    last |= {"cond_stage_model.model.text_projection": torch.zeros(20, 20)}
    opened({**tensors, **last}, tmp_path, folder)
    beyond = {f"{place}4.ln_1.bias": torch.zeros(20)}
    assert f"have {place}4.ln_1.bias" in refusal({**tensors, **beyond}, tmp_path, folder)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn])
def test_weights_keep_their_values_in_every_precision(
    dtype: torch.dtype, tensors: dict[str, Any], tmp_path: Path, tiny_checkpoint: Path
) -> None:
    from safetensors.torch import save_file

    stored = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    save_file(stored, tmp_path / "model.safetensors")
    with open_checkpoint(str(tmp_path / "model.safetensors"), config=str(tiny_checkpoint)) as checkpoint:
        weight = checkpoint.load("unet").state_dict()["conv_in.weight"]
    assert torch.equal(weight, stored["model.diffusion_model.input_blocks.0.0.weight"].float())


# --- which model a file is of


def shapes_of(published: Published, folder: Path) -> dict[str, tuple[int, ...]]:
    """The names and shapes of a full-size file of a published model."""
    published.write(folder)
    checkpoint = read_folder(folder, None, {})
    parts = {name: checkpoint.shapes(name) for name in families.of(checkpoint).models if checkpoint.has(name)}
    meta = {
        part: {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
        for part, shapes in parts.items()
    }
    merged = ldm.one_file(meta, is_open=published.title.startswith("Stable Diffusion 2"))
    shapes = {name: tuple(tensor.shape) for name, tensor in merged.items()}
    for name in shapes:
        if re.search(r"first_stage_model\..*attn_1\.(q|k|v|proj_out)\.weight", name):
            shapes[name] = (*shapes[name], 1, 1)  # convolutions of one pixel
    return shapes


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_published_model_is_recognised_by_its_tensors_at_full_size(name: str, tmp_path: Path) -> None:
    shapes = shapes_of(PUBLISHED[name], tmp_path / "folder")
    if name == "sd2-base":
        shapes["global_step"] = (1,)
    path = ldm.write_header(shapes, tmp_path / "model.safetensors")
    if name == "sd2-base":
        ldm.fill(path, "global_step", torch.tensor([875000]))
    file = SingleFile.open(path)
    kind, published = recognise(file)
    assert kind == name
    checkpoint = read_folder(tmp_path / "folder", None, {})
    family = families.of(checkpoint)
    models = {part: checkpoint.shapes(part) for part in family.models if checkpoint.has(part)}
    plan = convert.plan(file, models, family.single_file, "")
    assert {part: origins.keys() for part, origins in plan.items()} == {p: s.keys() for p, s in models.items()}
    assert published.scheduler["prediction_type"] == ("v_prediction" if name == "sd2" else "epsilon")


@pytest.mark.parametrize(("deviation", "kind"), [(0.0, "sd2"), (0.05, "sd2-base"), (0.2, "sd2")])
def test_stable_diffusion_2_shows_what_it_predicts_in_its_last_norm(
    deviation: float, kind: str, tmp_path: Path
) -> None:
    shapes = shapes_of(PUBLISHED["sd2"], tmp_path / "folder")
    path = ldm.write_header(shapes, tmp_path / "model.safetensors")
    bias = torch.tensor([deviation, -deviation]).repeat(160).half()
    ldm.fill(path, "model.diffusion_model.output_blocks.11.1.transformer_blocks.0.norm1.bias", bias)
    assert recognise(SingleFile.open(path))[0] == kind


@pytest.mark.parametrize("name", ["sd1", "sdxl-base"])
def test_the_marks_of_a_file_decide_its_scheduler(name: str, tmp_path: Path) -> None:
    shapes = {**shapes_of(PUBLISHED[name], tmp_path / "folder"), "v_pred": (0,), "ztsnr": (0,)}
    kind, published = recognise(SingleFile.open(ldm.write_header(shapes, tmp_path / "model.safetensors")))
    assert kind == name
    assert published.scheduler["prediction_type"] == "v_prediction"
    assert published.scheduler["rescale_betas_zero_snr"] is True
    published.write(tmp_path / "marked")
    import diffusers

    scheduler = getattr(diffusers, published.index["scheduler"][1]).from_pretrained(tmp_path / "marked/scheduler")
    assert scheduler.alphas_cumprod[-1] < 1e-6


FIRST = {"model.diffusion_model.input_blocks.0.0.weight": (320, 4, 3, 3)}


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ({"lora_unet_mid_block.lora_down.weight": (4, 4)}, "has the tensors of a LoRA; merge it"),
        ({"control_model.input_blocks.0.0.weight": (4, 4)}, "tensors of a ControlNet; add it to the bundle"),
        ({"model.diffusion_model.joint_blocks.0.x": (4, 4)}, "is of Stable Diffusion 3 or Flux: name a diffus"),
        ({"double_blocks.0.img_attn.norm.key_norm.scale": (4,)}, "--config; .* and the models that the file lacks"),
        ({"emb_params": (4, 4)}, r"holds learnt words; load them .* pipe.load_embedding"),
        ({"decoder.conv_in.weight": (4, 4)}, "is one component; export the folder"),
        ({"down_blocks.0.resnets.0.norm1.bias": (4,)}, "is one component; export the folder"),
        ({"something": (4,)}, r"no UNet in the original layout .*; it has something\. Give a diffusers folder"),
        ({}, "it has no tensors"),
        ({"model.diffusion_model.input_blocks.0.0.weight": (320, 8, 3, 3)}, r"takes a second picture \(Pix2Pix\)"),
        ({"model.diffusion_model.input_blocks.0.0.weight": (320, 5, 3, 3)}, "takes a depth map"),
        ({"model.diffusion_model.input_blocks.0.0.weight": (320, 6, 3, 3)}, "takes 6 channels, and not 4 or 9"),
        ({**FIRST, "edm_mean": (4,)}, "noise levels of EDM"),
        ({**FIRST, "cond_stage_model.model.x": (4,), "model.diffusion_model.time_embed.cond_proj.weight": (4, 4)},
         "is of none of these models: sd1, .*--config"),
    ],
)  # fmt: skip
def test_a_file_of_something_else_says_what_it_is(
    shapes: dict[str, tuple[int, ...]], message: str, tmp_path: Path
) -> None:
    path = ldm.write_header(shapes, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=message):
        recognise(SingleFile.open(path))


def test_a_config_that_is_nowhere_says_what_there_is(tmp_path: Path) -> None:
    path = ldm.write_header(FIRST, tmp_path / "model.safetensors")
    message = r"--config sd3: there is no such folder; give a diffusers folder of the same model.*sd1, sd1-inpaint"
    with pytest.raises(CheckpointError, match=message), open_checkpoint(str(path), config="sd3"):
        pass


def test_a_named_config_is_taken_instead_of_the_recognised_one(tmp_path: Path) -> None:
    path = ldm.write_header(FIRST, tmp_path / "model.safetensors")
    lacking = pytest.raises(CheckpointError, match="lack conditioner.embedders.0")
    with lacking as error, open_checkpoint(str(path), config="sdxl-base"):
        pass
    assert "The configurations are those that --config sdxl-base names" in str(error.value)


# --- CLIP's tokenizer


@pytest.mark.parametrize(("pad", "number"), [(clip.END, 49407), ("!", 0)])
def test_the_tokenizer_is_that_of_clip(pad: str, number: int, tmp_path: Path) -> None:
    from transformers import CLIPTokenizer

    clip.write_tokenizer(tmp_path / "tokenizer", pad)
    tokenizer = CLIPTokenizer.from_pretrained(tmp_path / "tokenizer", local_files_only=True)
    # Ref: docs of transformers, CLIPTokenizer, and github.com/openai/CLIP, clip.tokenize("a photo of a cat")
    assert tokenizer("a photo of a cat").input_ids == [49406, 320, 1125, 539, 320, 2368, 49407]
    assert (len(tokenizer), tokenizer.model_max_length, tokenizer.pad_token_id) == (49408, 77, number)
