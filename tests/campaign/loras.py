"""LoRA files, damaged by their structure: names, shapes, types, numbers, metadata, and the header around them.

A file is refused, or it is used: then the picture is finite and another one, and is the right one again as soon as the
file is unloaded.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import sdopt
from tests.adapters.lora_files import diffusers_key, is_linear, kohya, shapes, tensors
from tests.campaign.cases import LEGAL, NONSENSE, OTHER, Case, Outcome
from tests.campaign.commands import command
from tests.campaign.mutate import HOSTILE, mutated_bytes, mutated_json
from tests.campaign.sandbox import Sandbox, judged

Header = dict[str, Any]
TYPES = {"F32": np.float32, "F16": np.float16, "F64": np.float64, "I64": np.int64, "I8": np.int8, "BOOL": np.bool_}
NUMBERS = (np.nan, np.inf, -np.inf, 3e38, 1e-45, -0.0, 1e20)
NO_CHANGE = ("zeros", "alpha", "bytes", "header")  # these may lead to a file that changes nothing


def small_lora(bundle: Path, key: Callable[[str, str], str] = kohya, seed: int = 0) -> tuple[Header, bytes]:
    """A LoRA of three linears of a UNet: its header, and the bytes of its tensors."""
    found = shapes(sdopt.Bundle.open(bundle), "unet")
    paths = sorted(path for path in found if is_linear(path))
    chosen = {path: found[path] for path in random.Random(seed).sample(paths, min(3, len(paths)))}
    return packed(tensors({"unet": chosen}, key, rank=2, seed=seed))


def packed(arrays: dict[str, Any]) -> tuple[Header, bytes]:
    header: Header = {}
    data = b""
    names = {np.dtype(kind): name for name, kind in TYPES.items()}
    for name, array in arrays.items():
        span = [len(data), len(data) + array.nbytes]
        header[name] = {"dtype": names[array.dtype], "shape": list(array.shape), "data_offsets": span}
        data += array.tobytes()
    return header, data


def written(path: Path, header: Header | bytes, data: bytes, length: int | None = None) -> Path:
    """A safetensors file, whose header may have another length than it says."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return path


def run(case: Case, sandbox: Sandbox) -> Outcome:
    rng = case.random()
    name = rng.choice(list(sandbox.bundles))
    folder = sandbox.bundles[name]
    key, seed = rng.choice((kohya, diffusers_key)), rng.randint(0, 9)
    ends = {} if key is kohya else {"ends": (".lora_A.weight", ".lora_B.weight"), "alpha": None}
    found = shapes(sdopt.Bundle.open(folder), "unet")
    paths = random.Random(seed).sample(sorted(filter(is_linear, found)), 3)
    arrays = tensors({"unet": {path: found[path] for path in paths}}, key, rank=2, seed=seed, **ends)
    path = sandbox.folder / "style.safetensors"
    how, change = rng.choice(list(CHANGES.items()))
    what = f"{name}: {how}: {change(rng, arrays, path)}"
    if rng.random() < 0.2:
        return _on_the_command_line(rng, sandbox, folder, path, what)

    def attempt() -> tuple[Any, Any]:
        with sdopt.load(folder, "ort:cpu", threads=1) as pipe:
            request = {**sandbox.request(name), "output_type": "np"}
            pipe.load_lora_weights(path, strict=rng.random() < 0.8)
            images = pipe(**request).images
            pipe.unload_lora_weights()
            return images, pipe(**request).images

    right = sandbox.right(name)

    def judge(pictures: tuple[Any, Any]) -> Outcome:
        images, after = pictures
        if not np.array_equal(after, right):
            return Outcome(OTHER, what, "after the file was unloaded")
        if not np.isfinite(images).all():
            return Outcome(NONSENSE, what, "a picture of what is no number")
        if np.array_equal(images, right) and how not in NO_CHANGE:
            return Outcome(NONSENSE, what, "taken, and it changes nothing")
        return Outcome(LEGAL, what)

    return judged(what, attempt, judge)


def _on_the_command_line(rng: random.Random, sandbox: Sandbox, folder: Path, path: Path, what: str) -> Outcome:
    weight = rng.choice(("", "", ":0.5", ":0.5:0.8", ":nan", ":1e9", ":", ":-1", ":1:2:3"))
    output = sandbox.folder / "styled.png"
    words = rng.choice(
        (
            ["inspect", str(path), *rng.choice(([], ["--json"]))],
            ["generate", "a", "-m", str(folder), "--lora", f"{path}{weight}", "-o", str(output), "--steps", "1",
             "--size", "16x16", "--threads", "1"],
        )
    )  # fmt: skip
    told = f"{what}; {words[0]} {weight}"
    outcome = judged(told, lambda: command(words), lambda code: Outcome(LEGAL, told, f"exit code {code}"))
    output.unlink(missing_ok=True)
    return outcome


def _key(rng: random.Random, arrays: dict[str, Any]) -> str:
    return rng.choice(list(arrays))


def _header(rng: random.Random, arrays: dict[str, Any], path: Path) -> str:
    header, data = packed(arrays)
    content, told = mutated_json(rng, header)
    written(path, content, data)
    return told


