"""A bundle without its weights, to be carried, and the bundle that random weights make of it elsewhere.

    python benchmarks/skeleton.py empty BUNDLE -o SKELETON     graphs, tokenizers, vectors: a few MB
    python benchmarks/skeleton.py fill SKELETON -o BUNDLE      matrices from a seeded generator: needs numpy and onnx

Speed does not depend on the values of the weights. A picture of such a bundle is noise, and parity on it is that of
noise. Matrices are normal with variance 1 / (3 fan_in), as torch begins a linear layer (`models.py` does the same).
Vectors are kept as they are: biases, the weights of norms, positions, constants.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import sys
import zlib
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx

from sdopt.bundle.files import MANIFEST, read_manifest
from sdopt.bundle.format import Manifest
from sdopt.bundle.write import new_folder, write_manifest
from sdopt.errors import BundleError, SdoptError

KEPT = "kept.npz"
SMALL = 4096  # bytes up to which a tensor is kept whatever its shape
CHUNK = 1 << 22  # values that are drawn at once
FLOATS = {"FLOAT": 4, "FLOAT16": 2, "BFLOAT16": 2}


@dataclass(frozen=True)
class Weight:
    """One initializer that stands in a weights file. `fan_in`: how many products make one sum; 0: it is kept."""

    file: str
    name: str
    kind: str
    offset: int
    nbytes: int
    fan_in: int


def empty(bundle: Path, skeleton: Path) -> Path:
    """Write the skeleton of the bundle at `bundle`.

    Raises: BundleError for what is no bundle, or a folder that exists.
    """
    if (bundle / KEPT).is_file():
        raise BundleError(f"{bundle} is a skeleton already; `skeleton.py fill {bundle} -o BUNDLE` makes a bundle of it")
    manifest = read_manifest(bundle)
    _refuse_existing(skeleton)
    kept: dict[str, np.ndarray] = {}
    for weight in weights(bundle, manifest):
        if not weight.fan_in:
            kept[key(weight)] = np.fromfile(bundle / weight.file, np.uint8, weight.nbytes, offset=weight.offset)
    with new_folder(skeleton) as folder:
        for name in manifest.files:
            if not name.endswith(".data"):
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(bundle / name, folder / name)
        np.savez_compressed(folder / KEPT, **kept)
        shutil.copyfile(bundle / MANIFEST, folder / MANIFEST)
    return skeleton


def fill(skeleton: Path, bundle: Path, seed: int = 0) -> Path:
    """Write the bundle that a skeleton becomes with random weights; its manifest says that they are random.

    Raises: BundleError for what is no skeleton, or a folder that exists.
    """
    manifest = read_manifest(skeleton)
    sizes = {name: entry.bytes for name, entry in manifest.files.items()}
    if not (skeleton / KEPT).is_file():
        raise BundleError(f"{skeleton} is not a skeleton: it has no {KEPT}. `skeleton.py empty BUNDLE -o {skeleton}`")
    _refuse_existing(bundle)
    with new_folder(bundle, needed_bytes=sum(sizes.values())) as folder:
        for name, nbytes in sizes.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            if name.endswith(".data"):
                with (folder / name).open("wb") as stream:
                    stream.truncate(nbytes)
            else:
                shutil.copyfile(skeleton / name, folder / name)
        _write_weights(folder, list(weights(folder, manifest)), np.load(skeleton / KEPT), seed)
        write_manifest(folder, replace(manifest, random_weights=seed))
    return bundle


def _refuse_existing(folder: Path) -> None:
    if folder.exists():
        raise BundleError(f"{folder} exists already; choose another name, or remove it first")


def weights(folder: Path, manifest: Manifest) -> Iterator[Weight]:
    """Every tensor of a weights file once; a graph for one library shares the file of the component's own."""
    seen: set[tuple[str, int]] = set()
    for graph in sorted((n for n in manifest.files if n.endswith(".onnx")), key=lambda n: (n.count("."), n)):
        model = onnx.load(folder / graph, load_external_data=False)
        fans = fan_ins(model.graph)
        for tensor in model.graph.initializer:
            place = {entry.key: entry.value for entry in tensor.external_data}
            if tensor.data_location != onnx.TensorProto.EXTERNAL:
                continue
            file, offset, nbytes = place["location"], int(place.get("offset", 0)), int(place["length"])
            if (file, offset) in seen:
                continue
            seen.add((file, offset))
            kind = onnx.TensorProto.DataType.Name(tensor.data_type)
            count = math.prod(tensor.dims)
            vector = kind not in FLOATS or count == max(tensor.dims, default=1) or nbytes <= SMALL
            yield Weight(file, tensor.name, kind, offset, nbytes, 0 if vector else fans[tensor.name])


