"""What `pipe(...)` returns, and how the objects of the front door show themselves."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import sdopt
from sdopt.image.pil import read_parameters
from tests.conftest import ROOT


@pytest.fixture(scope="module")
def pipe() -> sdopt.Pipeline:
    return sdopt.load()


@pytest.fixture(scope="module")
def two(pipe: sdopt.Pipeline) -> sdopt.Result[list[Image.Image]]:
    return pipe("a cat", seed=3, num_inference_steps=2, num_images_per_prompt=2)


def test_save_writes_pictures_that_carry_what_makes_them_again(
    pipe: sdopt.Pipeline, two: sdopt.Result[list[Image.Image]], tmp_path: Path
) -> None:
    paths = two.save(tmp_path / "cat.png")
    assert [path.name for path in paths] == ["cat-0.png", "cat-1.png"]
    assert [read_parameters(path) for path in paths] == list(two.parameters)
    assert read_parameters(paths[1])["seed"] == 4
    assert read_parameters(paths[1])["backend"] == pipe.backend
    with Image.open(paths[0]) as picture:
        assert np.array_equal(np.asarray(picture), np.asarray(two.images[0]))


def test_one_picture_keeps_its_name_and_arrays_are_saved_as_pictures(pipe: sdopt.Pipeline, tmp_path: Path) -> None:
    options: sdopt.Options = {"seed": 3, "num_inference_steps": 2}
    [one] = pipe("a cat", **options).save(tmp_path / "one.png")
    [array] = pipe("a cat", output_type="np", **options).save(tmp_path / "array.png")
    assert one == tmp_path / "one.png"
    assert one.read_bytes() == array.read_bytes()


def test_what_cannot_be_saved_is_refused(pipe: sdopt.Pipeline, tmp_path: Path) -> None:
    result = pipe("a cat", seed=3, num_inference_steps=1, output_type="latent")
    with pytest.raises(sdopt.UsageError, match=r"latents .* output_type"):
        result.save(tmp_path / "a.png")
    with pytest.raises(sdopt.UsageError, match="no folder"):
        result.save(tmp_path / "nowhere" / "a.png")
    with pytest.raises(sdopt.UsageError, match=r"name it .*a.png"):
        result.save(tmp_path / "a.tiff")
    assert not list(tmp_path.iterdir())
    assert result._repr_png_() is None


@pytest.mark.parametrize("path", [".", Path("."), "/", "..", ".png", "-"], ids=repr)
def test_a_path_that_names_no_picture_is_refused(
    path: str | Path, two: sdopt.Result[list[Image.Image]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(sdopt.UsageError, match=r"pictures are written as .*; name it .*apple\.png$"):
        two.save(path)
    assert not list(tmp_path.iterdir())


def test_pictures_that_were_changed_are_refused_before_one_is_written(tmp_path: Path) -> None:
    own, picture = {"prompt": "a cat", "seed": 1}, Image.new("RGB", (8, 8))
    nan = np.full((1, 8, 8, 3), np.nan, np.float32)
    for images, message in (
        ([picture, picture], "2 pictures, and parameters of 1"),
        ([], "0 pictures, and parameters of 1"),
        (["cat"], "'cat' is no picture"),
        (nan, "from nan to nan; allowed is 0..1"),
        (np.full_like(nan, 2), r"from 2\.0 to 2\.0; allowed is 0..1"),
        (nan[:0], "0 pictures"),
    ):
        with pytest.raises(sdopt.UsageError, match=f"^images: .*{message}"):
            sdopt.Result(images, (1,), (own,)).save(tmp_path / "a.png")
    assert not list(tmp_path.iterdir())
    assert sdopt.Result([], (), ())._repr_png_() is None
    assert sdopt.Result(nan, (1,), (own,))._repr_png_() is None


def test_a_notebook_shows_the_pictures_side_by_side(two: sdopt.Result[list[Image.Image]]) -> None:
    content = two._repr_png_()
    assert content is not None
    with Image.open(io.BytesIO(content)) as row:
        assert row.size == (256, 128)
        assert np.array_equal(np.asarray(row)[:, 128:], np.asarray(two.images[1]))


def test_objects_say_what_they_are(pipe: sdopt.Pipeline, two: sdopt.Result[list[Image.Image]]) -> None:
    assert repr(two) == "<Result: 2 PIL images, seeds 3, 4>"
    assert "ort in fp32" in repr(pipe)
    assert "unet" in repr(pipe)
    assert "128x128, 21 MB, text_encoder, unet, vae_decoder, vae_encoder" in repr(pipe.bundle)


def test_every_public_name_is_there_and_export_can_be_called() -> None:
    for name in sdopt.__all__:
        assert getattr(sdopt, name) is not None
    code = "import sdopt\ntry: sdopt.export('nowhere/at/all', 'out')\nexcept sdopt.CheckpointError as e: print(e)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert "nowhere/at/all" in done.stdout


@pytest.mark.parametrize("output_type", ["latent", "PIL", ""])
def test_decode_refuses_a_kind_of_picture_that_it_does_not_make(pipe: sdopt.Pipeline, output_type: str) -> None:
    with pytest.raises(sdopt.UsageError, match="allowed are pil, np") as error:
        pipe.decode(np.zeros((1, 4, 16, 16), np.float32), output_type)
    assert error.value.param == "output_type"


def test_a_picture_that_cannot_be_saved_is_named_and_the_other_one_is_there(
    two: sdopt.Result[list[Image.Image]], tmp_path: Path
) -> None:
    (tmp_path / "cat-0.png").mkdir()
    with pytest.raises(sdopt.SdoptError, match=r"cat-0\.png is not written: Is a directory; the other 1 are written"):
        two.save(tmp_path / "cat.png")
    assert (tmp_path / "cat-1.png").is_file()
