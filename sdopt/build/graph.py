"""A graph and its weights: read lazily, written one weight at a time, so that 2 GB and more pass through."""

from __future__ import annotations

import os

import onnx_ir as ir

from sdopt.specs import TensorSpec


def load(path: str | os.PathLike[str]) -> ir.Model:
    """The model at `path`; its external weights stay in their file until they are asked for."""
    raise NotImplementedError


def save(model: ir.Model, path: str | os.PathLike[str]) -> None:
    """Write `path` and its weights beside it as `path`.data; `model` must not have been loaded from the same files."""
    raise NotImplementedError


def specs(model: ir.Model) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
    """(inputs, outputs) of a graph, with the names of its dimensions: what a Component needs."""
    raise NotImplementedError