def fan_ins(graph: onnx.GraphProto) -> dict[str, int]:
    """Of each initializer: how many of its numbers meet in one sum, by what reads it, also behind a Cast."""
    origin = {tensor.name: tensor.name for tensor in graph.initializer}
    for node in graph.node:
        if node.op_type == "Cast" and node.input[0] in origin:
            origin[node.output[0]] = origin[node.input[0]]
    fans = {tensor.name: math.prod(tensor.dims[1:]) for tensor in graph.initializer}
    shapes = {tensor.name: tensor.dims for tensor in graph.initializer}
    for node in graph.node:
        turned = node.op_type == "Gemm" and any(a.name == "transB" and a.i for a in node.attribute)
        if node.op_type in ("MatMul", "Gemm") and not turned and node.input[1] in origin:
            name = origin[node.input[1]]
            fans[name] = shapes[name][-2] if len(shapes[name]) > 1 else 1
    return fans


def key(weight: Weight) -> str:
    """The name of a kept tensor in the skeleton's file."""
    return f"{weight.file}@{weight.offset}"


def _write_weights(folder: Path, found: list[Weight], kept: Mapping[str, np.ndarray], seed: int) -> None:
    files = {name: np.memmap(folder / name, np.uint8, "r+") for name in {weight.file for weight in found}}
    known = {name: kept[name] for name in kept}  # read once: the file is not made for threads

    def write(weight: Weight) -> None:
        target = files[weight.file][weight.offset : weight.offset + weight.nbytes]
        if not weight.fan_in:
            target[:] = known[key(weight)]
            return
        rng = np.random.default_rng([seed, zlib.crc32(key(weight).encode())])
        size, std = FLOATS[weight.kind], (3 * weight.fan_in) ** -0.5
        for start in range(0, weight.nbytes, CHUNK * size):
            part = target[start : start + CHUNK * size]
            part[:] = as_bytes(rng.standard_normal(part.size // size, np.float32) * np.float32(std), weight.kind)

    with ThreadPoolExecutor() as pool:
        list(pool.map(write, sorted(found, key=lambda weight: -weight.nbytes)))
    for file in files.values():
        file.flush()


def as_bytes(values: np.ndarray, kind: str) -> np.ndarray:
    """Float32 values as the bytes of an ONNX type; bfloat16 is float32's upper half, rounded to the nearest."""
    if kind == "BFLOAT16":
        bits = values.view(np.uint32)
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16).view(np.uint8)
    return values.astype(np.float16 if kind == "FLOAT16" else np.float32).view(np.uint8)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    words = parser.add_subparsers(dest="word", required=True, metavar="empty | fill")
    for name, source in (("empty", "BUNDLE"), ("fill", "SKELETON")):
        command = words.add_parser(name)
        command.add_argument("source", type=Path, metavar=source)
        command.add_argument("-o", "--output", type=Path, required=True, metavar="FOLDER")
    words.choices["fill"].add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    try:
        done = empty(args.source, args.output) if args.word == "empty" else fill(args.source, args.output, args.seed)
    except (SdoptError, OSError, json.JSONDecodeError) as error:
        print(f"skeleton.py: {error}", file=sys.stderr)
        return 3
    print(done)
    return 0


if __name__ == "__main__":
    sys.exit(main())
