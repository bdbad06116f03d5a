"""A single file of Stable Diffusion 3 or Flux is the folder that it was made from, in the original code's names."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from sdopt.errors import CheckpointError
from sdopt.export import describe, families
from sdopt.export.source import open_checkpoint
from tests import tiny
from tests.export import ldm

Weights = dict[str, Any]
LEAVES = ("weight", "bias")


def joint(weights: Weights, block: str, *parts: str) -> Weights:
    """The leaves of modules of a block, one after another."""
    names = [[f"{block}.{part}.{leaf}" for part in parts] for leaf in LEAVES]
    return {
        leaf: torch.cat([weights.pop(name) for name in own])
        for leaf, own in zip(LEAVES, names, strict=True)
        if own[0] in weights
    }


def exchanged(tensor: Any) -> Any:
    first, second = tensor.chunk(2)
    return torch.cat([second, first])


def put(target: Weights, name: str, leaves: Weights) -> None:
    target |= {f"{name}.{leaf}": tensor for leaf, tensor in leaves.items()}


def common(weights: Weights, names: dict[str, str]) -> Weights:
    """What stands outside of the blocks."""
    made: Weights = {}
    for own, theirs in names.items():
        if f"{own}.weight" in weights:  # Flux schnell has no guidance
            made |= {f"{theirs}.{leaf}": weights.pop(f"{own}.{leaf}") for leaf in LEAVES}
    for leaf in LEAVES:
        made[f"final_layer.adaLN_modulation.1.{leaf}"] = exchanged(weights.pop(f"norm_out.linear.{leaf}"))
    return made


def original_sd3(weights: Weights) -> Weights:
    """A transformer of Stable Diffusion 3 as its own code has it. Ref: github.com/Stability-AI/sd3.5, mmditx.py"""
    weights = dict(weights)
    last = max(int(name.split(".")[1]) for name in weights if name.startswith("transformer_blocks."))
    made = common(weights, {
        "pos_embed.proj": "x_embedder.proj", "context_embedder": "context_embedder", "proj_out": "final_layer.linear",
        "time_text_embed.timestep_embedder.linear_1": "t_embedder.mlp.0",
        "time_text_embed.timestep_embedder.linear_2": "t_embedder.mlp.2",
        "time_text_embed.text_embedder.linear_1": "y_embedder.mlp.0",
        "time_text_embed.text_embedder.linear_2": "y_embedder.mlp.2",
    })  # fmt: skip
    made["pos_embed"] = weights.pop("pos_embed.pos_embed")
    for i in range(last + 1):
        ours = f"transformer_blocks.{i}"
        x, context = (f"joint_blocks.{i}.{side}_block" for side in ("x", "context"))
        put(made, f"{x}.attn.qkv", joint(weights, ours, "attn.to_q", "attn.to_k", "attn.to_v"))
        put(made, f"{context}.attn.qkv", joint(weights, ours, "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"))
        put(made, f"{x}.attn2.qkv", joint(weights, ours, "attn2.to_q", "attn2.to_k", "attn2.to_v"))
        for own, theirs in {
            "attn.to_out.0": f"{x}.attn.proj", "attn.to_add_out": f"{context}.attn.proj",
            "attn.norm_q": f"{x}.attn.ln_q", "attn.norm_k": f"{x}.attn.ln_k",
            "attn.norm_added_q": f"{context}.attn.ln_q", "attn.norm_added_k": f"{context}.attn.ln_k",
            "attn2.to_out.0": f"{x}.attn2.proj", "attn2.norm_q": f"{x}.attn2.ln_q", "attn2.norm_k": f"{x}.attn2.ln_k",
            "norm1.linear": f"{x}.adaLN_modulation.1", "norm1_context.linear": f"{context}.adaLN_modulation.1",
            "ff.net.0.proj": f"{x}.mlp.fc1", "ff.net.2": f"{x}.mlp.fc2",
            "ff_context.net.0.proj": f"{context}.mlp.fc1", "ff_context.net.2": f"{context}.mlp.fc2",
        }.items():  # fmt: skip
            leaves = joint(weights, ours, own)
            is_last_norm = i == last and own == "norm1_context.linear"
            put(made, theirs, {k: exchanged(t) for k, t in leaves.items()} if is_last_norm else leaves)
    assert not weights
    return made


def original_flux(weights: Weights) -> Weights:
    """A transformer of Flux as its own code has it. Ref: github.com/black-forest-labs/flux, src/flux/model.py"""
    weights = dict(weights)
    embedders = {"timestep_embedder": "time_in", "text_embedder": "vector_in", "guidance_embedder": "guidance_in"}
    outside = {"x_embedder": "img_in", "context_embedder": "txt_in", "proj_out": "final_layer.linear"}
    for own, theirs in embedders.items():
        for n, layer in ((1, "in_layer"), (2, "out_layer")):
            outside[f"time_text_embed.{own}.linear_{n}"] = f"{theirs}.{layer}"
    made = common(weights, outside)
    blocks = {name.split(".")[1] for name in weights if name.startswith("transformer_blocks.")}
    for i in blocks:
        ours, theirs = f"transformer_blocks.{i}", f"double_blocks.{i}"
        put(made, f"{theirs}.img_attn.qkv", joint(weights, ours, "attn.to_q", "attn.to_k", "attn.to_v"))
        added = joint(weights, ours, "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj")
        put(made, f"{theirs}.txt_attn.qkv", added)
        for own, other in {
            "attn.to_out.0": "img_attn.proj", "attn.to_add_out": "txt_attn.proj", "norm1.linear": "img_mod.lin",
            "norm1_context.linear": "txt_mod.lin", "ff.net.0.proj": "img_mlp.0", "ff.net.2": "img_mlp.2",
            "ff_context.net.0.proj": "txt_mlp.0", "ff_context.net.2": "txt_mlp.2",
        }.items():  # fmt: skip
            put(made, f"{theirs}.{other}", joint(weights, ours, own))
        for side, sign in (("img", ""), ("txt", "added_")):
            for kind, letter in (("query", "q"), ("key", "k")):
                scale = weights.pop(f"{ours}.attn.norm_{sign}{letter}.weight")
                made[f"{theirs}.{side}_attn.norm.{kind}_norm.scale"] = scale
    for i in {name.split(".")[1] for name in weights}:
        ours, theirs = f"single_transformer_blocks.{i}", f"single_blocks.{i}"
        put(made, f"{theirs}.linear1", joint(weights, ours, "attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"))
        put(made, f"{theirs}.linear2", joint(weights, ours, "proj_out"))
        put(made, f"{theirs}.modulation.lin", joint(weights, ours, "norm.linear"))
        for kind, letter in (("query", "q"), ("key", "k")):
            made[f"{theirs}.norm.{kind}_norm.scale"] = weights.pop(f"{ours}.attn.norm_{letter}.weight")
    assert not weights
    return made


KINDS: dict[str, tuple[Callable[[Weights], Weights], dict[str, str]]] = {
    "sd3": (original_sd3, {"text_encoder": "clip_l", "text_encoder_2": "clip_g", "text_encoder_3": "t5xxl"}),
    "flux": (original_flux, {"text_encoder": "clip_l", "text_encoder_2": "t5xxl"}),
}


def one_file(kind: str, folder: Path, path: Path) -> Path:
    """All components of a folder in one file."""
    from safetensors.torch import load_file, save_file

    original, encoders = KINDS[kind]
    files = {part: load_file(next((folder / part).glob("*.safetensors"))) for part in ("transformer", "vae", *encoders)}
    merged = {f"model.diffusion_model.{name}": tensor for name, tensor in original(files["transformer"]).items()}
    blocks = 1 + max(int(name.split(".")[2]) for name in files["vae"] if name.startswith("decoder.up_blocks."))
    merged |= {f"first_stage_model.{ldm.vae_name(name, blocks)}": tensor for name, tensor in files["vae"].items()}
    for part, place in encoders.items():
        bare = place != "t5xxl" and not any(name.startswith("text_model.") for name in files[part])
        wrapper = "text_model." if bare else ""  # which transformers from 5.6 on drops
        named = {f"text_encoders.{place}.transformer.{wrapper}{name}": t for name, t in files[part].items()}
        merged |= named
        if place != "t5xxl":
            merged[f"text_encoders.{place}.logit_scale"] = torch.ones(())
    save_file({name: tensor.contiguous() for name, tensor in merged.items()}, path)
    return path


@pytest.fixture(scope="module", params=KINDS)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, Path]:
    folder = tmp_path_factory.mktemp(request.param)
    made = getattr(tiny, request.param)(folder / "checkpoint")
    return request.param, made, one_file(request.param, made, folder / "model.safetensors")


def test_a_file_is_the_folder_that_it_was_made_from(pair: tuple[str, Path, Path]) -> None:
    _, folder, path = pair
    with open_checkpoint(str(folder)) as original, open_checkpoint(str(path), config=str(folder)) as single:
        assert describe(single).conditioning == describe(original).conditioning
        for component in set(single.classes) & set(families.models()):
            ours, theirs = single.load(component).state_dict(), original.load(component).state_dict()
            assert ours.keys() == theirs.keys()
            assert all(torch.equal(ours[key], theirs[key]) for key in theirs), component


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_what_a_file_lacks_is_read_where_its_configurations_are(
    prefix: str, pair: tuple[str, Path, Path], tmp_path: Path
) -> None:
    """As flux1-dev.safetensors has the transformer alone, and sd3.5_medium.safetensors that with a VAE."""
    from safetensors.torch import load_file, save_file

    _, folder, path = pair
    own, file = "model.diffusion_model.", tmp_path / "model.safetensors"
    tensors = {name: tensor + 1 for name, tensor in load_file(path).items() if name.startswith(own)}
    save_file({name.replace(own, prefix): tensor for name, tensor in tensors.items()}, file)
    with open_checkpoint(str(folder)) as original, open_checkpoint(str(file), config=str(folder)) as single:
        for component in set(single.classes) & set(families.models()):
            ours, theirs = single.load(component).state_dict(), original.load(component).state_dict()
            more = {name: float(component == "transformer") for name in theirs}
            assert all(torch.equal(ours[name], theirs[name] + more[name]) for name in theirs), component
    assert "--config" in refusal(file)
    empty = Path(shutil.copytree(folder, tmp_path / "empty"))
    next((empty / "vae").glob("*.safetensors")).unlink()
    assert f"has no vae, and {empty} has no safetensors weights of it; name a folder" in refusal(file, empty)


def test_sd3s_original_names_are_those_that_diffusers_converts_from() -> None:
    from diffusers.loaders.single_file_utils import convert_sd3_transformer_checkpoint_to_diffusers

    weights = tiny.transformer_sd3().state_dict()
    converted = convert_sd3_transformer_checkpoint_to_diffusers(original_sd3(weights))
    assert converted.keys() == weights.keys()
    assert all(torch.equal(converted[name], weights[name]) for name in weights)


def refusal(source: Path, config: Path | None = None) -> str:
    """What the export says of a checkpoint that it refuses."""
    with (
        pytest.raises(CheckpointError) as error,
        open_checkpoint(str(source), config=None if config is None else str(config)),
    ):
        pass
    return str(error.value)


def test_a_file_says_what_it_needs(pair: tuple[str, Path, Path], tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    _, folder, path = pair
    assert "is of Stable Diffusion 3 or Flux: name a diffusers folder" in refusal(path)
    tensors = load_file(path)
    first = next(name for name in tensors if name.endswith(("x_block.attn.qkv.weight", "img_attn.qkv.weight")))
    query = "transformer's transformer_blocks.0.attn.to_q.weight"
    for changed, message in (
        ({name: tensor for name, tensor in tensors.items() if name != first}, f"({query})"),
        ({**tensors, first: torch.cat([tensors[first], tensors[first][:1]])}, f"{query} is"),
        ({**tensors, "model.diffusion_model.more.weight": torch.ones(2)}, "model.diffusion_model.more.weight"),
    ):
        save_file(changed, tmp_path / "model.safetensors")
        assert message in refusal(tmp_path / "model.safetensors", folder)


def test_an_unknown_component_class_is_refused(pair: tuple[str, Path, Path], tmp_path: Path) -> None:
    copy = Path(shutil.copytree(pair[1], tmp_path / "copy"))
    path = copy / "model_index.json"
    other = {"transformer": ["diffusers", "SanaTransformer2DModel"]}
    path.write_text(json.dumps({**json.loads(path.read_text()), **other}))
    assert "transformer is diffusers.SanaTransformer2DModel; sdopt reads" in refusal(copy)
