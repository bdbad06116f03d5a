"""Every other file that the runtime reads, with a few of its bytes changed.

A file that a hash guards must be refused, or give the right picture: from the cache it is made anew. `verify=False`
leaves the hashes out, and then another picture is the caller's choice; so is one whose own content is the request:
a picture to begin from, its parameters, a textual inversion.
"""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import sdopt
from tests.campaign.cases import LEGAL, OTHER, SAME, Case, Outcome
from tests.campaign.commands import command
from tests.campaign.manifest import judged_by_place
from tests.campaign.mutate import mutated_bytes, mutated_json
from tests.campaign.sandbox import Sandbox, as_right, judged, picture, replaced


def run(case: Case, sandbox: Sandbox) -> Outcome:
    rng = case.random()
    return rng.choice(TARGETS)(rng, sandbox)


def _bundle(rng: random.Random, sandbox: Sandbox) -> Outcome:
    """A file that the manifest lists."""
    name = rng.choice(list(sandbox.bundles))
    folder = sandbox.bundles[name]
    files = json.loads((folder / "manifest.json").read_text())["files"]
    path = folder / rng.choice([*files, "manifest.json"])
    content, told = mutated_bytes(rng, path.read_bytes())
    verify = path.name == "manifest.json" or rng.random() < 0.8
    if not verify and path.suffix in (".onnx", ".json"):
        verify = True  # such a file is forged in `graphs`
    what = f"{name}/{path.name}: {told}, verify={verify}"
    number = int("encoder" in path.name)
    right = sandbox.right(name, number)
    with replaced(path, content):
        judge = as_right(what, right, OTHER if verify else LEGAL)
        how = {"verify": verify, "paranoid": rng.random() < 0.2}
        outcome = judged(what, lambda: picture(folder, sandbox.request(name, number), **how), judge)
    if outcome.name == OTHER and path.name == "manifest.json":
        return judged_by_place(outcome, path, content, right, sandbox.request(name, number))
    return outcome


def _cache(rng: random.Random, sandbox: Sandbox) -> Outcome:
    """A file of this user's cache: what a library made of a graph, a stamp, a verdict. None of them makes it fail."""
    root = sandbox.folder / "cache/sdopt"
    right = sandbox.right("emoji")
    files = sorted(path for path in root.rglob("*") if path.is_file() and not path.is_symlink())
    kind = rng.choice(sorted({path.relative_to(root).parts[0] for path in files}))
    path = rng.choice([path for path in files if path.relative_to(root).parts[0] == kind])
    content = path.read_bytes()
    if path.suffix == ".json" and rng.random() < 0.5:
        content, told = mutated_json(rng, json.loads(content))
    else:
        content, told = mutated_bytes(rng, content)
    what = f"{path.relative_to(root)}: {told}"
    path.write_bytes(content)
    judge = as_right(what, right)
    outcome = judged(what, lambda: picture(sandbox.bundles["emoji"], sandbox.request("emoji")), judge)
    return outcome if outcome.name == SAME else Outcome(OTHER, what, f"{outcome.name}: {outcome.detail}")


def _engine(rng: random.Random, sandbox: Sandbox) -> Outcome:
    """A file of an engine that `sdopt build` made: its record, its graph, its weights, or the key that signed it."""
    folder = sandbox.with_engines
    right, plain = sandbox.right("built"), sandbox.right("emoji")
    [record] = (folder / "engines").glob("*/record.json")
    key = sandbox.folder / "state/sdopt/engine-key"
    path = rng.choice(
        (record, record, record, record.with_name("graph.onnx"), record.with_name("graph.onnx.data"), key)
    )
    content = path.read_bytes()
    if path == record and rng.random() < 0.6:
        content, told = mutated_json(rng, json.loads(content))
    else:
        content, told = mutated_bytes(rng, content)
    what = f"{path.name} of an engine: {told}"
    mode = path.stat().st_mode
    trust = rng.random() < 0.3 and path != record  # a record that is trusted may say anything

    def attempt() -> Any:
        if path == key:
            os.chmod(key, mode)
        return picture(folder, sandbox.request("built"), trust_engines=trust)

    with replaced(path, content):
        outcome = judged(what, attempt, as_right(what, right))
        if outcome.name == OTHER:  # an engine that nobody signed is passed over
            outcome = judged(what, attempt, as_right(what, plain))
        shown = judged(what, lambda: command(["engines", str(folder)]), lambda _: outcome)
    return shown if shown.is_fault else outcome


