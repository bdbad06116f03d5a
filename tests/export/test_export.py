"""An exported graph is the model it came from, or there is no bundle."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import sdopt
from sdopt.bundle.files import Bundle
from sdopt.bundle.format import Defaults, Latents
from sdopt.engine import ort
from sdopt.errors import BundleError, CheckpointError, ParityError, UsageError
from sdopt.export import export, families, parity, trace
from sdopt.export.checkpoint import Checkpoint
from sdopt.export.component import Phases, write_component
from sdopt.export.families import sd
from sdopt.export.part import Part
from sdopt.export.source import open_checkpoint
from sdopt.metrics import psnr
from tests.conftest import EMOJI_BUNDLE, EMOJI_CHECKPOINT, ROOT, hears_interrupts
from tests.conftest import sdopt as command


def test_the_manifest_tells_where_a_bundle_came_from_and_how_well_it_matches(tiny_bundle: Path) -> None:
    manifest = Bundle.open(tiny_bundle).manifest
    assert manifest.family == "sd"
    assert manifest.verified is True
    assert manifest.source == {"folder": "checkpoint"}
    assert set(manifest.versions) == {"sdopt", "torch", "diffusers", "transformers"}
    assert manifest.scheduler["_class_name"] == "PNDMScheduler"
    assert manifest.latents == Latents(channels=4, factor=2, scaling_factor=0.7, shift_factor=0.0)
    assert manifest.defaults == Defaults(
        height=24, width=24, num_inference_steps=50, guidance_scale=7.5,
        strength=0.8, inpaint_strength=1.0, strength_cuts="steps",
    )  # fmt: skip
    for entry in manifest.components.values():
        sizes = [tuple(p.sizes.items()) for p in entry.parity]
        assert len(set(sizes)) == 2
        assert all(p.psnr_db >= 80 and p.max_error < 1e-3 for p in entry.parity)


def test_inputs_outputs_and_their_dimensions_have_the_fields_names(tiny_bundle: Path) -> None:
    bundle = Bundle.open(tiny_bundle)
    found = {
        name: [*map(str, bundle.component(name).inputs), *map(str, bundle.component(name).outputs)]
        for name in bundle.components
        if bundle.manifest.components[name].weights_of is None
    }
    assert found == {
        "text_encoder": [
            "input_ids int32 [batch, tokens]",
            "extra_embeddings float32 [extra_tokens, 20]",
            "last_hidden_state float32 [batch, tokens, 20]",
            "hidden_states float32 [batch, 3, tokens, 20]",
        ],
        "unet": [
            "sample float32 [images, 4, latent_height, latent_width]",
            "timestep float32 [images]",
            "encoder_hidden_states float32 [batch, tokens, 20]",
            "noise_pred float32 [batch, 4, latent_height, latent_width]",
        ],
        "vae_decoder": [
            "latent_sample float32 [batch, 4, latent_height, latent_width]",
            "sample float32 [batch, 3, height, width]",
        ],
        "vae_encoder": [
            "sample float32 [batch, 3, height, width]",
            "mean float32 [batch, 4, latent_height, latent_width]",
            "logvar float32 [batch, 4, latent_height, latent_width]",
        ],
    }


@pytest.mark.parametrize("name", ["text_encoder", "unet", "vae_decoder", "vae_encoder"])
def test_graphs_are_valid_standard_onnx_without_a_trace_of_the_machine(name: str) -> None:
    path = EMOJI_BUNDLE / f"{name}.onnx"
    onnx.checker.check_model(str(path), full_check=False)
    model = onnx.load(path, load_external_data=False)
    assert {i.domain for i in model.opset_import} <= {"", "ai.onnx"}
    assert not model.functions
    assert not any(n.metadata_props or n.doc_string for n in model.graph.node)
    text = path.read_bytes()
    assert b"/home/" not in text
    assert b"site-packages" not in text
    assert str(ROOT).encode() not in text


def test_a_float16_checkpoint_keeps_its_size_and_its_float32_interface() -> None:
    model = onnx.load(EMOJI_BUNDLE / "unet.onnx", load_external_data=False)
    assert {i.type.tensor_type.elem_type for i in model.graph.input} == {onnx.TensorProto.FLOAT}
    weights = (EMOJI_CHECKPOINT / "unet/diffusion_pytorch_model.safetensors").stat().st_size
    assert (EMOJI_BUNDLE / "unet.onnx.data").stat().st_size < 1.02 * weights


def test_float32_weights_are_stored_as_they_are(tiny_bundle: Path) -> None:
    manifest = Bundle.open(tiny_bundle).manifest
    assert {c.weights for c in manifest.components.values()} == {"float32"}


def test_the_shipped_bundle_is_what_the_shipped_checkpoint_exports_to() -> None:
    bundle = Bundle.open(EMOJI_BUNDLE)
    with open_checkpoint(str(EMOJI_CHECKPOINT)) as checkpoint:
        assert bundle.manifest.scheduler == checkpoint.config("scheduler")
        for build in families.of(checkpoint).builds(checkpoint).values():
            part = build(checkpoint)
            component = bundle.component(part.name)
            assert (component.inputs, component.outputs) == (part.inputs, part.outputs)
            parity.gate(part, parity.measure(part, component.graph))


def test_opset_18_unverified_by_the_command(tiny_checkpoint: Path, tiny_bundle: Path, tmp_path: Path) -> None:
    """Older parsers get the same picture; --no-verify is recorded; the command prints its table and the path."""
    done = command("export", tiny_checkpoint, "-o", tmp_path / "old", "--opset", 18, "--no-verify")
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{tmp_path / 'old'}\n"
    lines = done.stderr.splitlines()
    assert [line.split()[0] for line in lines[:7]] == [
        "component",
        "unet",
        "unet_controlled",
        "unet_ip_adapter",
        "text_encoder",
        "vae_decoder",
        "vae_encoder",
    ]
    assert all(line.endswith("unverified") for line in lines[1:5])
    manifest = Bundle.open(tmp_path / "old").manifest
    assert manifest.verified is False
    assert not any(c.parity for c in manifest.components.values())
    assert onnx.load(tmp_path / "old/unet.onnx", load_external_data=False).opset_import[0].version == 18
    pictures = [
        sdopt.load(b)("a", seed=1, num_inference_steps=3, output_type="np").images
        for b in (tmp_path / "old", tiny_bundle)
    ]
    np.testing.assert_allclose(*pictures, atol=1e-4)


def test_an_opset_that_cannot_be_written_is_refused(tiny_checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="opset = 17; allowed are 18"):
        export(tiny_checkpoint, tmp_path / "b", opset=17, report=lambda line: None)


@pytest.mark.parametrize(
    ("arguments", "param"),
    [
        ({"source": 5}, "source"),
        ({"source": None}, "source"),
        ({"source": b"checkpoint"}, "source"),
        ({"target": None}, "target"),
        ({"target": b"bundle"}, "target"),
        ({"floor_db": "80"}, "floor_db"),
        ({"floor_db": None}, "floor_db"),
        ({"floor_db": float("nan")}, "floor_db"),
        ({"config": 5}, "config"),
        ({"revision": 5}, "revision"),
        ({"variant": b"fp16"}, "variant"),
        ({"variant": "fp16"}, "variant"),
        ({"opset": "23"}, "opset"),
        ({"steps": "20"}, "steps"),
        ({"steps": 1001}, "steps"),
        ({"guidance": "7"}, "guidance"),
        ({"guidance": float("inf")}, "guidance"),
        ({"verify": "no"}, "verify"),
        ({"offline": None}, "offline"),
        ({"report": 5}, "report"),
        ({"progress": 5}, "progress"),
    ],
    ids=str,
)
def test_an_argument_that_is_not_allowed_is_named(arguments: dict[str, Any], param: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=rf"^{param}( = |: )") as error:
        export(**{"source": EMOJI_CHECKPOINT, "target": tmp_path / "b", **arguments})
    assert error.value.param == param
    assert not list(tmp_path.iterdir())


def test_below_the_parity_floor_nothing_is_written(least_checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(ParityError, match=r"unet: the graph is not the model: .* dB.*floor is 199"):
        export(least_checkpoint, tmp_path / "b", floor_db=199.9, report=lambda line: None)
    assert not list(tmp_path.iterdir())


def test_a_graph_with_one_changed_weight_fails_the_gate(tmp_path: Path) -> None:
    with open_checkpoint(str(EMOJI_CHECKPOINT)) as checkpoint:
        part = sd.encoder_part(checkpoint)
    graph = tmp_path / "text_encoder.onnx"
    trace.save(trace.trace(part), graph)
    parity.gate(part, parity.measure(part, graph))
    next(part.module.parameters()).data.mul_(1.01)
    with pytest.raises(ParityError, match="text_encoder"):
        parity.gate(part, parity.measure(part, graph))


def test_a_model_is_let_go_before_its_graph_is_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a large model is in memory once: as PyTorch's, then as the graph."""
    from torch.multiprocessing.reductions import StorageWeakRef

    weights: list[StorageWeakRef] = []
    alive: list[int] = []

    def build(checkpoint: Checkpoint) -> Part:
        part = sd.encoder_part(checkpoint)
        weights.extend(StorageWeakRef(weight.untyped_storage()) for weight in part.module.parameters())
        return part

    class Watched(ort.OrtEngine):
        def __init__(self, *args: Any, **options: Any) -> None:
            alive.append(sum(not weight.expired() for weight in weights))
            super().__init__(*args, **options)

    monkeypatch.setattr(ort, "OrtEngine", Watched)
    with open_checkpoint(str(EMOJI_CHECKPOINT)) as checkpoint:
        entries = write_component(build, checkpoint, tmp_path, 23, parity.FLOOR_DB, lambda line: None, Phases(None, 1))
    assert entries["text_encoder"].parity
    assert len(weights) > 10
    assert alive == [0]


