"""The options of a build, and the options of one engine: the model's own needs override those of the user."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from sdopt import __version__
from sdopt.build.recipe import EngineSpec
from sdopt.build.refit import LORA
from sdopt.bundle.files import Bundle
from sdopt.bundle.format import DENOISERS
from sdopt.bundle.precision import precision_word
from sdopt.bundle.weights import Overlay, takes_overlay
from sdopt.dataclass import dataclass
from sdopt.errors import UsageError, choices

PRECISIONS = {"fp16": "float16", "bf16": "bfloat16", "fp32": ""}  # what `half` calls them
QUANTIZED = ("int8", "fp8")  # some layers multiply 8 bits; the rest is fp16 on a GPU, and the library's on a CPU
INT8_WEIGHTS = "int8-weights"  # linear layers have weights of 8 bits, and multiply what is wider
IN_8_BITS = (*DENOISERS, "vae_decoder")  # the components whose layers do
FLOOR = 25.0  # dB of a component's output beside float32
AUTO = "auto"  # fp16 on a GPU; fp32 on a CPU, where it is the fastest


@dataclass(frozen=True)
class BuildOptions:
    """The options of a build, by name; all of them are in an engine's key.

    Raises: UsageError for a value that is not allowed.
    """

    precision: str = AUTO
    opt_level: int = 3
    workspace: int | None = None  # bytes; None: what is free
    refit: bool | str = False  # True: all weights can be changed later; LORA: those that a LoRA may touch
    version_compatible: bool = False
    hardware_compatible: bool = False
    weight_streaming: bool = False
    floor: float | None = None  # int8, fp8: the dB that a component's output must reach; None: `FLOOR`
    prompts: tuple[str, ...] = ()  # int8, fp8: what the run denoises that finds the scales; none: `calibrate.SUBJECTS`

    def __post_init__(self) -> None:
        object.__setattr__(self, "precision", precision_word(self.precision))
        allowed = [AUTO, *PRECISIONS, *QUANTIZED, INT8_WEIGHTS]
        if self.precision not in allowed:
            raise UsageError(f"precision {self.precision!r}; allowed are {choices(self.precision, allowed)}")
        if self.precision not in QUANTIZED and (self.floor is not None or self.prompts):
            raise UsageError("floor and prompts are for int8 and fp8; give --precision int8, or leave them out")
        if self.precision in (*QUANTIZED, INT8_WEIGHTS) and self.refit:
            text = f"refit and {self.precision}: weights that are rounded cannot be changed"
            raise UsageError(f"{text}; leave one of the two out")
        if self.floor is not None and not 0 <= self.floor <= 60:
            raise UsageError(f"floor = {self.floor:g} dB; allowed are 0 to 60", "floor")
        if self.refit not in (False, True, LORA):
            raise UsageError(f"refit = {self.refit!r}; allowed are True, False and {LORA!r}")
        if not 0 <= self.opt_level <= 5:
            raise UsageError(f"opt_level = {self.opt_level}; allowed are 0 to 5")
        if self.workspace is not None and self.workspace < 1 << 20:
            raise UsageError(f"workspace = {self.workspace} bytes; allowed is a MiB or more")

    def resolved(self, default: str) -> BuildOptions:
        """These options, with `default` in place of an automatic precision."""
        return replace(self, precision=default) if self.precision == AUTO else self


def part_options(
    options: BuildOptions,
    part: EngineSpec,
    bundle: Bundle,
    bf16: bool = False,
    overlay: Overlay | None = None,
    rest: str = "fp16",
) -> dict[str, Any]:
    """The options of one engine. `bf16`: whether the GPU that will run it is known to compute in bf16.

    `rest`: the precision of what is not quantized in a build of 8 bits; `compute` is it where weights alone are int8.
    With an overlay that changes it, its key and what it is made of are among them.
    """
    given = asdict(options)
    for name in ("floor", "prompts"):
        del given[name]
    precision = part.precision or options.resolved("fp16").precision
    if precision in QUANTIZED and part.model not in IN_8_BITS:
        precision = rest
    other = rest if precision in (*QUANTIZED, INT8_WEIGHTS) else precision  # of what is not quantized
    if other == "fp16" and part.model in bundle.manifest.float16_unsafe:
        other = "bf16" if bf16 else "fp32"
        precision = precision if precision == INT8_WEIGHTS else other
    attention = part.attention or (other == "fp16" and _attention_overflows(part, bundle))
    if precision in QUANTIZED:
        floor = FLOOR if options.floor is None else options.floor
        given |= {"floor": floor, "prompts": [*options.prompts]}
    if precision == INT8_WEIGHTS:
        given["compute"] = other
    own = {"fuse": part.fuse, "attention": attention, "islands": list(part.islands), "sdopt": __version__}
    refit = options.refit if options.refit != LORA or takes_overlay(part.model) else False
    return {**given, "precision": precision, "refit": refit, **own, **_weights(part, overlay)}


def _weights(part: EngineSpec, overlay: Overlay | None) -> dict[str, Any]:
    """What an engine's options say of the weights that are built into it; nothing for the bundle's own."""
    key = overlay.key(part.name) if overlay is not None else ""
    return {"weights": key, "loras": [*overlay.described]} if overlay is not None and key else {}


def refuse_overlay(overlay: Overlay, names: Sequence[str], options: BuildOptions, for_ort: bool) -> None:
    """Raises: UsageError where LoRAs cannot be built into the engines of these names, or change none of them."""
    if for_ort:
        raise UsageError("--lora: ONNX Runtime takes LoRA files when it loads a graph; leave it out")
    if options.refit:
        raise UsageError("--lora and --refit: LoRAs that are built in do not come out again; leave one of the two out")
    if not any(map(overlay.key, names)):
        raise UsageError(f"--lora: these LoRAs, with these weights, change none of {', '.join(names)}")


def exceptions(options: Mapping[str, Any], asked: str, part: EngineSpec, bundle: Bundle) -> list[str]:
    """Sentences about the options of one engine that differ from those of the user."""
    sentences: list[str] = []
    is_quantized = asked in QUANTIZED and part.model in IN_8_BITS
    if options["precision"] != asked and not part.precision and (asked not in QUANTIZED or is_quantized):
        which = "which leaves fp16 around it, in which" if is_quantized else "in which"
        sentences.append(f"{options['precision']} instead of {asked}, {which} this model's {part.model} overflows")
    if options["attention"] and not part.attention:
        sentences.append("attention is computed in fp32: in fp16 this model's overflows")
    return sentences


def _attention_overflows(part: EngineSpec, bundle: Bundle) -> bool:
    return part.model in bundle.manifest.float16_attention_unsafe
