"""Weights = base + the sum of changes, for all adapters that are in use.

The sum begins at the base each time, so that going from one adapter to another leaves nothing behind. DoRA, OFT and
(IA)^3 change the base's weight too, and not what the adapter before them made of it.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from sdopt.adapters.lora.algorithms import Factors, FactorsError, change, check
from sdopt.adapters.lora.file import LoraFile, Match
from sdopt.adapters.lora.low_rank import base_and_products, in_order, low_rank
from sdopt.adapters.lora.names import Module
from sdopt.bundle.format import DENOISERS
from sdopt.bundle.joined import shallow_depth
from sdopt.bundle.specs import Float32, Scalar
from sdopt.bundle.weights import Held, Weights
from sdopt.dataclass import dataclass
from sdopt.errors import UsageError


@dataclass(frozen=True, eq=False)
class Adapter:
    """A file that is loaded into a pipeline: its name there, and what it holds for each module of the model."""

    name: str
    lora: LoraFile
    match: Match

    def factors(self, component: str) -> Iterator[tuple[Module, Factors]]:
        """The modules of one component that it changes."""
        return ((module, own) for module, own in self.match.factors.items() if module.component == component)

    def refuse_unfit(self, weights: Mapping[str, Weights]) -> None:
        """Raises: UsageError that names the first module whose factors do not fit its weight or its bias."""
        for module, factors in self.match.factors.items():
            shapes = weights[module.component].shapes
            try:
                for parameter in _parameters(module, factors):
                    if parameter not in shapes:
                        raise FactorsError(f"there is no {parameter} in this model")
                    if parameter.endswith(".bias"):
                        _bias_change(factors, shapes[parameter], 1.0)
                    else:
                        check(shapes[parameter], factors)
            except FactorsError as error:
                raise UsageError(f"{self.lora.file.path}: the tensors of {module} do not fit: {error}") from error


Scales = Mapping[str, float]  # component -> multiplier
Changes = list[tuple[Adapter, Factors, float]]  # what changes one parameter, each with its multiplier


@dataclass(frozen=True, eq=False)
class Overlay:
    """Adapters in use, each with its multiplier for each component. It never changes; another choice is another one."""

    adapters: tuple[tuple[Adapter, Scales], ...]

    @property
    def digest(self) -> str:
        """Ten hex digits over the files and the multipliers; empty without an adapter."""
        return _digest([[a.lora.digest, sorted(scales.items())] for a, scales in self.adapters])

    @property
    def described(self) -> tuple[dict[str, Any], ...]:
        """Name, SHA-256, hash in AUTOMATIC1111's way, and weights of each file in use."""
        return tuple(
            {"name": a.name, "sha256": a.lora.digest, "a1111_hash": a.lora.a1111_hash, "weights": dict(scales)}
            for a, scales in self.adapters
        )

    def scaled(self, by: float) -> Overlay:
        """The same adapters with every multiplier times `by`."""
        if by == 1:
            return self
        return Overlay(tuple((a, {c: m * by for c, m in scales.items()}) for a, scales in self.adapters))

    def key(self, component: str) -> str:
        """The same for one component, e.g. "unet" or "unet_step"; empty if no adapter changes it."""
        model = model_of(component)
        used = [(a, scales[model]) for a, scales in self.adapters if scales.get(model)]
        return _digest([[a.lora.digest, m] for a, m in used if any(a.factors(model))])

    def _changes(self, component: str) -> dict[str, Changes]:
        """Parameter -> what changes it. A multiplier of 0 changes nothing."""
        changes: dict[str, Changes] = {}
        model = model_of(component)
        for adapter, scales in self.adapters:
            m = scales.get(model, 0.0)
            for module, factors in adapter.factors(model) if m else ():
                for parameter in _parameters(module, factors):
                    changes.setdefault(parameter, []).append((adapter, factors, m))
        return changes

    def changed(self, component: str, weights: Weights) -> Iterator[tuple[str, Float32]]:
        """Every parameter that is touched, with its numbers; one in memory at a time.

        Raises: UsageError that names the file and the module where factors do not fit a weight.
        """
        for parameter, changes in self._changes(component).items():
            yield parameter, _sum(weights, parameter, changes)

    def merged(self, component: str, weights: Weights, threads: int = 1) -> Iterator[tuple[Held, Float32]]:
        """Every initializer that is touched, with its numbers in its own layout; else as `changed`.

        `threads` of them are computed at once, and a few wait to be taken.
        """
        changes = self._changes(component)
        if shallow_depth(component):  # it has the last layers alone
            changes = {parameter: own for parameter, own in changes.items() if parameter in weights.parameters}
        for parts in in_order(lambda entry: _held(weights, *entry), changes.items(), threads):
            yield from parts


NO_OVERLAY = Overlay(())


def model_of(component: str) -> str:
    """The model whose weights a component has: "unet" for "unet_step", which `sdopt build` makes."""
    return next((name for name in DENOISERS if component.startswith(f"{name}_")), component)


def _digest(content: list[list[Any]]) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:10] if content else ""


def _parameters(module: Module, factors: Factors) -> list[str]:
    """The parameters of a module that its factors change."""
    kinds = (["bias"] if "bias" in factors else []) + (["weight"] if set(factors.tensors) != {"bias"} else [])
    return [f"{module.path}.{kind}" for kind in kinds]


def _held(weights: Weights, parameter: str, changes: Changes) -> list[tuple[Held, Float32]]:
    """The initializers of one parameter, with its other numbers."""
    parts = weights.parameters[parameter]
    if parameter.endswith(".weight") and not any(part.weight.copy for part in parts):
        products = [low_rank(factors, m) for _, factors, m in changes]
        if all(products):
            return [(part, base_and_products(weights, part, [p for p in products if p])) for part in parts]
    total = _sum(weights, parameter, changes)
    return [(part, np.ascontiguousarray(part.weight.held(total))) for part in parts]


def _sum(weights: Weights, parameter: str, changes: Changes) -> Float32:
    """A parameter with its changes, in the checkpoint's layout."""
    base = weights.read(parameter)
    total = np.array(base)
    for adapter, factors, m in changes:
        total += _checked(adapter, parameter, base, factors, m)
    return total


def _checked(adapter: Adapter, parameter: str, base: Float32, factors: Factors, m: Scalar) -> Float32:
    """The change of one parameter by one adapter."""
    with np.errstate(over="ignore", invalid="ignore"):
        is_bias = parameter.endswith(".bias")
        delta = _bias_change(factors, base.shape, m) if is_bias else change(base, factors, m)
    if not np.isfinite(delta).all():
        raise UsageError(f"{adapter.lora.file.path}: with multiplier {m:g} {parameter} would be NaN or infinite")
    return delta


def _bias_change(factors: Factors, shape: tuple[int, ...], m: Scalar) -> Float32:
    """PEFT scales the bias of its up half as it scales the halves; `diff_b` and `b_norm` are whole differences.

    Raises: FactorsError for another number of outputs.
    """
    bias = factors["bias"]
    if bias.size != math.prod(shape):
        raise FactorsError(f"{list(bias.shape)} for a bias of {list(shape)}")
    s: Scalar = factors.scale(factors["down"].shape[0]) if "up" in factors else 1.0
    return np.reshape(bias, shape) * (m * s)
