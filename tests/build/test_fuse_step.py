"""One call of the fused graph is one step of the loop, for every sampler."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import sdopt
from sdopt import graph
from sdopt.build.examples import example
from sdopt.build.fuse_step import CARRIED, fuse_step
from sdopt.build.simulate import outputs_of
from sdopt.bundle.files import Component
from sdopt.bundle.specs import Array
from sdopt.denoise import loop
from sdopt.denoise.board import HostBoard
from sdopt.denoise.conditions import Conditions
from sdopt.denoise.model import Predict
from sdopt.denoise.program import Advance, Program
from sdopt.denoise.start import Canvas
from sdopt.engine.ort import OrtEngine
from sdopt.errors import UsageError
from sdopt.metrics import psnr
from sdopt.samplers import SAMPLERS, SamplerTable, sampler_table
from sdopt.samplers.packed import HISTORY, packed, row_width
from tests.build.common import opened
from tests.conftest import EMOJI_BUNDLE

UNET = EMOJI_BUNDLE / "unet.onnx"
FLOOR_DB = 100.0
LATENT = (2, 4, 8, 6)


@pytest.fixture(scope="module")
def steps(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Any]:
    """The fused emoji UNet: with both halves of guidance, and with the conditional one alone."""
    folder = tmp_path_factory.mktemp("steps")
    return {guided: opened(fuse_step(graph.load(UNET), guided=guided), folder) for guided in (True, False)}


@pytest.fixture(scope="module")
def unet() -> Iterator[OrtEngine]:
    with OrtEngine(sdopt.Bundle.open(EMOJI_BUNDLE).component("unet"), threads=1) as engine:
        yield engine


def table_of(name: str, calls: int = 6) -> SamplerTable:
    """A table of any sampler: on the emoji model's schedule where it is of its family, else on its class's own."""
    own = sdopt.Bundle.open(EMOJI_BUNDLE).manifest.scheduler
    config = own if SAMPLERS[name].family == "diffusion" else {"_class_name": SAMPLERS[name].diffusers}
    return sampler_table(config, calls, sampler=name, eta=0.7 if SAMPLERS[name].takes_eta else None)


def unfused(
    unet: Any,
    table: SamplerTable,
    guidance: list[float],
    conditions: Any,
    noise: list[Array],
    extra: Any = None,
    rescale: float = 0,
) -> list[tuple[Array, Array]]:
    """(sample, denoised) after each call of the loop on the host."""
    cond = {name: array for name, array in conditions.items() if not name.startswith("negative_")}
    negative = {name.removeprefix("negative_"): a for name, a in conditions.items() if name not in cond}
    sample = noise[-1] * np.float32(table.init_noise_sigma)
    calls = [Predict(scale > 1, rescale=rescale, joins=extra is not None) for scale in guidance]
    launches = tuple((call, Advance()) for call in calls)
    program = Program(table, launches, len(sample), tuple(guidance), rescale)
    drawn = iter([noise[k] for k in range(len(table)) if table.draws[k]])
    board = HostBoard(program, {"unet": unet}, Canvas(sample), Conditions(cond, negative, extra), lambda: next(drawn))
    return [(step.sample, step.denoised) for step in loop.steps(program, board)]


def fused(
    steps: Any, table: SamplerTable, guidance: list[float], conditions: Any, noise: list[Array], **more: Any
) -> list[Any]:
    """The same from the fused graph: the carried outputs become the next call's inputs."""
    rescale, history = more.pop("rescale", 0.0), more.pop("history", HISTORY)
    rows = packed(table, guidance, rescale, history=history)
    sample = noise[-1] * np.float32(table.init_noise_sigma)
    carried = {"sample": sample, "history": np.zeros((history, *sample.shape), np.float32)}
    results: list[Any] = []
    for k, row in enumerate(rows):
        given = {n: a for n, a in conditions.items() if guidance[k] > 1 or not n.startswith("negative_")}
        drawn = noise[k] if table.draws[k] else np.zeros_like(sample)
        outputs = outputs_of(
            steps[guidance[k] > 1], {**carried, **given, **more, "noise": drawn, "row": np.tile(row, (len(sample), 1))}
        )
        carried = {given: outputs[output] for output, given in CARRIED.items()}
        results.append((outputs["next_sample"], outputs["denoised"]))
    return results


