"""A family is one module and one row: what the rest of the export knows of it, it reads from the registry."""

from __future__ import annotations

import ast
import importlib
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sdopt.bundle.format import Conditioning, Defaults
from sdopt.errors import CheckpointError
from sdopt.export import describe, families, presets
from sdopt.export.families import sd
from sdopt.export.families.contract import Family, PipelineClass
from sdopt.export.source import open_folder
from tests.conftest import EMOJI_CHECKPOINT, ROOT

by_name = pytest.mark.parametrize("family", families.FAMILIES, ids=lambda family: family.name)


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    return Path(shutil.copytree(EMOJI_CHECKPOINT, tmp_path / "checkpoint"))


def edit_index(folder: Path, **changes: Any) -> None:
    path = folder / "model_index.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@by_name
def test_a_family_names_classes_and_pipelines_that_the_libraries_have(family: Family) -> None:
    import diffusers

    for class_name in {name for names in (*family.models.values(), *family.tokenizers.values()) for name in names}:
        library, name = class_name.split(".")
        assert getattr(importlib.import_module(library), name)
    assert all(getattr(diffusers, name) for name in family.pipelines)
    assert family.single_file.keys() == family.models.keys()


@by_name
def test_what_a_family_says_of_itself_agrees(family: Family) -> None:
    assert {traced.model for traced in family.components.values()} == set(family.models)
    assert {*family.optional} <= {*family.models, *family.tokenizers}
    assert not {*family.not_used} & {*family.models, *family.tokenizers}
    assert family.denoiser in family.models
    layers = (
        family.defaults,
        family.guidance_embedding,
        *family.schedulers.values(),
        *family.named_models.values(),
        *(pipeline.defaults for pipeline in family.pipelines.values()),
    )
    for layer in layers:
        assert set(layer) <= set(presets.KEYS)
    assert {*family.defaults, "height", "width"} == {*presets.KEYS}


def test_no_two_families_read_the_same_pipeline() -> None:
    pipelines = [name for family in families.FAMILIES for name in family.pipelines]
    assert len(pipelines) == len(set(pipelines))
    assert len({family.name for family in families.FAMILIES}) == len(families.FAMILIES)


def test_a_familys_name_is_written_in_its_own_module_alone() -> None:
    for path in (ROOT / "sdopt/export").rglob("*.py"):
        strings = {
            node.value
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.Constant) and isinstance(node.value, str)
        }
        written = {family.name for family in families.FAMILIES} & strings
        assert written <= {path.stem}, path


@pytest.fixture
def invented(monkeypatch: pytest.MonkeyPatch) -> Family:
    """A family of its own: it reads PixArt's pipeline class, and differs from Stable Diffusion in a few facts."""

    def conditioning(checkpoint: Any) -> Conditioning:
        return replace(sd.conditioning(checkpoint), zeros_for_empty=True)

    family = replace(
        sd.FAMILY,
        name="invented",
        pipelines={"PixArtAlphaPipeline": PipelineClass(defaults={"guidance_scale": 4.5})},
        models={**sd.FAMILY.models, "image_encoder": ("transformers.CLIPVisionModel",)},
        optional=("image_encoder",),
        not_used=(),
        conditioning=conditioning,
        has_safety_checker=False,
        float16_unsafe=lambda checkpoint: ("text_encoder",),
        defaults={**sd.FAMILY.defaults, "num_inference_steps": 20},
    )
    monkeypatch.setattr(families, "FAMILIES", (*families.FAMILIES, family))
    return family


def test_one_row_is_enough_for_a_new_family(invented: Family, copy: Path) -> None:
    (copy / "generation_config.json").unlink()  # its entries would come before the family's
    edit_index(copy, _class_name="PixArtAlphaPipeline", safety_checker=[None, None], requires_safety_checker=True)
    checkpoint = open_folder(copy, None, {})
    assert families.of(checkpoint) is invented
    manifest = describe(checkpoint)
    assert manifest.family == "invented"
    assert manifest.conditioning.zeros_for_empty
    assert manifest.float16_unsafe == ("text_encoder",)
    assert not manifest.requires_safety_checker
    expected = {**sd.FAMILY.defaults, "num_inference_steps": 20, "guidance_scale": 4.5, "height": 128, "width": 128}
    assert manifest.defaults == Defaults(**expected)
    assert list(invented.builds(checkpoint)) == ["text_encoder", "unet", "vae_decoder", "vae_encoder"]


def test_errors_name_what_the_registry_reads(invented: Family, copy: Path) -> None:
    edit_index(copy, _class_name="OtherPipeline", prior=["diffusers", "T"], text_encoder_4=["transformers", "T"])
    message = r"its prior, text_encoder_4 are not exported; .* has a transformer or a unet\); .*, PixArtAlphaPipeline$"
    with pytest.raises(CheckpointError, match=message):
        open_folder(copy, None, {})
    edit_index(copy, _class_name="PixArtAlphaPipeline", prior=None, text_encoder_4=None)
    edit_index(copy, image_encoder=["transformers", "T5Model"])
    message = "image_encoder is transformers.T5Model; sdopt reads transformers.CLIPVisionModel, and never runs"
    with pytest.raises(CheckpointError, match=message):
        open_folder(copy, None, {})


def test_a_component_of_another_family_is_refused(copy: Path) -> None:
    edit_index(copy, text_encoder_2=["transformers", "CLIPTextModelWithProjection"])
    with pytest.raises(CheckpointError, match=r"text_encoder_2 is transformers\..*; sdopt reads nothing under this"):
        open_folder(copy, None, {})
