"""Textual inversions mean what they mean in diffusers, and a file that is not what it should be is refused."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import sdopt
from sdopt.errors import UsageError
from sdopt.image import pil as images
from sdopt.text.textual_inversion import read_safetensors
from tests.conftest import edit_manifest
from tests.conftest import sdopt as command
from tests.denoise.test_start import generators
from tests.test_pipeline import picture_psnr

FLOOR_DB = 55.0
WIDTH = 20  # of the tiny checkpoint's text encoder
OPTIONS = {"num_inference_steps": 4, "guidance_scale": 3.0, "height": 24, "width": 24, "output_type": "np"}


def rows(count: int, seed: int = 0, width: int = WIDTH) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((count, width), np.float32)


def save(path: Path, dtype: str = "F32", **arrays: np.ndarray) -> Path:
    from safetensors.torch import save_file
    from torch import bfloat16, float16, float32, from_numpy

    kinds = {"F32": float32, "F16": float16, "BF16": bfloat16}
    save_file({key: from_numpy(value).to(kinds[dtype]) for key, value in arrays.items()}, path)
    return path


@pytest.fixture
def tiny(tiny_bundle: Path) -> Iterator[sdopt.Pipeline]:
    with sdopt.load(tiny_bundle) as pipe:
        yield pipe


@pytest.fixture(scope="module")
def theirs(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The checkpoint in diffusers with the embeddings <one>, <many> of three vectors, and hat."""
    import torch
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(tiny_checkpoint, torch_dtype=torch.float32, safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    folder = tmp_path_factory.mktemp("embeddings")
    pipe.load_textual_inversion(str(save(folder / "one.safetensors", **{"<one>": rows(1, 1)})))
    pipe.load_textual_inversion(str(save(folder / "many.safetensors", "F16", **{"<Many>": rows(3, 2)})))
    pipe.load_textual_inversion(str(save(folder / "hat.safetensors", emb_params=rows(2, 3))), token="hat")
    pipe.folder = folder
    return pipe


@pytest.mark.parametrize(
    ("prompt", "negative"),
    [
        ("a <one> b", None),
        ("<many>", "a"),
        ("<Many> a", "<one>"),
        ("a<one>hat", "hat hat"),
        ("a b c", "hat"),
        (["<one>", "hat a"], ["a", "<Many>"]),
    ],
    ids=str,
)
def test_a_prompt_with_a_learnt_word_gives_the_picture_of_diffusers(
    prompt: Any, negative: Any, theirs: Any, tiny: sdopt.Pipeline
) -> None:
    folder = theirs.folder
    assert tiny.load_embedding(folder / "one.safetensors") == "<one>"
    assert tiny.load_embedding(folder / "many.safetensors") == "<Many>"
    assert tiny.load_embedding(folder / "hat.safetensors") == "hat"  # AUTOMATIC1111's: named by the file
    seeds = [5, 6] if isinstance(prompt, list) else [5]
    expected = theirs(prompt, negative_prompt=negative, generator=generators(*seeds), **OPTIONS).images
    images = tiny(prompt, negative_prompt=negative, seed=seeds, **OPTIONS).images
    assert picture_psnr(expected, images) >= FLOOR_DB


def test_both_prompt_styles_read_the_word_and_weigh_it(tiny: sdopt.Pipeline) -> None:
    tiny.load_embedding(rows(2), token="<cat>")
    plain, a1111 = (tiny.encode(["a <cat>"], style) for style in ("plain", "a1111"))
    np.testing.assert_allclose(a1111, plain, atol=1e-6)
    heavy = tiny.encode(["a (<cat>:1.5)"], "a1111")
    changed = np.abs(heavy / plain - heavy[0, 0, 0] / plain[0, 0, 0]).max((0, 2)) > 1e-3
    assert changed.tolist() == [False, False, True, True, False, False, False]


def test_an_array_and_every_kind_of_number_load_alike(tmp_path: Path, tiny_bundle: Path) -> None:
    array = rows(2).astype(np.float16).astype(np.float32)
    array = (array.view(np.uint32) & 0xFFFF0000).view(np.float32)  # what bfloat16 and float16 both hold
    array = array.astype(np.float16).astype(np.float32)
    hidden = []
    for kind in ("F32", "F16", "BF16", None):
        with sdopt.load(tiny_bundle) as pipe:
            source = array if kind is None else save(tmp_path / f"{kind}.safetensors", kind, emb_params=array)
            pipe.load_embedding(source, token="<x>")
            hidden.append(pipe.encode(["a <x>"]))
    for other in hidden[1:]:
        np.testing.assert_array_equal(other, hidden[0])


def test_without_an_embedding_the_picture_is_the_one_it_was(tiny: sdopt.Pipeline) -> None:
    before = tiny("a b", seed=1, **OPTIONS).images
    tiny.load_embedding(rows(3), token="<x>")
    np.testing.assert_array_equal(tiny("a b", seed=1, **OPTIONS).images, before)
    result = tiny("a <x>", seed=1, **OPTIONS)
    assert np.abs(result.images - before).max() > 0.01
    assert list(result.parameters[0]["embeddings"]) == ["<x>"]


@pytest.mark.parametrize(
    ("arrays", "token", "message"),
    [
        ({"<x>": rows(1, width=768)}, None, r"rows \[1, 768\]; this model's text_encoder takes \[n, 20\]"),
        ({"<x>": rows(6)}, None, "'<x>' has 6 vectors; a prompt has 5 tokens"),
        ({"<x>": np.full((1, WIDTH), np.nan, np.float32)}, None, "NaN or infinity"),
        ({"a": rows(1), "b": rows(1)}, None, "holds a, b; known are one tensor named by its token, 'emb_params'"),
        ({"clip_g": rows(1)}, None, r"is for clip_g; this model has text_encoder \[n, 20\]"),
        ({"<x>": rows(1)}, "apple</w>", "'apple</w>' is a word that this model has already"),
        ({"<x>": rows(1)}, " x", "token = ' x'; allowed are texts without spaces around them"),
    ],
    ids=lambda v: str(v)[:30],
)
def test_an_embedding_that_does_not_fit_is_refused(
    arrays: dict, token: str | None, message: str, tmp_path: Path, tiny: sdopt.Pipeline
) -> None:
    with pytest.raises(UsageError, match=message):
        tiny.load_embedding(save(tmp_path / "e.safetensors", **arrays), token)
    before = tiny.encode(["a"])
    tiny.load_embedding(rows(1), token="<x>")  # what was refused left nothing behind
    np.testing.assert_array_equal(tiny.encode(["a"]), before)


def test_a_token_is_loaded_once_and_an_array_needs_one(tiny: sdopt.Pipeline) -> None:
    tiny.load_embedding(rows(2), token="<x>")
    for taken in ("<x>", "<x>_1"):
        with pytest.raises(UsageError, match=f"'{taken}' is a word that this model has already; choose another"):
            tiny.load_embedding(rows(1), token=taken)
    with pytest.raises(UsageError, match="token = ''; give the word"):
        tiny.load_embedding(rows(1))


def test_a_bundle_of_an_earlier_release_works_and_says_to_export_again(tiny_bundle: Path, tmp_path: Path) -> None:
    import onnx

    with sdopt.load(tiny_bundle) as pipe:
        expected = pipe.encode(["a b"])
    bundle = Path(shutil.copytree(tiny_bundle, tmp_path / "old"))
    model = onnx.load(bundle / "text_encoder.onnx", load_external_data=False)
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.zeros((1, WIDTH), np.float32), "extra_embeddings"))
    model.graph.input.remove(next(i for i in model.graph.input if i.name == "extra_embeddings"))
    onnx.save(model, bundle / "text_encoder.onnx")
    manifest = json.loads((bundle / "manifest.json").read_text())
    manifest["components"]["text_encoder"]["inputs"].pop()
    del manifest["tokenizers"]["tokenizer"]["vocab_size"], manifest["preview"]
    manifest["files"]["text_encoder.onnx"]["bytes"] = (bundle / "text_encoder.onnx").stat().st_size
    edit_manifest(bundle, **{key: manifest[key] for key in ("components", "tokenizers", "files")})
    with sdopt.load(bundle, verify=False) as pipe:
        np.testing.assert_allclose(pipe.encode(["a b"]), expected, atol=1e-6)
        with pytest.raises(UsageError, match="was exported before .*; export it again"):
            pipe.load_embedding(rows(1), token="<x>")


