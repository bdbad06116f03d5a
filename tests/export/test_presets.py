"""A bundle's defaults: what the caller says, else the checkpoint, else what is known of the model."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sdopt.bundle.format import Manifest
from sdopt.errors import CheckpointError, UsageError
from sdopt.export import describe, families
from sdopt.export.families.contract import Family
from sdopt.export.source import open_checkpoint, open_folder
from tests import tiny
from tests.conftest import EMOJI_CHECKPOINT

Described = Callable[..., Manifest]


@pytest.fixture
def described(tiny_checkpoint: Path, tmp_path: Path) -> Described:
    """The manifest of a copy of a checkpoint, with entries of its configurations changed."""

    def make(checkpoint: Path = tiny_checkpoint, hub_id: str | None = None, **files: Any) -> Manifest:
        folder = tiny.variant(checkpoint, tmp_path / "copy")
        for name, changes in files.items():
            file = folder / {"index": "model_index.json", "own": "generation_config.json"}.get(
                name, f"{name}/config.json"
            )
            before = json.loads(file.read_text()) if file.exists() else {}
            file.write_text(json.dumps({**before, **changes}))
        return describe(open_folder(folder, None, {"hub_id": hub_id}))

    return make


NAMED = [(family, name) for family in families.FAMILIES for name in family.named_models]
CHECKPOINTS = {"sd": "tiny_checkpoint", "sdxl": "sdxl_checkpoint", "sd3": "sd3_checkpoint", "flux": "flux_checkpoint"}


@pytest.mark.parametrize(("family", "name"), NAMED, ids=[name for _, name in NAMED])
def test_a_model_is_known_by_its_name_wherever_that_stands(
    family: Family, name: str, described: Described, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    import shutil

    checkpoint = request.getfixturevalue(CHECKPOINTS[family.name])
    for where in (
        {"hub_id": name},
        {"index": {"_name_or_path": name.lower()}},
        {family.denoiser: {"_name_or_path": name}},
    ):
        assert family.named_models[name].items() <= vars(described(checkpoint, **where).defaults).items()
        shutil.rmtree(tmp_path / "copy")


def test_what_the_checkpoint_says_comes_before_its_name_and_the_caller_before_both(described: Described) -> None:
    defaults = described(
        hub_id="stabilityai/sd-turbo", own={"num_inference_steps": 3, "width": 40, "top_p": 1}
    ).defaults
    assert (defaults.num_inference_steps, defaults.guidance_scale, defaults.width) == (3, 0.0, 40)
    with open_checkpoint(str(EMOJI_CHECKPOINT)) as checkpoint:
        plain, requested = describe(checkpoint).defaults, describe(checkpoint, 7, 2.5).defaults
        assert requested == replace(plain, num_inference_steps=7, guidance_scale=2.5)
        for steps, guidance, message in ((0, None, "steps = 0"), (None, float("nan"), "guidance = nan")):
            with pytest.raises(UsageError, match=message):
                describe(checkpoint, steps, guidance)


def test_a_size_that_stands_nowhere_is_asked_for(described: Described) -> None:
    with pytest.raises(CheckpointError, match=r"does not tell height, width of its pictures; add them to its gen"):
        described(unet={"sample_size": None})


def test_a_default_that_is_no_number_is_refused(described: Described) -> None:
    with pytest.raises(CheckpointError, match=r"generation_config.json: guidance_scale is 'high', not a number"):
        described(own={"guidance_scale": "high"})


@pytest.mark.parametrize(("changes", "unsafe"), [({}, True), ({"force_upcast": False}, False)])
def test_sdxls_vae_overflows_in_half_precision_unless_it_says_that_it_does_not(
    changes: dict, unsafe: bool, described: Described, sdxl_checkpoint: Path
) -> None:
    assert described(sdxl_checkpoint, vae=changes).float16_unsafe == ("vae_decoder", "vae_encoder") * unsafe


def test_other_vaes_do_not_overflow(described: Described) -> None:
    assert described(vae={"force_upcast": True}).float16_unsafe == ()


@pytest.mark.parametrize(("changes", "unsafe"), [({}, ()), ({"upcast_attention": True}, ("unet",))])
def test_attention_that_overflows_in_half_precision_is_recorded(
    changes: dict, unsafe: tuple, described: Described
) -> None:
    assert described(unet=changes).float16_attention_unsafe == unsafe


@pytest.mark.parametrize("required", [True, False])
def test_a_safety_checker_that_the_checkpoint_requires_is_recorded(required: bool, described: Described) -> None:
    assert described(index={"requires_safety_checker": required}).requires_safety_checker is required


def test_sdxl_has_no_safety_checker_to_require(described: Described, sdxl_checkpoint: Path) -> None:
    assert not described(sdxl_checkpoint, index={"requires_safety_checker": True}).requires_safety_checker