def _image(rng: random.Random, sandbox: Sandbox) -> Outcome:
    """A picture to begin from, in one of the formats that are read."""
    from PIL import Image

    from sdopt.image.pil import open_image

    suffix = rng.choice((".png", ".jpg", ".webp"))
    path = sandbox.folder / f"in{suffix}"
    mode = rng.choice(("RGB", "L", "RGBA", "P", "1", "LA")) if suffix == ".png" else "RGB"
    pixels = np.random.default_rng(rng.randint(0, 9)).integers(0, 256, (16, 24, 3), np.uint8)
    Image.fromarray(pixels).convert(mode).save(path)
    content, told = mutated_bytes(rng, path.read_bytes())
    path.write_bytes(content)
    what = f"{path.name} in {mode}: {told}"
    request = {**sandbox.request("emoji", 1), "height": 16, "width": 16, "num_inference_steps": 2}
    if rng.random() < 0.3:
        request |= {"mask_image": request["image"][:, :, 0].round(), "padding_mask_crop": rng.choice((None, 2))}
        key = rng.choice(("image", "mask_image"))
    else:
        key = "image"

    def attempt() -> Any:
        given = open_image(path)
        with sdopt.load(sandbox.bundles["emoji"], "ort:cpu", threads=1) as pipe:
            return pipe(**{**request, key: given}).images[0]

    return judged(what, attempt, lambda image: Outcome(LEGAL, what, str(image)))


def _replay(rng: random.Random, sandbox: Sandbox) -> Outcome:
    """A PNG whose parameters are replayed; its bytes are changed, or what its parameters say."""
    from sdopt.image.pil import save_png

    source, again = sandbox.folder / "replayed.png", sandbox.folder / "again.png"
    with sdopt.load(sandbox.bundles["emoji"], "ort:cpu", threads=1) as pipe:
        result = pipe(**{**sandbox.request("emoji"), "num_inference_steps": 1, "height": 16, "width": 16})
    if rng.random() < 0.6:
        content, told = mutated_json(rng, result.parameters[0])
        _with_text(result.images[0], source, content)
    else:
        save_png(result.images[0], source, result.parameters[0])
        content, told = mutated_bytes(rng, source.read_bytes())
        source.write_bytes(content)
    what = f"PNG with parameters: {told}"
    words = [
        "generate",
        "--replay",
        str(source),
        "-o",
        str(again),
        "-m",
        str(sandbox.bundles["emoji"]),
        "--threads",
        "1",
    ]
    if _is_long(content):  # a legal wish for many steps or a large picture takes its time
        return Outcome(LEGAL, what, "long")
    outcome = judged(what, lambda: command(words), lambda code: Outcome(LEGAL, what, f"exit code {code}"))
    again.unlink(missing_ok=True)
    return outcome


def _is_long(content: bytes) -> bool:
    try:
        entry = json.loads(content)
        return max(entry["height"], entry["width"]) > 64 or entry["num_inference_steps"] > 20
    except (ValueError, TypeError, KeyError, RecursionError):
        return False


def _with_text(image: Any, path: Path, content: bytes) -> None:
    """A PNG whose `sdopt` text is these bytes."""
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    info.add(b"tEXt", b"sdopt\0" + content)
    image.save(path, pnginfo=info)