def _bytes(rng: random.Random, arrays: dict[str, Any], path: Path) -> str:
    written(path, *packed(arrays))
    content, told = mutated_bytes(rng, path.read_bytes())
    path.write_bytes(content)
    return told


def _length(rng: random.Random, arrays: dict[str, Any], path: Path) -> str:
    header, data = packed(arrays)
    right = len(json.dumps(header))
    length = rng.choice((0, 1, right - 1, right + 1, right + len(data), 1 << 31, (1 << 63) - 1, (1 << 64) - 1))
    written(path, header, data, length)
    return f"{length}, right is {right}"


def _number(rng: random.Random, arrays: dict[str, Any], path: Path) -> str:
    key, number = _key(rng, arrays), rng.choice(NUMBERS)
    array = arrays[key].reshape(-1)
    array[rng.randrange(array.size) if rng.random() < 0.5 else slice(None)] = number
    written(path, *packed(arrays))
    return f"{key} has {number}"


def _zeros(rng: random.Random, arrays: dict[str, Any], path: Path) -> str:
    key = _key(rng, arrays)
    arrays[key][...] = 0
    written(path, *packed(arrays))
    return key


def _alpha(rng: random.Random, arrays: dict[str, Any], path: Path) -> str:
    key = _key(rng, arrays).partition(".lora")[0].removesuffix(".alpha") + ".alpha"
    value = rng.choice((0, -1, 1e30, np.nan, [1, 2], [[2.0]], []))
    arrays[key] = np.array(value, np.float32)
    written(path, *packed(arrays))
    return f"{key} = {value}"


def _shape(rng: random.Random, arrays: dict[str, Any], path: Path) -> str:
    key = _key(rng, arrays)
    array = arrays[key]
    ways: dict[str, Callable[[], Any]] = {
        "transposed": lambda: array.T.copy(), "flat": lambda: array.reshape(-1), "more": lambda: array[..., None],
        "none": lambda: array[:0] if array.ndim else array.reshape(1)[:0], "twice": lambda: np.stack([array, array]),
        "longer": lambda: np.concatenate([array.reshape(1, -1)] * 2), "one": lambda: np.ones((1, 1), np.float32),
        "convolution": lambda: array[..., None, None], "deep": lambda: array.reshape(*(1,) * 12, *array.shape),
    }  # fmt: skip
    way = rng.choice(list(ways))
    arrays[key] = ways[way]()
    written(path, *packed(arrays))
    return f"{key} {way}"


def _type(rng: random.Random, arrays: dict[str, Any], path: Path) -> str:
    key, kind = _key(rng, arrays), rng.choice(list(TYPES))
    arrays[key] = arrays[key].astype(TYPES[kind])
    header, data = packed(arrays)
    if rng.random() < 0.3:
        kind = rng.choice(("BF16", "F8_E4M3", "F4", "", "f32", "C64", None, 7))
        header[key]["dtype"] = kind
    written(path, header, data)
    return f"{key} as {kind}"


def _names(rng: random.Random, arrays: dict[str, Any], path: Path) -> str:
    key = _key(rng, arrays)
    new = rng.choice(
        (key.upper(), f"x.{key}", key.replace("lora_", ""), key.replace("up", "down"), key.replace("_", "."), "", "\0",
         "x" * 70_000, key.replace("unet", "text_encoder"), f"bundle_emb.x.{key}", "\ud800", key + ".weight")
    )  # fmt: skip
    arrays[new] = arrays[key] if rng.random() < 0.5 else arrays.pop(key)
    written(path, *packed(arrays))
    return f"{key} is {new[:60]!r}" + (" too" if key in arrays else "")


def _missing(rng: random.Random, arrays: dict[str, Any], path: Path) -> str:
    gone = rng.sample(list(arrays), rng.choice((1, 1, 2, len(arrays))))
    for key in gone:
        del arrays[key]
    written(path, *packed(arrays))
    return f"without {len(gone)}"


def _metadata(rng: random.Random, arrays: dict[str, Any], path: Path) -> str:
    header, data = packed(arrays)
    key = rng.choice(
        ("ss_base_model_version", "ss_network_module", "sshs_model_hash", "lora_adapter_metadata", "modelspec.title",
         "modelspec.architecture", "ss_tag_frequency", "ss_network_args", "ss_network_dim", "x")
    )  # fmt: skip
    value = rng.choice((*HOSTILE, "[" * 3000, '{"r": null}', '{"unet.lora_alpha": "x"}', '{"unet.lora_alpha": NaN}'))
    header["__metadata__"] = value if rng.random() < 0.1 else {key: value if rng.random() < 0.3 else str(value)}
    written(path, header, data)
    return f"{key} = {repr(value)[:60]}"


CHANGES: dict[str, Callable[[random.Random, dict[str, Any], Path], str]] = {
    "header": _header, "bytes": _bytes, "length": _length, "number": _number, "zeros": _zeros, "alpha": _alpha,
    "shape": _shape, "type": _type, "names": _names, "missing": _missing, "metadata": _metadata,
}  # fmt: skip
