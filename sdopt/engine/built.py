"""What `sdopt build` made of a component, for the libraries that take a graph: ONNX Runtime and OpenVINO."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from sdopt.bundle.files import Component, ModelFolder
from sdopt.engine import EngineOptions
from sdopt.engine.store import GRAPH, Record, Stored, built_components, usable
from sdopt.errors import UsageError

ROUNDED = ("int8", "fp8", "int8-weights")  # precisions whose weights are rounded in the file


def built_graph(
    bundle: ModelFolder,
    name: str,
    options: EngineOptions,
    provider: str,
    environment: Callable[[Mapping[str, Any]], Mapping[str, str]] = lambda options: {},
) -> tuple[Stored, Component] | None:
    """The newest engine of a component for a provider, in the wanted precision, and its graph; None without one.

    `environment`: what a graph depends on besides the provider, by the options that it was built with.
    Raises: BackendError for one that is stale, damaged or somebody else's; UsageError for an overlay on
    rounded weights.
    """
    if name not in built_components(bundle, options.backend, provider, options.built, not options.trust):
        return None

    def here(record: Record) -> dict[str, str]:
        return {"provider": provider, **environment(record.options)}

    newest = usable(bundle, name, options.backend, here, options.trust, provider, options.built)[0]
    for file in newest.record.files:
        newest.checked(file)
    if options.overlay is not None and newest.precision in ROUNDED:
        raise UsageError(
            f"{name} in {newest.precision} takes no LoRA: its weights are rounded already. Take another precision, "
            "e.g. fp32"
        )
    return newest, Component(name, newest.folder / GRAPH, newest.record.inputs, newest.record.outputs)