def test_nan_in_an_output_never_passes_the_gate() -> None:
    assert psnr(np.ones(3), np.array([1, np.nan, 1])) == -np.inf
    assert psnr(np.ones(3), np.ones(3)) == 200
    assert psnr(np.array([10.0, 0]), np.array([10.0, 0.1 * 2**0.5])) == pytest.approx(40)


def with_scheduler(checkpoint: Path, name: str, **options: object) -> None:
    """Give a checkpoint another scheduler, as diffusers saves it: its class is in the index and in its own file."""
    path, index = checkpoint / "scheduler/scheduler_config.json", checkpoint / "model_index.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "_class_name": name, **options}))
    index.write_text(json.dumps({**json.loads(index.read_text()), "scheduler": ["diffusers", name]}))


def test_a_scheduler_that_cannot_be_a_table_is_refused_before_the_work(tiny_checkpoint: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(tiny_checkpoint, tmp_path / "copy")
    with_scheduler(copy, "DDIMScheduler", thresholding=True)
    with pytest.raises(CheckpointError, match="thresholding"):
        export(copy, tmp_path / "b", report=lambda line: None)
    assert not (tmp_path / "b").exists()


def test_an_existing_target_is_refused_before_the_work(tiny_bundle: Path) -> None:
    with pytest.raises(BundleError, match="exists already"):
        export("no/such-model", tiny_bundle)


@pytest.mark.parametrize("signal_number", [signal.SIGKILL, signal.SIGINT])
def test_a_killed_export_leaves_no_bundle(
    least_checkpoint: Path, tmp_path: Path, signal_number: signal.Signals
) -> None:
    target = tmp_path / "b"
    process = subprocess.Popen(
        [sys.executable, "-m", "sdopt", "export", str(least_checkpoint), "-o", str(target)],
        stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL, env={**os.environ}, preexec_fn=hears_interrupts,
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob(".b.tmp-*/text_encoder.onnx.data")) and time.monotonic() < deadline:
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal_number)
    code = process.wait(60)
    assert not target.exists()
    if signal_number == signal.SIGINT:
        assert code == 130
        assert not list(tmp_path.iterdir())
    with pytest.raises(CheckpointError, match="no such folder or file"):  # the next export cleans up first
        export("no/such/model", target)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["nothing/at/all"], 3, "there is no such folder or file"),
        (["owner/name", "--offline"], 3, "not in the local cache"),
        (["model.ckpt"], 3, "there is no such folder or file"),
        ([EMOJI_CHECKPOINT, "--opset", "9"], 2, "--opset 9; allowed are 18"),
        ([EMOJI_CHECKPOINT, "--steps", "0"], 2, "--steps 0; allowed are whole numbers from 1 to 1000"),
        ([EMOJI_CHECKPOINT, "--steps", "5000"], 2, "error: --steps 5000; allowed are whole numbers from 1 to 1000"),
        ([EMOJI_CHECKPOINT, "--floor", "nan"], 2, "--floor nan; allowed are decibels from 0 on"),
        ([EMOJI_CHECKPOINT, "--revision", "nope"], 2, "--revision nope: "),
        ([EMOJI_CHECKPOINT, "--config", "nonsense"], 2, "is a folder, and only a single file takes it; leave it out"),
        ([EMOJI_CHECKPOINT, "--variant", "fp16"], 2, "has no weights of this variant; it has none"),
    ],
)
def test_the_command_fails_with_its_exit_code_and_a_sentence(
    arguments: list, code: int, message: str, tmp_path: Path
) -> None:
    done = command("export", *arguments, "-o", tmp_path / "b")
    assert done.returncode == code
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "b").exists()