def written(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def tensor(**changes: Any) -> dict[str, Any]:
    return {"dtype": "F32", "shape": [1, 2], "data_offsets": [0, 8], **changes}


BROKEN = {
    "empty": b"",
    "short": b"\x08\0\0",
    "header longer than the file": written({"x": tensor()}, bytes(8), 10**6),
    "header of an exabyte": written({"x": tensor()}, bytes(8), 2**63),
    "no JSON": written(b"{nonsense"),
    "a list": written([1, 2]),
    "twice the same name": written(
        b'{"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}, '
        b'"x": {"dtype": "F32", "shape": [2], "data_offsets": [8, 16]}}',
        bytes(16),
    ),
    "an entry that is a number": written({"x": 7}),
    "no offsets": written({"x": {"dtype": "F32", "shape": [1, 2]}}, bytes(8)),
    "past the end": written({"x": tensor(data_offsets=[0, 80], shape=[1, 20])}, bytes(8)),
    "a gap": written({"x": tensor(data_offsets=[8, 16])}, bytes(16)),
    "an overlap": written({"x": tensor(), "y": tensor(data_offsets=[4, 12])}, bytes(12)),
    "left-over bytes": written({"x": tensor()}, bytes(12)),
    "wrong size": written({"x": tensor(shape=[1, 3])}, bytes(8)),
    "negative shape": written({"x": tensor(shape=[-1, -2])}, bytes(8)),
    "text for a shape": written({"x": tensor(shape="12")}, bytes(8)),
    "text for offsets": written({"x": tensor(data_offsets=["0", "8"])}, bytes(8)),
    "float8": written({"x": tensor(dtype="F8_E4M3", shape=[1, 8])}, bytes(8)),
    "deep": written(b"[" * 100_000),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_is_refused_with_a_sentence(name: str, tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_bytes(BROKEN[name])
    with pytest.raises(UsageError, match="is not a sound safetensors file: |x is F8_E4M3; read are F32, F16, BF16"):
        read_safetensors(tmp_path / "x.safetensors")


def test_pickles_missing_and_huge_files_are_refused(tmp_path: Path) -> None:
    for name, content in (("x.pt", b"PK\3\4"), ("x.bin", b"\x80\x02"), ("y.safetensors", b"PK\3\4")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UsageError, match=r"a pickle \(\.pt, \.bin, \.ckpt\) can run code"):
            read_safetensors(tmp_path / name)
    with pytest.raises(UsageError, match="there is no such file"):
        read_safetensors(tmp_path / "none.safetensors")
    with (tmp_path / "big.safetensors").open("wb") as stream:
        stream.truncate(1 << 27)
    with pytest.raises(UsageError, match="an embedding has up to 67,108,864"):
        read_safetensors(tmp_path / "big.safetensors")


def test_a_sound_file_is_read_as_the_library_reads_it(tmp_path: Path) -> None:
    from safetensors.numpy import load_file

    arrays = {"b": rows(3), "a": rows(1, 1), "c": rows(1, 2)[0]}
    path = save(tmp_path / "x.safetensors", **arrays)
    found, expected = read_safetensors(path), load_file(path)
    assert set(found) == set(expected)
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array)


def test_the_command_loads_embeddings_and_a_replay_asks_for_them(tmp_path: Path, tiny_bundle: Path) -> None:
    cat = save(tmp_path / "cat.safetensors", emb_params=rows(2))
    first, again = tmp_path / "first.png", tmp_path / "again.png"
    common = ("-m", tiny_bundle)
    done = command("generate", "a <c>", "--embedding", f"{cat}=<c>", "--steps", 2, "-o", first, *common)
    assert done.returncode == 0, done.stderr
    assert list(images.read_parameters(first)["embeddings"]) == ["<c>"]
    done = command("generate", "--replay", first, "-o", again, *common)
    assert (done.returncode, again.exists()) == (2, False)
    assert "was made with <c>; give the same with --embedding FILE=<c>" in done.stderr
    done = command("generate", "--replay", first, "--embedding", f"{cat}=<c>", "-o", again, *common)
    assert done.returncode == 0, done.stderr
    np.testing.assert_array_equal(np.asarray(Image.open(first)), np.asarray(Image.open(again)))


@pytest.mark.parametrize("prompt", ["a <me>", "a <ME>", "<Me> <me>", "<me><me>", "hat", "that", "<me>_1", "<Two>"])
def test_a_learnt_word_in_the_checkpoint_is_all_of_its_vectors(prompt: str, tmp_path: Path) -> None:
    from diffusers.loaders import TextualInversionLoaderMixin
    from transformers import CLIPTokenizer

    from sdopt.bundle.format import TokenizerEntry
    from sdopt.text.tokenizer import Tokenizer
    from tests import tiny as checkpoints

    saved = checkpoints.tokenizer()
    saved.add_tokens(["<me>", "<me>_1", "<me>_2", "hat", "hat_1", "<Two>", "<Two>_1"])
    saved.save_pretrained(tmp_path)
    theirs = CLIPTokenizer.from_pretrained(tmp_path)
    expanded = TextualInversionLoaderMixin().maybe_convert_prompt(prompt, theirs)
    expected = theirs(expanded, padding="max_length", max_length=7, truncation=True).input_ids
    entry = TokenizerEntry("tokenizer.json", 7, 0, 1, 1, len(theirs))
    assert Tokenizer(tmp_path / "tokenizer.json", entry)([prompt])[0].tolist() == expected
