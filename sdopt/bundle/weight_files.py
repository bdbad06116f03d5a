"""Every graph's weights are in `<graph>.data`, all of them, and that file holds little else.

So no file is hashed, or opened by a library, that is far larger than the tensors in it. The second graph of a component
has its weights in the file of the first one. The verdict on graphs whose hashes are compared afterwards is kept in this
user's cache: it depends on these hashes and on the sizes of the files.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import Protocol

from sdopt.bundle.disk import read_cached, user_folder, write_cached
from sdopt.bundle.format import ComponentEntry, File, data_file
from sdopt.errors import BackendError

MAX_VERDICTS = 250
RULES = 2  # of this module; another number makes earlier verdicts void
BETWEEN = 1 << 16  # bytes that may lie before a tensor, or after the last one: tensors begin at pages


class Listing(Protocol):
    """What every manifest has: components, and the files that they are in."""

    @property
    def components(self) -> Mapping[str, ComponentEntry]: ...
    @property
    def files(self) -> Mapping[str, File]: ...


class WeightError(ValueError):
    """Weights are not where they may be. `graph` is the file that says so, or "" where it is not to blame."""

    def __init__(self, message: str, graph: str = "") -> None:
        super().__init__(message)
        self.graph = graph


def check_weight_files(folder: Path, manifest: Listing, is_certain: bool) -> None:
    """`is_certain`: the hashes of the graphs are compared afterwards, so a verdict on them may be kept, or be used.

    Raises: WeightError that names the tensor, or the file that is too large; OSError.
    """
    graphs = list(graphs_of(manifest))
    table = [[name, manifest.files[name].sha256, data, size] for name, data, size in graphs]
    key = hashlib.sha256(json.dumps([RULES, table]).encode()).hexdigest()
    verdict = _verdict(key) if is_certain else None
    if verdict is not None and _is_kept(verdict, key):
        return
    from sdopt.bundle.graphs import GraphError, weight_spans  # late: most starts know these graphs already

    spans: dict[str, set[tuple[int, int]]] = {}
    for name, data, size in graphs:
        try:
            of_graph = weight_spans(folder / name, PurePosixPath(data).name, size)
        except GraphError as error:
            raise WeightError(f"{folder / name}: {error}", name) from error
        spans.setdefault(data, set()).update(of_graph)
    for data, of_file in spans.items():
        if data not in manifest.files:
            continue
        size, needed = manifest.files[data].bytes, _covered(of_file)
        if size > needed + BETWEEN * (1 + len(of_file)):
            raise WeightError(f"{folder / data} has {size} bytes; the tensors of its graphs are {needed} of them")
    if verdict is not None:
        with suppress(OSError):
            write_cached(verdict, key.encode(), MAX_VERDICTS)


def graphs_of(manifest: Listing) -> Iterator[tuple[str, str, int | None]]:
    """Each graph, the file beside it that has its weights, and that file's size if it is listed."""
    for component, entry in manifest.components.items():
        weights = PurePosixPath(data_file(manifest.components, component)).name
        for name in (entry.graph, *(own.graph for own in entry.graphs.values())):
            data = str(PurePosixPath(name).with_name(weights))
            listed = manifest.files.get(data)
            yield name, data, None if listed is None else listed.bytes


def _covered(spans: set[tuple[int, int]]) -> int:
    """How many bytes are in at least one of the spans."""
    total = end = 0
    for first, last in sorted(spans):
        total += max(0, last - max(first, end))
        end = max(end, last)
    return total


def _verdict(key: str) -> Path | None:
    """The file that says that graphs were sound; None where this user has no home."""
    try:
        return user_folder("XDG_CACHE_HOME", ".cache") / "graphs" / key
    except BackendError:
        return None


def _is_kept(verdict: Path, key: str) -> bool:
    try:
        return read_cached(verdict, len(key)) == key.encode()
    except OSError:
        return False
