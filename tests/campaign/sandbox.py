"""What one worker works on: bundles of its own that may be damaged and are mended, requests, and the right pictures."""

from __future__ import annotations

import json
import os
import shutil
import sys
import warnings
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

import sdopt
from sdopt.bundle.files import embedded
from sdopt.errors import SdoptError
from tests.campaign.cases import FOREIGN, MUTE, OTHER, REFUSED, SAME, Outcome

MAX_SENTENCE = 4000
RIGHT_BACKENDS = {"ort:cpu": "onnxruntime", "openvino": "openvino"}


class Sandbox:
    """A folder with copies of the bundles. `kept` has the tiny ones, where they were exported (see `__main__`)."""

    def __init__(self, folder: Path, kept: Path | None = None) -> None:
        self.folder, self.kept = folder, kept
        self.bundles = {"emoji": _copied(embedded(), folder / "emoji")}
        for name in ("tiny", "sdxl"):
            if kept is not None and (kept / name / "manifest.json").is_file():
                self.bundles[name] = _copied(kept / name, folder / name)
        self._right: dict[Any, Any] = {}

    @cached_property
    def with_tables(self) -> Path:
        """The embedded bundle, with its sampler as tables in a file."""
        return _with_tables(self.bundles["emoji"], self.folder / "tables")

    @cached_property
    def with_engines(self) -> Path:
        """The embedded bundle, with built engines of ONNX Runtime."""
        from sdopt.build.jobs import build
        from sdopt.build.options import BuildOptions

        folder = _copied(embedded(), self.folder / "built")
        bundle = sdopt.Bundle.open(folder)
        build(bundle, "ort", components=["vae_decoder"], options=BuildOptions(precision="fp32"), report=lambda _: None)
        return folder

    def request(self, name: str, number: int = 0) -> dict[str, Any]:
        """A small request for a bundle: 0 is text alone, 1 begins from a picture."""
        edge = {"emoji": 32, "tables": 32, "built": 32}.get(name, 16)
        text = {"prompt": "a red apple", "negative_prompt": "green", "seed": 3}
        own = {**text, "num_inference_steps": 2, "height": edge, "width": edge, "guidance_scale": 3.0}
        if number:
            ramp = np.linspace(0, 1, edge * edge * 3, dtype=np.float32).reshape(edge, edge, 3)
            own |= {"image": ramp, "num_inference_steps": 4, "strength": 0.5, "prompt_style": "a1111"}
        return own

    def right(self, name: str, number: int = 0, backend: str = "ort:cpu") -> Any:
        """The picture of a request on an undamaged bundle."""
        key = (name, number, backend)
        if key not in self._right:
            self._right[key] = picture(self.folder / name, self.request(name, number), backend)
        return self._right[key]


def _copied(source: Path, target: Path) -> Path:
    ignored = shutil.ignore_patterns("engines")
    return target if target.is_dir() else Path(shutil.copytree(source, target, ignore=ignored))


def _with_tables(source: Path, target: Path) -> Path:
    from sdopt.bundle.files import sha256
    from sdopt.request.sampling import make_table

    _copied(source, target)
    bundle = sdopt.Bundle.open(source)
    tables = {}
    for steps in (1, 2, 4):
        tables[str(steps)] = make_table(bundle, {"num_inference_steps": steps}).to_json()
    path = target / "tables.json"
    path.write_text(json.dumps(tables))
    manifest = json.loads((target / "manifest.json").read_text())
    manifest["sampler_tables"] = path.name
    manifest["files"][path.name] = {"bytes": path.stat().st_size, "sha256": sha256(path)}
    (target / "manifest.json").write_text(json.dumps(manifest))
    return target


def picture(folder: Path, request: Mapping[str, Any], backend: str = "ort:cpu", **how: Any) -> Any:
    """The picture of a request, by the way that a user takes: the bundle is opened, checked and loaded."""
    with sdopt.load(folder, backend, threads=1, **how) as pipe:
        result = pipe(**request, output_type="np")
        json.dumps(result.parameters, allow_nan=False)
        repr(pipe), repr(pipe.bundle), repr(result)
        return result.images


@contextmanager
def replaced(path: Path, content: bytes | None) -> Generator[None]:
    """A file with other content, or without the file for None, until the block ends."""
    aside = path.with_name(f"{path.name}.right")
    path.rename(aside)
    try:
        if content is not None:
            path.write_bytes(content)
        yield
    finally:
        path.unlink(missing_ok=True)
        aside.rename(path)


def judged(what: str, attempt: Callable[[], Any], judge: Callable[[Any], Outcome]) -> Outcome:
    """The outcome of an attempt: that of an error, else what `judge` says of its value."""
    print(what, file=sys.__stderr__, flush=True)  # the log of a process that does not come back
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            value = attempt()
    except SdoptError as error:
        return sentence(what, error)
    except BaseException as error:
        import traceback

        return Outcome(FOREIGN, what, "".join(traceback.format_exception(error))[-3000:])
    return judge(value)


def sentence(what: str, error: SdoptError) -> Outcome:
    """Whether an error says something that a user can read."""
    text = str(error)
    is_short = 10 <= len(text) <= MAX_SENTENCE and "Traceback" not in text
    return Outcome(REFUSED if is_short else MUTE, what, f"{type(error).__name__}: {text[:600]}")


def as_right(what: str, right: Any, other: str = OTHER) -> Callable[[Any], Outcome]:
    """Judges a picture: the right one, or `other`."""

    def judge(images: Any) -> Outcome:
        is_same = images.shape == right.shape and np.array_equal(images, right)
        worst = "" if images.shape != right.shape else f"up to {np.abs(images - right).max()} away"
        return Outcome(SAME, what) if is_same else Outcome(other, what, f"{images.shape} {worst}")

    return judge


def own_environment(folder: Path) -> dict[str, str]:
    """The environment of a process whose user has an empty cache and state in `folder`."""
    quiet = {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "0", "HF_HUB_OFFLINE": "1"}
    homes = {"XDG_CACHE_HOME": str(folder / "cache"), "XDG_STATE_HOME": str(folder / "state"), "HOME": str(folder)}
    root = Path(__file__).parents[2]
    return {**os.environ, **quiet, **homes, "PYTHONPATH": str(root), "SDOPT_TESTS_CACHE": str(folder / "cache")}