def random(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def conditions() -> dict[str, Array]:
    return {f"{half}encoder_hidden_states": random(2, 7, 128, seed=len(half)) for half in ("", "negative_")}


def worst(expected: list[Any], actual: list[Any]) -> float:
    pairs = zip(expected, actual, strict=True)
    return min(psnr(a, b) for wanted, got in pairs for a, b in zip(wanted, got, strict=True))


@pytest.mark.parametrize("name", SAMPLERS)
def test_the_fused_step_is_the_loop_for_every_sampler(name: str, steps: Any, unet: Any) -> None:
    table = table_of(name)
    guidance = [1.0, *[3.0] * (len(table) - 2), 0.5]  # outside the interval the conditional half runs alone
    noise = [random(*LATENT, seed=k) for k in range(len(table) + 1)]
    expected = unfused(unet, table, guidance, conditions(), noise)
    actual = fused(steps, table, guidance, conditions(), noise)
    assert worst(expected, actual) >= FLOOR_DB


def test_images_at_different_steps_of_different_samplers_share_a_batch_and_are_each_what_they_are_alone(
    steps: Any,
) -> None:
    names = ("ddim", "euler", "euler_a", "dpmpp_2m", "unipc", "pndm", "dpmpp_2m_sde", "heun")
    tables = [table_of(name, 5 + 15 * i // 7) for i, name in enumerate(names)]
    guidance = [2.0 + i for i in range(len(names))]
    noises = [[random(1, *LATENT[1:], seed=100 * i + k) for k in range(len(t) + 1)] for i, t in enumerate(tables)]
    texts = [{n: a[:1] + np.float32(i) for n, a in conditions().items()} for i in range(len(names))]
    expected = [
        fused(steps, t, [g] * len(t), text, noise)[-1][0]
        for t, g, text, noise in zip(tables, guidance, texts, noises, strict=True)
    ]
    rows = [packed(table, [scale] * len(table)) for table, scale in zip(tables, guidance, strict=True)]
    starts = [noise[-1] * np.float32(table.init_noise_sigma) for noise, table in zip(noises, tables, strict=True)]
    carried = [{"sample": x, "history": np.zeros((HISTORY, *x.shape), np.float32)} for x in starts]
    for moment in range(max(map(len, tables)) + len(names)):
        calls = {i: moment - i for i, table in enumerate(tables) if 0 <= moment - i < len(table)}  # each joins later
        if not calls:
            break
        images = list(calls)
        given = {name: np.concatenate([texts[i][name] for i in images]) for name in texts[0]}
        given["row"] = np.stack([rows[i][k] for i, k in calls.items()])
        drawn = [noises[i][k] if tables[i].draws[k] else np.zeros_like(starts[i]) for i, k in calls.items()]
        given["noise"] = np.concatenate(drawn)
        given["sample"] = np.concatenate([carried[i]["sample"] for i in images])
        given["history"] = np.concatenate([carried[i]["history"] for i in images], 1)
        outputs = outputs_of(steps[True], given)
        for row, i in enumerate(images):
            sample, history = outputs["next_sample"][row : row + 1], outputs["next_history"][:, row : row + 1]
            carried[i] = {"sample": sample, "history": history}
    for name, latents, alone in zip(names, carried, expected, strict=True):
        np.testing.assert_array_equal(latents["sample"], alone, err_msg=name)


@pytest.mark.parametrize("name", SAMPLERS)
def test_the_history_of_the_graph_is_deep_enough_for_every_sampler(name: str) -> None:
    for calls in (4, 20):
        rows = packed(table_of(name, calls), [1.0] * len(table_of(name, calls)))
        assert rows.shape[1] == row_width()
        assert np.isfinite(rows).all()


def test_a_table_that_looks_further_back_than_the_graph_is_refused() -> None:
    table = table_of("unipc", 8)
    assert packed(table, [1.0] * 8, history=2).shape == (8, row_width(2))
    with pytest.raises(UsageError, match="unipc looks back 2 calls, this graph keeps 1"):
        packed(table, [1.0] * 8, history=1)
    with pytest.raises(UsageError, match="1 guidance scales for 8 calls of unipc"):
        packed(table, [1.0])


@pytest.mark.parametrize("history", [1, 3])
def test_a_graph_may_keep_less(history: int, unet: Any, tmp_path: Path) -> None:
    table = table_of("dpmpp_2m" if history == 1 else "lms")
    one = opened(fuse_step(graph.load(UNET), history=history), tmp_path)
    noise, guidance = [random(*LATENT, seed=k) for k in range(7)], [2.0] * 6
    actual = fused({True: one}, table, guidance, conditions(), noise, history=history)
    assert worst(unfused(unet, table, guidance, conditions(), noise), actual) >= FLOOR_DB


@pytest.mark.parametrize("share", [0.0, 0.7])
def test_guidance_rescale_is_in_the_graph_when_asked_for(share: float, unet: Any, tmp_path: Path) -> None:
    one = opened(fuse_step(graph.load(UNET), rescale=True), tmp_path)
    table, guidance = table_of("euler"), [4.0] * 6
    noise = [random(*LATENT, seed=k) for k in range(7)]
    expected = unfused(unet, table, guidance, conditions(), noise, rescale=share)
    assert worst(expected, fused({True: one}, table, guidance, conditions(), noise, rescale=share)) >= FLOOR_DB


def test_a_rescale_of_nothing_leaves_the_guided_output_as_it_is(tmp_path: Path) -> None:
    plain, able = (opened(fuse_step(graph.load(UNET), rescale=rescale), tmp_path) for rescale in (False, True))
    table = table_of("euler", 2)
    rows = packed(table, [1.0, 3.0], 0.7)
    assert rows[:, 2].tolist() == [0.0, np.float32(0.7)]  # without guidance there is nothing to rescale
    given = {"sample": np.zeros(LATENT, np.float32), "history": np.zeros((HISTORY, *LATENT), np.float32)}
    given |= {"noise": np.zeros(LATENT, np.float32), "row": packed(table, [3.0, 3.0])[[0, 0]]}
    both = [outputs_of(step, {**conditions(), **given}) for step in (plain, able)]
    for name in both[0]:
        np.testing.assert_allclose(both[1][name], both[0][name], atol=1e-6)


def test_at_a_share_of_zero_an_output_without_spread_is_no_nan(tmp_path: Path) -> None:
    model = fuse_step(graph.load(UNET), rescale=True)
    inside = {value.name: value for node in model.graph for value in node.outputs}
    spread = inside["step/spread_guided"]
    for user, index in tuple(spread.uses()):
        user.replace_input_with(index, graph.Writer(model, "", before=user)("Sub", [spread, spread], "no_spread"))
    row = packed(table_of("euler", 2), [3.0, 3.0])[[0, 0]]
    given = {"sample": random(*LATENT), "history": np.zeros((HISTORY, *LATENT), np.float32)}
    given |= {"noise": np.zeros(LATENT, np.float32), "row": row}
    actual = outputs_of(opened(model, tmp_path), {**conditions(), **given})
    assert np.isfinite(actual["next_sample"]).all()


def test_the_signature_is_the_one_that_is_written_down(tmp_path: Path) -> None:
    model = fuse_step(graph.load(UNET))
    inputs, outputs = graph.specs(model)
    latent = ("batch", 4, "latent_height", "latent_width")
    assert {s.name: s.shape for s in inputs} == {
        "sample": latent,
        "history": (HISTORY, *latent),
        "noise": latent,
        "row": ("batch", row_width()),
        "encoder_hidden_states": ("batch", "tokens", 128),
        "negative_encoder_hidden_states": ("batch", "tokens", 128),
    }
    assert {s.name: s.shape for s in outputs} == {
        "next_sample": latent, "next_history": (HISTORY, *latent), "denoised": latent,
    }  # fmt: skip
    assert {s.dtype for s in (*inputs, *outputs)} == {"float32"}
    alone, _ = graph.specs(fuse_step(graph.load(UNET), guided=False))
    assert {s.name for s in inputs} - {s.name for s in alone} == {"negative_encoder_hidden_states"}
    graph.save(model, tmp_path / "step.onnx")
    onnx.checker.check_model(tmp_path / "step.onnx", full_check=True)


def test_what_is_no_unet_is_refused() -> None:
    with pytest.raises(UsageError, match="fuse_step takes a UNet.* this graph is latent_sample -> sample"):
        fuse_step(graph.load(EMOJI_BUNDLE / "vae_decoder.onnx"))
    with pytest.raises(UsageError, match="latent_channels = 5 of the UNet's 4"):
        fuse_step(graph.load(UNET), latent_channels=5)


SIZES = {"batch": 2, "images": 2, "tokens": 7, "latent_height": 8, "latent_width": 6}


def both_ways(path: Path, table: SamplerTable, folder: Path, latent_channels: int | None = None) -> float:
    """dB between the loop and the fused steps of a UNet with inputs of its own."""
    model = fuse_step(graph.load(path), latent_channels=latent_channels)
    inputs, given = graph.specs(model)[0], example(graph.specs(model)[0], SIZES)
    own = {s.name for s in inputs} - {"sample", "history", "noise", "row", "extra"}
    extra = given.get("extra")
    noise, guidance = [random(*LATENT, seed=k) for k in range(len(table) + 1)], [3.0] * len(table)
    component = Component("unet", path, *graph.specs(graph.load(path)))
    conditions = {name: array for name, array in given.items() if name in own}
    with OrtEngine(component, threads=1) as engine:
        expected = unfused(engine, table, guidance, conditions, noise, extra)
    more = {} if extra is None else {"extra": extra}
    return worst(expected, fused({True: opened(model, folder)}, table, guidance, conditions, noise, **more))


def test_the_conditions_of_sdxl_are_joined(sdxl_unet: Path, tmp_path: Path) -> None:
    names = {s.name for s in graph.specs(fuse_step(graph.load(sdxl_unet)))[0]}
    assert {"text_embeds", "time_ids", "negative_text_embeds", "negative_time_ids"} <= names
    assert both_ways(sdxl_unet, table_of("dpmpp_2m_sde"), tmp_path) >= FLOOR_DB


def test_the_further_channels_of_inpainting_are_joined_behind_the_scale(nine_channels: Path, tmp_path: Path) -> None:
    assert both_ways(nine_channels, table_of("euler"), tmp_path, latent_channels=4) >= FLOOR_DB
