"""Write one component of a bundle: trace it, prove its weights, measure its parity."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from sdopt.bundle.format import ComponentEntry, LibraryGraph, Parity
from sdopt.errors import CheckpointError
from sdopt.export import parity, trace, weights
from sdopt.export.checkpoint import Checkpoint
from sdopt.export.families.contract import Build
from sdopt.export.part import Part
from sdopt.graph.ort_ops import write_ort_graph

HEADER = f"{'component':<16}{'seconds':>7}{'MB':>9}  {'weights':<8}{'parity dB':>10}{'max error':>11}"
Report = Callable[[str], None]
Progress = Callable[[str, int, int], None]  # (what is done now, how many phases are done, of how many)


class Phases:
    """Tells `progress` which phase of an export begins. Each component has two: it is traced, then checked."""

    def __init__(self, progress: Progress | None, components: int) -> None:
        self._progress, self._done, self._of = progress, 0, 2 + 2 * components

    def __call__(self, phase: str) -> None:
        if self._progress is not None:
            self._progress(phase, self._done, self._of)
        self._done += 1


def write_component(
    build: Build,
    checkpoint: Checkpoint,
    folder: Path,
    opset: int,
    floor_db: float | None,
    report: Report,
    phase: Phases,
) -> dict[str, ComponentEntry]:
    """Write the graphs of one component and of its variants into `folder`. Returns their entries in the manifest."""
    return write_part(build(checkpoint), folder, opset, floor_db, report, phase)


def write_part(
    part: Part, folder: Path, opset: int, floor_db: float | None, report: Report, phase: Callable[[str], None]
) -> dict[str, ComponentEntry]:
    """The same for a part that is loaded.

    Without `floor_db` its parity is not measured. The model runs first, and is released before its graph is opened, so
    that its weights are in memory only once.
    """
    started = time.perf_counter()
    phase(f"tracing {part.name}")
    measured = [part, *(variant.part for variant in part.variants)] if floor_db is not None else []
    references = {one.name: _references(one) for one in measured}
    graph = folder / f"{part.name}.onnx"
    stored = trace.save(trace.trace(part, opset), graph)
    weights.prove(part, graph)
    part = part.released()
    phase(f"checking {part.name}")
    entries: dict[str, ComponentEntry] = {}
    for one, write in ((part, None), *((variant.part, variant.write) for variant in part.variants)):
        own = folder / f"{one.name}.onnx"
        if write is not None:
            write(graph, own)
        entry = _checked(one, own, opset, stored, references.get(one.name), floor_db)
        entries[one.name] = entry if write is None else replace(entry, weights_of=part.name)
        paths = [path for path in folder.glob(f"{one.name}.*") if path.is_file()]
        size, seconds = sum(path.stat().st_size for path in paths), time.perf_counter() - started
        report(f"{one.name:<16}{seconds:>7.1f}{size / 1e6:>9.1f}  {stored:<8}{_summary(entry)}")
        started = time.perf_counter()
    return entries


def _checked(
    part: Part,
    graph: Path,
    opset: int,
    stored: str,
    references: Sequence[parity.Reference] | None,
    floor_db: float | None,
) -> ComponentEntry:
    """The entry of a graph that is written, with its second graph for ONNX Runtime.

    Raises: ParityError if one of them computes something else than the references.
    """
    ort_graph = write_ort_graph(graph)
    results: list[Parity] = []
    ort_results: list[Parity] = []
    if floor_db is not None:
        results = parity.measure(part, graph, references)
        ort_results = parity.measure(part, ort_graph, references) if ort_graph is not None else []
        parity.gate(part, [*results, *ort_results], floor_db)
    graphs = {} if ort_graph is None else {"ort": LibraryGraph(ort_graph.name, tuple(ort_results))}
    return ComponentEntry(graph.name, opset, stored, part.inputs, part.outputs, tuple(results), graphs)


def _references(part: Part) -> list[parity.Reference]:
    """What PyTorch computes.

    Raises: CheckpointError if the model does not take the inputs that its pipeline gives it.
    """
    try:
        return parity.references(part)
    except Exception as error:  # of the model's own code
        raise CheckpointError(f"{part.name}: the model of the checkpoint cannot be run: {error}") from error


def _summary(entry: ComponentEntry) -> str:
    """The worst parity and the largest error of its graphs, as columns under HEADER."""
    results = [*entry.parity, *(result for own in entry.graphs.values() for result in own.parity)]
    if not results:
        return "unverified"
    lowest_db = min(result.psnr_db for result in results)
    largest_error = max(result.max_error for result in results)
    return f"{lowest_db:>10.1f}{largest_error:>11.1e}"
