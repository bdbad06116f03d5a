"""Every argument of the Python interface is checked where it comes in: a wrong one is refused with its name."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import sdopt
from sdopt.bundle.files import sha256
from sdopt.errors import UsageError
from sdopt.request.sampling import make_table
from tests.conftest import EMOJI_BUNDLE

LATENTS = np.zeros((1, 4, 4, 4), np.float32)
DDIM = {"_class_name": "DDIMScheduler"}
Pipe = Callable[[sdopt.Pipeline, Any], Any]


class Raising:
    """An object that cannot be looked at."""

    def _raise(self, *_: Any) -> Any:
        raise RuntimeError("no")

    __eq__ = __repr__ = __str__ = __len__ = __iter__ = __index__ = __float__ = __bool__ = __fspath__ = _raise
    __hash__ = object.__hash__


NONSENSE = [object(), len, b"x", 1j, {1}, float("nan"), "\ud800", [None], np.zeros(0), Raising()]
ids = [type(value).__name__ for value in NONSENSE]


@pytest.fixture(scope="module")
def pipe() -> Iterator[sdopt.Pipeline]:
    with sdopt.load(EMOJI_BUNDLE, "ort:cpu", threads=1) as pipeline:
        yield pipeline


CALLS: dict[str, Pipe] = {
    "callback_on_step_end": lambda pipe, value: pipe("a", callback_on_step_end=value),
    "output_type": lambda pipe, value: pipe("a", output_type=value),
    "decode": lambda pipe, value: pipe.decode(value),
    "decode output_type": lambda pipe, value: pipe.decode(LATENTS, value),
    "decode vae": lambda pipe, value: pipe.decode(LATENTS, vae=value),
    "decode vae_tile": lambda pipe, value: pipe.decode(LATENTS, vae_tile=value),
    "decode vae_slice": lambda pipe, value: pipe.decode(LATENTS, vae_slice=value),
    "preview": lambda pipe, value: pipe.preview(value),
    "preview scale": lambda pipe, value: pipe.preview(LATENTS, value),
    "preview output_type": lambda pipe, value: pipe.preview(LATENTS, 1, value),
    "encode": lambda pipe, value: pipe.encode(value),
    "encode prompt_style": lambda pipe, value: pipe.encode(["a"], value),
    "encode clip_skip": lambda pipe, value: pipe.encode(["a"], "plain", value),
    "load_embedding": lambda pipe, value: pipe.load_embedding(value, "<x>"),
    "load_embedding token": lambda pipe, value: pipe.load_embedding(np.ones((1, 128), np.float32), value),
    "release": lambda pipe, value: pipe.release(value),
    "engine": lambda pipe, value: pipe.engine(value),
    "component": lambda pipe, value: pipe.bundle.component(value),
    "an engine's input": lambda pipe, value: pipe.engine("vae_decoder")(latent_sample=value),
    **{
        f"load {word}": lambda pipe, value, word=word: sdopt.load(EMOJI_BUNDLE, **{word: value})
        for word in (
            "backend", "precision", "memory", "threads", "verify", "paranoid", "trust_engines", "cache",
        )
    },
    "open": lambda pipe, value: sdopt.Bundle.open(value),
    "steps": lambda pipe, value: sdopt.sampler_table(DDIM, value),
    "config": lambda pipe, value: sdopt.sampler_table(value, 2),
    **{
        name: lambda pipe, value, name=name: sdopt.sampler_table(DDIM, 2, **{name: value})
        for name in ("sampler", "schedule", "strength", "eta", "mu", "timesteps", "sigmas", "denoising_end")
    },
}  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("value", NONSENSE, ids=ids)
def test_no_call_takes_nonsense(pipe: sdopt.Pipeline, name: str, value: Any) -> None:
    is_function = name == "callback_on_step_end" and callable(value)
    is_path = name in ("open", "load_embedding") and isinstance(value, str)
    if is_function or is_path:
        pytest.skip("this one may be given")
    with pytest.raises(sdopt.SdoptError) as caught:
        CALLS[name](pipe, value)
    assert len(str(caught.value)) > 20


@pytest.mark.parametrize("value", [np.int64(2), 2])
def test_numbers_of_numpy_are_welcome(pipe: sdopt.Pipeline, value: Any) -> None:
    assert pipe.encode(["a"], "plain", value).shape == (1, 32, 128)
    assert pipe.preview(LATENTS, value)[0].size == (8, 8)
    sdopt.load(EMOJI_BUNDLE, "ort:cpu", threads=value).close()


def test_latents_of_another_model_are_refused_with_its_channels(pipe: sdopt.Pipeline) -> None:
    for call in (pipe.decode, pipe.preview):
        with pytest.raises(UsageError, match=r"got float32 \(1, 16, 4, 4\); this model has 4 channels"):
            call(np.zeros((1, 16, 4, 4), np.float32))


def test_one_prompt_is_one_prompt(pipe: sdopt.Pipeline) -> None:
    np.testing.assert_array_equal(pipe.encode("a red apple"), pipe.encode(["a red apple"]))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "value"),
    [("beta_start", [1]), ("beta_schedule", {}), ("num_train_timesteps", "x"), ("trained_betas", False), ("rho", None)],
)
def test_a_setting_that_no_sampler_reads_so_is_named(name: str, value: Any) -> None:
    with pytest.raises(UsageError, match=rf"scheduler\.{name} is .*allowed is"):
        sdopt.sampler_table({**DDIM, name: value}, 2, sampler="euler")


def test_the_config_of_a_live_scheduler_is_taken() -> None:
    live = {"trained_betas": np.full(10, 0.1), "lambda_min_clipped": -np.inf, "disable_corrector": (0,)}
    table = sdopt.sampler_table({"_class_name": "UniPCMultistepScheduler", "num_train_timesteps": 10, **live}, 2)
    assert len(table) == 2


@pytest.mark.parametrize(
    "damaged",
    [b"[1]", b"\xff\xfe{", b"{", b"[" * 5000, b'{"2": 1}', b'{"2": NaN}'],
    ids=["a list", "another encoding", "cut", "deep", "no table", "NaN"],
)
def test_damaged_tables_of_a_bundle_name_their_file(bundle_copy: Path, damaged: bytes) -> None:
    path = bundle_copy / "tables.json"
    path.write_bytes(damaged)
    manifest = json.loads((bundle_copy / "manifest.json").read_text())
    manifest |= {"sampler_tables": path.name}
    manifest["files"][path.name] = {"bytes": len(damaged), "sha256": sha256(path)}
    (bundle_copy / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(sdopt.BundleError, match=r"tables\.json.*Copy the bundle again"):
        make_table(sdopt.Bundle.open(bundle_copy), {"num_inference_steps": 2})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("timestep", [[1], [2, 3]]),
        ("update", [[1], [1, 2]]),
        ("draws", ["no", "no"]),
        ("name", 3),
        ("sigma", [None] * 2),
    ],
)
def test_a_field_of_a_table_that_is_no_number_is_named(name: str, value: Any) -> None:
    entry = sdopt.sampler_table(DDIM, 2).to_json()
    assert sdopt.SamplerTable.from_json(json.dumps(entry)) == sdopt.sampler_table(DDIM, 2)
    with pytest.raises(UsageError, match="sampler table"):
        sdopt.SamplerTable.from_json({**entry, name: value})


def test_decode_takes_no_more_pixels_than_a_request() -> None:
    import sdopt

    with pytest.raises(UsageError, match="24000x24000 pixels; allowed are 16384 a side"):
        sdopt.load().decode(np.broadcast_to(np.float32(0), (1, 4, 3000, 3000)))