def rescheduled(
    checkpoint: Path, bundle: Path, folder: Path, name: str, **changes: object
) -> tuple[Path, Path, list[str]]:
    """Copies of a checkpoint and its bundle with another scheduler, as an export writes them, and what it reports."""
    from sdopt.bundle.files import read_manifest
    from sdopt.bundle.write import write_manifest
    from sdopt.export.schedule import manifest_entries

    copy, target = (Path(shutil.copytree(p, folder / p.name)) for p in (checkpoint, bundle))
    for file, wanted in (
        ("scheduler/scheduler_config.json", {"_class_name": name, **changes}),
        ("model_index.json", {"scheduler": ["diffusers", name]}),
    ):
        (copy / file).write_text(json.dumps({**json.loads((copy / file).read_text()), **wanted}))
    manifest = read_manifest(target)
    (target / "manifest.json").unlink()
    lines: list[str] = []
    with open_checkpoint(str(copy)) as opened:
        manifest = replace(manifest, **manifest_entries(opened, target, manifest.defaults, lines.append))
    write_manifest(target, manifest)
    return copy, target, lines


def same_latents(checkpoint: Path, bundle: Path, steps: int) -> float:
    """dB between the latents of diffusers and of sdopt."""
    import torch
    from diffusers import StableDiffusionPipeline

    theirs = StableDiffusionPipeline.from_pretrained(checkpoint, torch_dtype=torch.float32, safety_checker=None)
    options = {"num_inference_steps": steps, "guidance_scale": 1.0, "output_type": "latent"}
    expected = theirs("a", generator=torch.Generator("cpu").manual_seed(1), **options).images.numpy()
    return psnr(expected, sdopt.load(bundle)("a", seed=1, **options).images)


