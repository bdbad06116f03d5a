"""A model beside a bundle: what fits it is added whole, everything else is said, and the bundle stays as it is."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from sdopt.bundle.adapter import adapter_names, open_adapter
from sdopt.bundle.files import Bundle
from sdopt.errors import BundleError, CheckpointError, SdoptError, UsageError
from sdopt.export.onto import add_adapter
from tests.adapters.nets import controlnet
from tests.conftest import EMOJI_BUNDLE, edit_manifest, sdopt


@pytest.fixture(scope="module")
def net(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("net") / "canny"
    controlnet(tiny_checkpoint).save_pretrained(folder)
    return folder


@pytest.fixture
def own_bundle(tiny_bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))


def quiet(line: str) -> None: ...


def test_it_is_added_replaced_with_force_and_removed_with_its_folder(net: Path, own_bundle: Path) -> None:
    before = Bundle.open(own_bundle).digest
    phases: list[tuple[str, int, int]] = []
    target = add_adapter(net, own_bundle, "canny", report=quiet, progress=lambda *phase: phases.append(phase))
    assert target == own_bundle / "adapters/canny"
    assert [phase for phase, _, _ in phases] == ["reading the weights", "tracing controlnet", "checking controlnet"]
    bundle = Bundle.open(own_bundle)
    adapter = open_adapter(bundle, "canny")
    assert bundle.digest == before
    assert adapter.manifest.source == {"folder": "canny"}
    assert min(result.psnr_db for result in adapter.component("controlnet").parity) >= 80
    with pytest.raises(BundleError, match="exists already; choose another name, or replace a bundle with --force"):
        add_adapter(net, own_bundle, "canny", report=quiet)
    add_adapter(net, own_bundle, "canny", report=quiet, force=True)
    assert open_adapter(Bundle.open(own_bundle), "canny").digest == adapter.digest
    shutil.rmtree(target)
    assert adapter_names(bundle) == ()


def test_a_bundle_with_adapters_is_not_replaced(net: Path, own_bundle: Path, tiny_checkpoint: Path) -> None:
    from sdopt.export import export

    target = add_adapter(net, own_bundle, "canny", report=quiet)
    with pytest.raises(BundleError, match="has adapters, which would be lost: canny. Move "):
        export(tiny_checkpoint, own_bundle, force=True, report=pytest.fail)
    assert (target / "manifest.json").is_file()


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "width": ({"cross_attention_dim": 32}, "cross_attention_dim is 32: the bundle's text has 20 features"),
    "channels": ({"in_channels": 9}, "in_channels is 9: the bundle's latents have 4"),
    "hint": ({"conditioning_embedding_out_channels": [6]}, r"it makes its picture 1 times smaller"),
    "labels": ({"num_class_embeds": 3}, "num_class_embeds is 3: it takes class labels"),
    "kind": ({"addition_embed_type": "text_time"}, "addition_embed_type is 'text_time': the bundle's UNet is given"),
    "weights": ({"layers_per_block": 2}, r"cannot be loaded: [\s\S]*controlnet_down_blocks\.3"),
    "class": ({"_class_name": "UNet2DConditionModel"}, "its class is UNet2DConditionModel; what can be added"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_model_that_does_not_fit_is_refused_and_nothing_is_left(
    case: str, net: Path, own_bundle: Path, tmp_path: Path
) -> None:
    changes, message = WRONG[case]
    folder = Path(shutil.copytree(net, tmp_path / "net"))
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    with pytest.raises(CheckpointError, match=message):
        add_adapter(folder, own_bundle, "canny", report=pytest.fail)
    assert not (own_bundle / "adapters").exists()


def test_a_net_of_other_sizes_is_made_for_another_model(net: Path, own_bundle: Path) -> None:
    """Its width fits, its residuals do not."""
    import torch
    from diffusers import ControlNetModel

    config = ControlNetModel.load_config(net)
    torch.manual_seed(0)
    ControlNetModel.from_config({**config, "block_out_channels": [12, 24]}).save_pretrained(own_bundle / "net")
    with pytest.raises(CheckpointError, match="channels, and the UNet of .* it is made for another model"):
        add_adapter(own_bundle / "net", own_bundle, "canny", report=quiet)


@pytest.mark.parametrize("name", ["", "a b", "../x", "a/b", "x" * 65, None])
def test_a_name_that_no_folder_has_is_refused(name: Any, net: Path, own_bundle: Path) -> None:
    with pytest.raises(UsageError, match="allowed are up to 64 letters"):
        add_adapter(net, own_bundle, name, report=quiet)


def test_sources_that_are_no_model_are_named(tiny_checkpoint: Path, own_bundle: Path, tmp_path: Path) -> None:
    for source, message in ((tiny_checkpoint, "is a whole pipeline"), (tmp_path / "no", "there is no such folder")):
        with pytest.raises(CheckpointError, match=message):
            add_adapter(source, own_bundle, "canny", report=quiet)


def test_a_bundle_of_an_earlier_sdopt_is_exported_again(net: Path, own_bundle: Path) -> None:
    manifest = json.loads((own_bundle / "manifest.json").read_text())
    del manifest["components"]["unet_controlled"]
    edit_manifest(own_bundle, components=manifest["components"], format_version=2)
    with pytest.raises(BundleError, match="has no component unet_controlled: .* Export it again"):
        add_adapter(net, own_bundle, "canny", report=quiet)


def test_a_parity_below_the_floor_adds_nothing(net: Path, own_bundle: Path) -> None:
    with pytest.raises(SdoptError, match="the graph is not the model"):
        add_adapter(net, own_bundle, "canny", report=quiet, floor_db=500.0)
    assert not (own_bundle / "adapters").exists()


COMMANDS: dict[str, tuple[tuple[str, ...], str]] = {
    "nowhere": ((), "say where to: -o BUNDLE"),
    "both": (("-o", "x", "--onto", "y", "--name", "a"), "-o and --onto: give one of the two"),
    "nameless": (("--onto", str(EMOJI_BUNDLE)), "--onto needs --name NAME"),
    "name alone": (("-o", "x", "--name", "a"), "--name a needs --onto"),
    "steps": (("--onto", str(EMOJI_BUNDLE), "--name", "a", "--steps", "3"), "--steps is for a bundle"),
    "no bundle": (("--onto", "no/such", "--name", "a"), "--onto no/such: there is no such folder"),
}


@pytest.mark.parametrize("case", COMMANDS)
def test_the_command_says_what_is_missing_before_it_imports_pytorch(case: str, capsys: Any) -> None:
    from sdopt.cli.main import main

    words, message = COMMANDS[case]
    assert main(["export", "x", *words]) == 2
    assert message in capsys.readouterr().err


def test_the_commands_add_show_and_use_it(net: Path, own_bundle: Path, tmp_path: Path) -> None:
    from tests.adapters.nets import edges

    edges().save(tmp_path / "edges.png")
    done = sdopt("export", net, "--onto", own_bundle, "--name", "canny")
    assert (done.returncode, done.stdout.strip()) == (0, str(own_bundle / "adapters/canny")), done.stderr
    shown = sdopt("inspect", own_bundle).stdout
    assert "controlnet, folder canny" in shown
    entry = json.loads(sdopt("inspect", own_bundle, "--json").stdout)["adapters"][0]
    assert (entry["name"], entry["kind"]) == ("canny", "controlnet")
    picture = tmp_path / "a.png"
    generate = ("generate", "apple", "-m", own_bundle, "--steps", "2", "-o", picture, "--control")
    done = sdopt(*generate, f"canny={tmp_path / 'edges.png'}:0.8", "--json")
    made = json.loads(done.stdout)["images"][0]
    assert made["controls"][0]["name"] == "canny"
    assert made["controlnet_conditioning_scale"] == [0.8]
    for words, message in (
        (("cany=edges.png",), "there is no such file"),
        ((f"canny={tmp_path / 'edges.png'}", "--control", f"canny={tmp_path / 'edges.png'}"), "is given 2 times"),
        ((f"canny={tmp_path / 'edges.png'}:1", "--control-scale", "2"), "give one of the two"),
    ):
        done = sdopt(*generate, *words)
        assert (done.returncode, message in done.stderr) == (2, True), done.stderr
    done = sdopt("generate", "--replay", picture, "-m", own_bundle, "-o", tmp_path / "b.png")
    assert "was made with ControlNets, whose pictures it does not carry" in done.stderr
