"""Files whose hashes fit, because whoever changed them changed the manifest too: hostile, and well formed outside.

Such a bundle is another one, so another picture is legal. What it may not do: end the process, hang, or raise what
is no error of sdopt.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

import sdopt
from tests.campaign.cases import LEGAL, Case, Outcome
from tests.campaign.mutate import mutated_bytes, mutated_json
from tests.campaign.sandbox import Sandbox, judged, picture, replaced

SIZES = {"images": 1, "batch": 1, "latent_height": 4, "latent_width": 4, "height": 16, "width": 16, "tokens": 8}


def run(case: Case, sandbox: Sandbox) -> Outcome:
    rng = case.random()
    return rng.choice((_graph, _graph, _graph, _tokenizer, _tokenizer, _tables))(rng, sandbox)


@contextmanager
def forged(path: Path, content: bytes) -> Generator[None]:
    """A file of a bundle with other content, and a manifest that has its hash."""
    manifest = next(parent for parent in path.parents if (parent / "manifest.json").exists()) / "manifest.json"
    entry = json.loads(manifest.read_text())
    name = path.relative_to(manifest.parent).as_posix()
    entry["files"][name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    with replaced(path, content), replaced(manifest, json.dumps(entry).encode()):
        yield


def _graph(rng: random.Random, sandbox: Sandbox) -> Outcome:
    """A graph, changed by its bytes or by its structure; it is opened and called as the runtime does."""
    name = rng.choice([name for name in sandbox.bundles if name != "emoji"] or ["emoji"])
    folder = sandbox.bundles[name]
    path = rng.choice(sorted(folder.glob("*.onnx")))
    if rng.random() < 0.5:
        content, told = mutated_bytes(rng, path.read_bytes())
    else:
        content, told = _changed(rng, path.read_bytes())
    component = path.name.split(".")[0]
    library = "openvino" if rng.random() < 0.2 else "ort:cpu"
    what = f"{name}/{path.name} on {library}: {told}"

    def attempt() -> Any:
        bundle = sdopt.Bundle.open(folder)
        with sdopt.open_engine(bundle, component, library, threads=1, cache=False) as engine:
            arrays = {spec.name: _numbers(spec) for spec in engine.inputs}
            return engine(**arrays)

    with forged(path, content):
        return judged(what, attempt, lambda _: Outcome(LEGAL, what))


def _numbers(spec: Any) -> Any:
    shape = [SIZES.get(size, 2) if isinstance(size, str) else size for size in spec.shape]
    return np.ones(shape, spec.dtype)


def _changed(rng: random.Random, content: bytes) -> tuple[bytes, str]:
    """One message of a graph with another value."""
    import onnx

    model = onnx.load_model_from_string(content)
    graph = model.graph
    how = rng.choice(
        (
            "dims",
            "type",
            "offset",
            "length",
            "location",
            "op",
            "domain",
            "input",
            "delete",
            "attribute",
            "shape",
            "rename",
            "opset",
        )
    )
    outside = [tensor for tensor in graph.initializer if tensor.external_data]
    tensor, node = rng.choice(outside), rng.choice(graph.node)
    number = rng.choice((0, 1, -1, 3, 1 << 20, 1 << 40, (1 << 63) - 1, -(1 << 63)))
    told = f"{how} {number}"
    if how == "dims":
        tensor.dims[:] = rng.choice(([number], [1, 1, 1], [], [*tensor.dims, 1], list(tensor.dims)[::-1]))
    elif how == "type":
        tensor.data_type = rng.randint(0, 24)
    elif how in ("offset", "length", "location"):
        for entry in tensor.external_data:
            if entry.key == how:
                entry.value = rng.choice((str(number), "", "x", "../x", "1.5", "9" * 40, "\0"))
                told = f"{how} {entry.value!r}"
    elif how == "op":
        node.op_type = rng.choice(
            ("", "Nothing", "Loop", "If", "Reshape", "Gather", "MatMul", "Conv", "Attention", "x" * 99)
        )
    elif how == "domain":
        node.domain = rng.choice(("com.microsoft", "x", "\0", "ai.onnx.ml"))
    elif how == "input" and node.input:
        node.input[rng.randrange(len(node.input))] = rng.choice((*rng.choice(graph.node).output, "", "nothing"))
    elif how == "delete":
        graph.node.remove(node)
    elif how == "attribute" and node.attribute:
        attribute = rng.choice(node.attribute)
        attribute.i = max(-(1 << 63), min((1 << 63) - 1, number))
        if attribute.ints:
            attribute.ints[0] = number
        if rng.random() < 0.3:
            attribute.type = rng.randint(0, 14)
    elif how == "shape":
        own = rng.choice([*graph.input, *graph.output]).type.tensor_type
        own.elem_type = rng.choice((own.elem_type, rng.randint(0, 24)))
        if own.shape.dim:
            own.shape.dim[rng.randrange(len(own.shape.dim))].dim_value = number
    elif how == "rename":
        rng.choice([*graph.input, *graph.output]).name = rng.choice(("", "x", node.name, "\u202e"))
    elif how == "opset":
        model.opset_import[0].version = rng.choice((0, -1, 1, 7, 18, 23, 24, 999))
    return model.SerializeToString(), f"{node.op_type if how in ('op', 'input', 'delete', 'attribute') else ''} {told}"


def _tokenizer(rng: random.Random, sandbox: Sandbox) -> Outcome:
    name = rng.choice(list(sandbox.bundles))
    folder = sandbox.bundles[name]
    path = rng.choice(sorted(folder.glob("tokenizer*/tokenizer.json")))
    if rng.random() < 0.7:
        entry = json.loads(path.read_bytes())
        shown = {key: value for key, value in entry.items() if key != "model"}  # its vocabulary is thousands of values
        model = entry.get("model", {})
        small = {key: value for key, value in model.items() if key not in ("vocab", "merges")}
        small["vocab"] = dict(list(model.get("vocab", {}).items())[: rng.choice((5, 10_000))])
        small["merges"] = model.get("merges", [])[: rng.choice((5, 10_000))]
        content, told = mutated_json(
            rng, {**shown, "model": small} if rng.random() < 0.5 else {**shown, "model": model}
        )
    else:
        content, told = mutated_bytes(rng, path.read_bytes())
    what = f"{name}/{path.parent.name}: {told}"
    prompt = rng.choice(("a red apple", "", "日本 (x:1.2) [y] ❤️ \u0301", "a " * 200, "<|endoftext|> a"))
    request = {**sandbox.request(name), "prompt": prompt, "prompt_style": rng.choice(("plain", "a1111"))}

    def attempt() -> Any:
        with sdopt.load(folder, "ort:cpu", threads=1) as pipe:
            widths = [s.shape[1] for s in pipe.bundle.component("text_encoder").inputs if s.name == "extra_embeddings"]
            if widths and name != "sdxl" and rng.random() < 0.3:
                pipe.load_embedding(np.ones((2, widths[0]), np.float32), "<me>")
            return pipe(**request, output_type="np").images

    with forged(path, content):
        return judged(what, attempt, lambda _: Outcome(LEGAL, what))


def _tables(rng: random.Random, sandbox: Sandbox) -> Outcome:
    """The sampler's tables of a bundle."""
    folder = sandbox.with_tables
    path = folder / "tables.json"
    content, told = mutated_json(rng, json.loads(path.read_bytes()))
    what = f"sampler tables: {told}"
    request = {**sandbox.request("tables"), "num_inference_steps": rng.choice((1, 2, 4, 5))}
    with forged(path, content):
        return judged(what, lambda: picture(folder, request), lambda _: Outcome(LEGAL, what))