def test_a_scheduler_that_is_not_known_by_name_brings_its_tables_along(
    tiny_checkpoint: Path, tiny_bundle: Path, tmp_path: Path
) -> None:
    """DPM-Solver's inverse is linear, in diffusers, and no sampler of sdopt's."""
    name = "DPMSolverMultistepInverseScheduler"
    checkpoint, bundle, lines = rescheduled(
        tiny_checkpoint, tiny_bundle, tmp_path, name, lambda_min_clipped=-float("inf")
    )
    assert f"{name} is not a sampler that sdopt knows" in lines[-1]
    assert same_latents(checkpoint, bundle, 6) >= 80
    pipe = sdopt.load(bundle)
    with pytest.raises(UsageError, match="num_inference_steps = 51; for DPMSolver.* this bundle has tables for 1, 2,"):
        pipe("a", num_inference_steps=51)
    with pytest.raises(UsageError, match="schedule: DPMSolver.* takes no options here"):
        pipe("a", schedule="karras")
    assert pipe("a", sampler="euler", num_inference_steps=51, output_type="np").images.shape == (1, 24, 24, 3)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("CMStochasticIterativeScheduler", "is not linear"),
        ("EvilScheduler", "is no scheduler of diffusers"),
        ("os", "no scheduler"),
    ],
)
def test_a_scheduler_that_cannot_be_probed_is_refused_by_name(
    tiny_checkpoint: Path, tmp_path: Path, name: str, message: str
) -> None:
    copy = Path(shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint"))
    with_scheduler(copy, name)
    with pytest.raises(CheckpointError, match=message):
        export(copy, tmp_path / "b", report=lambda line: None)
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize(
    ("name", "changes"), [("PNDMScheduler", {"steps_offset": 0}), ("DDIMScheduler", {"clip_sample": True})]
)
def test_outdated_scheduler_options_are_read_as_the_pipeline_of_diffusers_reads_them(
    tiny_checkpoint: Path, tiny_bundle: Path, tmp_path: Path, name: str, changes: dict
) -> None:
    checkpoint, bundle, lines = rescheduled(tiny_checkpoint, tiny_bundle, tmp_path, name, **changes)
    assert "as StableDiffusionPipeline does" in lines[0]
    assert same_latents(checkpoint, bundle, 4) >= 80