def _embedding(rng: random.Random, sandbox: Sandbox) -> Outcome:
    """A textual inversion in a safetensors file."""
    path = sandbox.folder / "me.safetensors"
    rows = np.random.default_rng(0).standard_normal((2, 128)).astype(np.float32)
    header: Any = {"<me>": {"dtype": "F32", "shape": [2, 128], "data_offsets": [0, rows.nbytes]}}
    text, told = json.dumps(header).encode(), ""
    if rng.random() < 0.6:
        text, told = mutated_json(rng, header)
    content = len(text).to_bytes(8, "little") + text + rows.tobytes()
    if not told:
        content, told = mutated_bytes(rng, content)
    path.write_bytes(content)
    what = f"a textual inversion: {told}"

    def attempt() -> Any:
        with sdopt.load(sandbox.bundles["emoji"], "ort:cpu", threads=1) as pipe:
            token = pipe.load_embedding(path, rng.choice((None, None, "<it>")))
            return pipe.encode([f"a {token} apple"])

    return judged(what, attempt, lambda _: Outcome(LEGAL, what))


def _prompts(rng: random.Random, sandbox: Sandbox) -> Outcome:
    """A file of prompts."""
    path = sandbox.folder / "prompts.txt"
    lines = ["a red apple", "(a:1.5) [b]", "\u202e\u0301 x", "<me>" * 3, "日本" * 40, "((((", "a" * 3000]
    content, told = mutated_bytes(
        rng, "\n".join(rng.sample(lines, 2)).encode(rng.choice(("utf-8", "utf-16", "utf-8-sig")))
    )
    path.write_bytes(content[:4000])
    output = sandbox.folder / "p.png"
    words = [
        "generate",
        "--prompt-file",
        str(path),
        "-o",
        str(output),
        "--size",
        "16x16",
        "--steps",
        "1",
        "--threads",
        "1",
    ]
    words += ["--prompt-style", rng.choice(("plain", "a1111"))]
    if content.count(b"\n") > 20:
        return Outcome(LEGAL, "many prompts")
    what = f"a file of prompts: {told}"
    outcome = judged(what, lambda: command(words), lambda code: Outcome(LEGAL, what, f"exit code {code}"))
    for picture_file in sandbox.folder.glob("p*.png"):
        picture_file.unlink()
    return outcome


def _scheduler(rng: random.Random, sandbox: Sandbox) -> Outcome:
    """A scheduler_config.json for `sdopt samplers`."""
    from sdopt.cli.samplers import DEFAULT_CONFIG

    path = sandbox.folder / "scheduler_config.json"
    extra = {"timestep_spacing": "leading", "use_karras_sigmas": True, "trained_betas": None, "solver_order": 2}
    content, told = mutated_json(rng, {**DEFAULT_CONFIG, **extra})
    path.write_bytes(content)
    sampler = rng.choice(("euler", "ddim", "DPM++ 2M Karras", "unipc", "heun", "lcm", "flow_euler", "pndm"))
    words = ["samplers", "--print", sampler, "--config", str(path), "--steps", str(rng.choice((1, 2, 7)))]
    words += rng.choice(([], ["--json"], ["--schedule", rng.choice(("karras", "beta", "exponential", "trailing"))]))
    what = f"{sampler} with a scheduler config: {told}"
    return judged(what, lambda: command(words), lambda code: Outcome(LEGAL, what, f"exit code {code}"))


def _recipe(rng: random.Random, sandbox: Sandbox) -> Outcome:
    """A recipe of `sdopt build`."""
    from sdopt.build.recipe import HOMES, read_recipe

    path = sandbox.folder / "recipe.toml"
    content, told = mutated_bytes(rng, next(home for home in HOMES if home.exists()).read_bytes())
    path.write_bytes(content)
    bundle = sdopt.Bundle.open(sandbox.bundles["emoji"])
    what = f"a recipe: {told}"
    return judged(what, lambda: read_recipe(path).chosen(bundle, None), lambda _: Outcome(LEGAL, what))


TARGETS: tuple[Callable[[random.Random, Sandbox], Outcome], ...] = (
    _bundle, _bundle, _cache, _engine, _image, _replay, _embedding, _prompts, _scheduler, _recipe,
)  # fmt: skip
