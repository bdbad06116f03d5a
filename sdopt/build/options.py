"""The options of a build, and the options of one engine: the model's own needs override those of the user."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from sdopt import __version__
from sdopt.build.recipe import EngineSpec
from sdopt.bundle.files import Bundle
from sdopt.bundle.precision import precision_word
from sdopt.errors import UsageError, choices

PRECISIONS = {"fp16": "float16", "bf16": "bfloat16", "fp32": ""}  # what `half` calls them
AUTO = "auto"  # fp16 on a GPU; fp32 on a CPU, where it is the fastest


@dataclass(frozen=True)
class BuildOptions:
    """The options of a build, by name; all of them are in an engine's key.

    Raises: UsageError for a value that is not allowed.
    """

    precision: str = AUTO
    opt_level: int = 3
    workspace: int | None = None  # bytes; None: what is free
    refit: bool = False
    version_compatible: bool = False
    hardware_compatible: bool = False
    weight_streaming: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "precision", precision_word(self.precision))
        if self.precision not in (AUTO, *PRECISIONS):
            raise UsageError(
                f"precision {self.precision!r}; allowed are {choices(self.precision, [AUTO, *PRECISIONS])}"
            )
        if not 0 <= self.opt_level <= 5:
            raise UsageError(f"opt_level = {self.opt_level}; allowed are 0 to 5")
        if self.workspace is not None and self.workspace < 1 << 20:
            raise UsageError(f"workspace = {self.workspace} bytes; allowed is a MiB or more")

    def resolved(self, default: str) -> BuildOptions:
        """These options, with `default` in place of an automatic precision."""
        return replace(self, precision=default) if self.precision == AUTO else self


def part_options(options: BuildOptions, part: EngineSpec, bundle: Bundle, bf16: bool = False) -> dict[str, Any]:
    """The options of one engine. `bf16`: whether the GPU that will run it is known to compute in bf16."""
    precision = part.precision or options.resolved("fp16").precision
    if precision == "fp16" and part.graph in bundle.manifest.float16_unsafe:
        precision = "bf16" if bf16 else "fp32"
    attention = part.attention or (precision == "fp16" and _attention_overflows(part, bundle))
    own = {"fuse": part.fuse, "attention": attention, "islands": list(part.islands), "sdopt": __version__}
    return {**asdict(options), "precision": precision, **own}


def exceptions(options: Mapping[str, Any], asked: str, part: EngineSpec, bundle: Bundle) -> list[str]:
    """Sentences about the options of one engine that differ from those of the user."""
    sentences: list[str] = []
    if options["precision"] != asked and not part.precision:
        sentences.append(f"{options['precision']} instead of {asked}, in which this model's {part.graph} overflows")
    if options["attention"] and not part.attention:
        sentences.append("attention is computed in fp32: in fp16 this model's overflows")
    return sentences


def _attention_overflows(part: EngineSpec, bundle: Bundle) -> bool:
    return part.graph in bundle.manifest.float16_attention_unsafe
