"""The LoRA files that a pipeline has loaded, and which of them are in use.

Threads may load and choose while others make pictures: what is in use is an `Overlay`, which never changes, and each
call takes the one of its beginning.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from numbers import Real
from threading import RLock
from typing import Any, cast

from sdopt.adapters.lora.few_steps import FewSteps, few_steps
from sdopt.adapters.lora.file import LoraFile, Match, cross_attention_width, made_for, match, read_lora
from sdopt.adapters.lora.merge import NO_OVERLAY, Adapter, Overlay, Scales
from sdopt.adapters.lora.names import spellings
from sdopt.bundle.files import Bundle
from sdopt.bundle.weights import Weights, takes_overlay
from sdopt.errors import UsageError, choices, refuse_no_path, refuse_no_switch, refuse_other, shown

Weight = float | int | Mapping[str, float]
MOST = 100.0  # of a multiplier, either way


class Loras:
    """The adapters of one bundle."""

    def __init__(self, bundle: Bundle) -> None:
        self._bundle = bundle
        self._lock = RLock()
        self._adapters: dict[str, Adapter] = {}
        self._used = NO_OVERLAY
        self.is_enabled = True  # else none is in use, and which were is remembered

    @property
    def overlay(self) -> Overlay:
        """The adapters in use, with their multipliers."""
        return self._used if self.is_enabled else NO_OVERLAY

    @property
    def chosen(self) -> list[str]:
        """The names of the adapters in use, or of those that will be when they are enabled again."""
        return [adapter.name for adapter, _ in self._used.adapters]

    @property
    def components(self) -> tuple[str, ...]:
        """The components whose weights an adapter may change: the UNet and the text encoders."""
        return tuple(filter(takes_overlay, self._bundle.components))

    def load(self, source: str | os.PathLike[str], name: str | None, strict: bool = True) -> Adapter:
        """Load a file under a name, by default the file's own, and use it beside those in use, with multiplier 1.

        Raises: UsageError for a file that is damaged or made for another model, and for a name that is taken.
        """
        refuse_no_path("source", source)
        refuse_no_switch(strict=strict)
        if name is not None:
            name = _word("adapter_name", name)
        lora = read_lora(source)
        name = lora.name if name is None else name
        weights = {component: Weights.of(self._bundle.component(component)) for component in self.components}
        modules = {c: {parameter.rpartition(".")[0] for parameter in w.parameters} for c, w in weights.items()}
        refuse_other_family(lora, weights[self._bundle.manifest.denoiser], self._bundle)
        outputs = {c: _outputs(own) for c, own in weights.items()}
        matched = match(lora, spellings(modules, outputs))
        if strict or not matched.factors:
            refuse_unmatched(lora, matched, self._bundle)
        adapter = Adapter(name, lora, matched)
        adapter.refuse_unfit(weights)
        with self._lock:
            if name in self._adapters:
                raise UsageError(
                    f"adapter_name = {name!r} is taken; unload it first, or choose another name", "adapter_name"
                )
            self._adapters[name] = adapter
            self._used = Overlay((*self._used.adapters, (adapter, self._scales(name, 1.0))))
        return adapter

    def use(self, names: str | Sequence[str], weights: Weight | Sequence[Weight] | None = None) -> None:
        """Use these adapters and no others, each with its multiplier: a number, or one for each component.

        Raises: UsageError for a name that is not loaded, another number of weights, or a number out of range.
        """
        if not isinstance(names, (str, list, tuple)):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise UsageError(
                f"adapter_names = {shown(names)}; allowed are a name, and a list of names", "adapter_names"
            )
        wanted = [names] if isinstance(names, str) else list(names)
        each: list[Any] = list(weights) if isinstance(weights, (list, tuple)) else [weights] * len(wanted)
        if len(each) != len(wanted):
            raise UsageError(f"{len(each)} weights for {len(wanted)} adapters", "adapter_weights")
        for name in wanted:
            refuse_other("adapter_names", name, str, "are texts")
        if len(set(wanted)) != len(wanted):
            raise UsageError(f"adapter_names = {wanted}: each may be there once", "adapter_names")
        with self._lock:
            chosen = [(self._named(name), self._scales(name, w)) for name, w in zip(wanted, each, strict=True)]
            self._used = Overlay(tuple(chosen))

    def unload(self, names: str | Sequence[str] | None = None) -> None:
        """Forget these adapters, or all of them.

        Raises: UsageError for a name that is not loaded; then none is forgotten.
        """
        names = [names] if isinstance(names, str) else names
        with self._lock:
            for name in self._adapters if names is None else names:
                self._named(name)
            kept = {} if names is None else {n: a for n, a in self._adapters.items() if n not in names}
            self._adapters = kept
            used = tuple((a, scales) for a, scales in self._used.adapters if a.name in kept)
            self._used = Overlay(used) if used else NO_OVERLAY
            self.is_enabled = self.is_enabled or not kept

    def suggestion(self, name: str) -> FewSteps | None:
        """How to call with this adapter, if it makes pictures in few steps."""
        return few_steps(self._named(name).lora)

    @property
    def names(self) -> dict[str, list[str]]:
        """Component -> the adapters that change it, as diffusers lists them."""
        return {
            component: names
            for component in self.components
            if (names := [n for n, a in self._adapters.items() if any(a.factors(component))])
        }

    def _named(self, name: str) -> Adapter:
        refuse_other("adapter_names", name, str, "are texts")
        if name not in self._adapters:
            there = choices(name, self._adapters) if self._adapters else "none"
            raise UsageError(f"adapter {name!r} is not loaded; loaded are {there}", "adapter_names")
        return self._adapters[name]

    def _scales(self, name: str, weight: Any) -> Scales:
        """A multiplier for each component. None is 1."""
        if weight is None:
            weight = 1.0
        by_component = isinstance(weight, Mapping)
        given = cast("Mapping[str, Any]", weight) if by_component else dict.fromkeys(self.components, weight)
        unknown = [key for key in given if key not in self.components]
        if unknown:
            raise UsageError(
                f"the weight of adapter {name!r} names {shown(unknown[0])}; "
                f"this model has {', '.join(self.components)}",
                "adapter_weights",
            )
        return {component: _number(name, given.get(component, 1.0)) for component in self.components}


def _outputs(weights: Weights) -> dict[str, int]:
    """The number of outputs of each module."""
    ends = {name: name.removesuffix(".weight") for name in weights.shapes if name.endswith(".weight")}
    return {module: weights.shapes[name][0] for name, module in ends.items()}


def _number(name: str, value: Any) -> float:
    number = value if isinstance(value, (Real, int)) and not isinstance(value, bool) else float("nan")
    if not -MOST <= cast(float, number) <= MOST:
        raise UsageError(
            f"the weight of adapter {name!r} is {shown(value)}; allowed are numbers from -{MOST:g} to {MOST:g}, "
            'or one for each component, {"unet": 0.8, "text_encoder": 0.5}',
            "adapter_weights",
        )
    return float(number)


def _word(param: str, name: object) -> str:
    """Raises: UsageError for what cannot be the name of an adapter."""
    refuse_other(param, name, str, "are texts")
    word = cast(str, name)
    if not word.strip() or not word.isprintable():
        raise UsageError(f"{param} = {shown(word)}; allowed are texts that can be printed", param)
    return word


def refuse_other_family(lora: LoraFile, unet: Weights, bundle: Bundle) -> None:
    """Raises: UsageError if the file's cross-attentions read prompts of another width than the model's."""
    width = cross_attention_width(lora)
    own = next((shape[1] for name, shape in unet.shapes.items() if name.endswith("attn2.to_k.weight")), None)
    if width is not None and own is not None and width != own:
        raise UsageError(
            f"{lora.file.path} was made for {made_for(lora)}: its prompts are {width} wide. {bundle.path.name} is "
            f"{bundle.manifest.family}, whose prompts are {own} wide"
        )


def refuse_unmatched(lora: LoraFile, matched: Match, bundle: Bundle) -> None:
    """Raises: UsageError if the model has no module for some of the file's keys, and for which model they may be."""
    if not matched.unmatched:
        return
    total, first = len(lora.weight_keys), matched.unmatched[0]
    family = made_for(lora)
    looks = f" It looks as if it was made for {family}." if family else ""
    text = f"{lora.file.path}: {len(matched.unmatched)} of its {total} tensors fit no module of {bundle.path.name}"
    raise UsageError(
        f"{text}, {bundle.manifest.family}; the first is {first}.{looks} "
        + ("Load it with strict=False to use the others." if matched.factors else "It changes nothing here.")
    )
