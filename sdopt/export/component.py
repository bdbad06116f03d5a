"""One component of a bundle, written: traced, proven, measured. And the tokenizers."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from sdopt.bundle.format import ComponentEntry, Encoder, LibraryGraph, Parity, TokenizerEntry
from sdopt.errors import CheckpointError
from sdopt.export import parity, trace, weights
from sdopt.export.checkpoint import Checkpoint
from sdopt.export.families.contract import Build
from sdopt.graph.ort_ops import write_ort_graph

HEADER = f"{'component':<14}{'seconds':>9}{'MB':>9}  {'weights':<8}{'parity dB':>10}{'max error':>11}"
Report = Callable[[str], None]


def write_component(
    build: Build,
    checkpoint: Checkpoint,
    folder: Path,
    opset: int,
    floor_db: float | None,
    report: Report,
) -> ComponentEntry:
    """Write the graphs of one component into `folder`. Returns its entry in the manifest.

    Without `floor_db` its parity is not measured. The model is run first and released before its graph is opened, so
    that its weights are in memory once.
    """
    started = time.perf_counter()
    part = build(checkpoint)
    references = parity.references(part) if floor_db is not None else []
    graph = folder / f"{part.name}.onnx"
    stored = trace.save(trace.trace(part, opset), graph)
    weights.prove(part, graph)
    part = part.released()
    ort_graph = write_ort_graph(graph)
    results: list[Parity] = []
    ort_results: list[Parity] = []
    if floor_db is not None:
        results = parity.measure(part, graph, references)
        ort_results = parity.measure(part, ort_graph, references) if ort_graph is not None else []
    size = sum(path.stat().st_size for path in folder.glob(f"{part.name}.*"))
    seconds = time.perf_counter() - started
    measured = [*results, *ort_results]
    report(f"{part.name:<14}{seconds:>9.1f}{size / 1e6:>9.1f}  {stored:<8}{_summary(measured)}")
    if floor_db is not None:
        parity.gate(part, measured, floor_db)
    graphs = {} if ort_graph is None else {"ort": LibraryGraph(ort_graph.name, tuple(ort_results))}
    return ComponentEntry(graph.name, opset, stored, part.inputs, part.outputs, tuple(results), graphs)


def _summary(results: Sequence[Parity]) -> str:
    """The worst parity and the largest error, as columns under HEADER."""
    if not results:
        return "unverified"
    return f"{min(r.psnr_db for r in results):>10.1f}{max(r.max_error for r in results):>11.1e}"


def write_tokenizer(checkpoint: Checkpoint, folder: Path, encoder: Encoder) -> TokenizerEntry:
    """Write NAME/tokenizer.json, made from vocab.json and merges.txt where a checkpoint has only those."""
    name = encoder.tokenizer
    tokenizer = checkpoint.tokenizer(name)
    path = folder / name / "tokenizer.json"
    path.parent.mkdir()
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    path.write_text(json.dumps({**content, "truncation": None, "padding": None}, ensure_ascii=False), encoding="utf-8")
    config = checkpoint.config(encoder.component)
    length = min(tokenizer.model_max_length, config["max_position_embeddings"])
    ids = {key: getattr(tokenizer, key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    if None in ids.values():
        raise CheckpointError(f"{checkpoint.folder / name}: it names no {' or '.join(ids)}: {ids}")
    return TokenizerEntry(f"{name}/tokenizer.json", length, vocab_size=config["vocab_size"], **ids)
