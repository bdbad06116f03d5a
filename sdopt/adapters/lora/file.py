"""One LoRA file: its tensors by module of the model at hand, what made it, and what it was made for.

style = read_lora("style.safetensors")              # any model
matched = match(style, spellings(modules))          # this model: the factors of each module
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np

from sdopt.adapters.lora.algorithms import Factors, FactorsError, algorithm, split
from sdopt.adapters.lora.names import Module
from sdopt.bundle.disk import parse_json, read_given
from sdopt.bundle.files import embedded
from sdopt.bundle.specs import Float32
from sdopt.bundle.tensors import TensorFile, read_tensor_file
from sdopt.dataclass import dataclass
from sdopt.errors import UsageError

MAX_BYTES = 4 << 30
MAX_CONFIG_BYTES = 16 << 20
NAMED = ("neon",)  # for the embedded model
EMBEDDINGS = "bundle_emb."  # a textual inversion inside the file

# The end of a key -> the tensor's role. Longer ends are tried first.
ENDS = {
    ".lora_down.weight": "down", ".lora_up.weight": "up", ".lora_mid.weight": "mid",
    ".lora_A.weight": "down", ".lora_B.weight": "up", ".lora_B.bias": "bias",
    ".lora_A.default.weight": "down", ".lora_B.default.weight": "up", ".lora_B.default.bias": "bias",
    ".lora.down.weight": "down", ".lora.up.weight": "up",
    ".lora_linear_layer.down.weight": "down", ".lora_linear_layer.up.weight": "up",
    ".down.weight": "down", ".up.weight": "up",
    ".alpha": "alpha", ".lora.alpha": "alpha", ".lora_linear_layer.alpha": "alpha",
    ".dora_scale": "dora_scale",
    ".lora_magnitude_vector": "magnitude", ".lora_magnitude_vector.weight": "magnitude",
    ".lora_magnitude_vector.default.weight": "magnitude",
    **{f".{role}": role for role in (
        "hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2",
        "lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2",
        "oft_blocks", "rescale", "on_input", "diff")},
    ".a1.weight": "a1", ".a2.weight": "a2", ".b1.weight": "b1", ".b2.weight": "b2", ".bm.weight": "bm",
    ".diff_b": "bias", ".w_norm": "diff", ".b_norm": "bias",
    ".weight": "ia3",
}  # fmt: skip
_BY_LENGTH = sorted(ENDS, key=len, reverse=True)


@dataclass(frozen=True)
class PeftConfig:
    """What PEFT's configuration says of scales. `alphas`: path of a module, or its end -> its own alpha."""

    alpha: float | None
    alphas: Mapping[str, float]
    rank_stabilized: bool

    def alpha_of(self, path: str) -> float | None:
        """The alpha of the module at `path`."""
        return next((a for end, a in self.alphas.items() if path == end or path.endswith(f".{end}")), self.alpha)


@dataclass(frozen=True)
class LoraFile:
    """A file in memory, not yet matched to a model. `configs`: PEFT's, by component; "" for all."""

    file: TensorFile
    configs: Mapping[str, PeftConfig]

    @property
    def name(self) -> str:
        return self.file.path.stem

    @property
    def digest(self) -> str:
        """The SHA-256 of the file."""
        return self.file.sha256

    @property
    def a1111_hash(self) -> str:
        """The twelve digits that AUTOMATIC1111 writes into pictures: of all behind the header."""
        return (self.file.metadata.get("sshs_model_hash") or self.file.data_sha256)[:12]

    @property
    def embeddings(self) -> dict[str, dict[str, Float32]]:
        """The textual inversions inside the file, as `bundle_emb.<token>.<name>`: token -> arrays by name.

        The names are those of a file of its own: "emb_params", or "clip_l" and "clip_g".
        """
        words: dict[str, dict[str, Float32]] = {}
        for key, stored in self.file.tensors.items():
            if key.startswith(EMBEDDINGS):
                token, _, name = key.removeprefix(EMBEDDINGS).partition(".")
                name = "emb_params" if name.startswith("string_to_param") else name
                words.setdefault(token, {})[name] = stored.float32()
        return words

    @property
    def weight_keys(self) -> list[str]:
        """The names of its tensors that are of modules."""
        return [key for key in self.file.tensors if not key.startswith(EMBEDDINGS)]


@dataclass(frozen=True)
class Match:
    """What a file holds for one model: the factors of each module, and the keys that fit no module."""

    factors: Mapping[Module, Factors]
    unmatched: tuple[str, ...]

    @property
    def algorithms(self) -> dict[str, int]:
        """Algorithm -> its number of modules."""
        counts: dict[str, int] = {}
        for factors in self.factors.values():
            name = algorithm_name(factors)
            counts[name] = counts.get(name, 0) + 1
        return counts


def algorithm_name(factors: Factors) -> str:
    """The name of the algorithm, e.g. "LoRA with DoRA"."""
    return algorithm(factors).name + (" with DoRA" if {"dora_scale", "magnitude"} & set(factors.tensors) else "")


def located(source: str | os.PathLike[str]) -> Path:
    """The file that is meant: that at a path, or `neon`, which comes with sdopt, unless a file here has that name."""
    path = Path(source)
    return embedded().parent / f"{path}.safetensors" if str(path) in NAMED and not path.exists() else path


def read_lora(path: str | os.PathLike[str]) -> LoraFile:
    """The file at `path`, or of that name; see `located`.

    Raises: UsageError for a file that is missing, damaged, a pickle, or whose tensors have NaN, infinity, no numbers,
    or a type that NumPy does not have (fp8).
    """
    file = read_tensor_file(located(path), MAX_BYTES, "a LoRA")
    if not file.tensors:
        raise UsageError(f"{file.path} has no tensors")
    try:
        for name, stored in file.tensors.items():
            if stored.dtype not in ("F32", "F16", "BF16", "F64") and not name.endswith((".alpha", ".on_input")):
                raise ValueError(f"{name} is {stored.dtype}; read are F16, BF16, F32 and F64")
            array = stored.float32()
            if not array.size:
                raise ValueError(f"{name} has no numbers: its shape is {list(stored.shape)}")
            if not np.isfinite(array).all():
                raise ValueError(f"{name} has NaN or infinity")
        return LoraFile(file, _peft_configs(file))
    except ValueError as error:
        raise UsageError(f"{file.path}: {error}; the file is damaged, or it is no LoRA") from error


def match(lora: LoraFile, table: Mapping[str, Module]) -> Match:
    """The factors of each module of a model; `table` is that of `sdopt.adapters.lora.names.spellings`.

    Raises: UsageError that names the first module whose tensors are of no algorithm, e.g. because a half is missing,
    or two keys that stand for one tensor.
    """
    tensors: dict[Module, dict[str, Float32]] = {}
    keys: dict[tuple[Module, str], str] = {}
    unmatched: list[str] = []
    for key in lora.weight_keys:
        place = _place(key, table)
        if place is None:
            unmatched.append(key)
            continue
        first = keys.setdefault(place, key)
        if first != key:
            raise UsageError(f"{lora.file.path}: {first} and {key} are both the {place[1]} of {place[0]}")
        module, role = place
        tensors.setdefault(module, {})[role] = lora.file.tensors[key].float32()
    factors = {module: _factors(lora, module, roles) for module, roles in tensors.items()}
    for module, own in factors.items():
        try:
            algorithm(own)
        except FactorsError as error:
            stem = next(key for (other, _), key in keys.items() if other == module)
            raise UsageError(f"{lora.file.path}: the tensors of {module} ({stem}, ...): {error}") from error
    return Match(_apart(lora, factors), tuple(unmatched))


def _apart(lora: LoraFile, factors: Mapping[Module, Factors]) -> dict[Module, Factors]:
    """The factors of every module of the model, where the file has several of them as one.

    Raises: UsageError for an algorithm whose factors cannot be split along the outputs, or another number of them.
    """
    single: dict[Module, Factors] = {}
    for module, own in factors.items():
        if not module.parts:
            single[module] = own
            continue
        try:
            parts = split(own, [count for _, count in module.parts])
        except FactorsError as error:
            raise UsageError(f"{lora.file.path}: {module}, which is several modules here: {error}") from error
        for (path, _), part in zip(module.parts, parts, strict=True):
            single[Module(module.component, path)] = part
    return single


def _place(key: str, table: Mapping[str, Module]) -> tuple[Module, str] | None:
    """The module and the role that a key names."""
    for end in _BY_LENGTH:
        if key.endswith(end):
            module = table.get(key[: -len(end)])
            if module is not None:
                return module, ENDS[end]
    return None


def stems(lora: LoraFile) -> dict[str, dict[str, str]]:
    """The file's own names of modules, by the longest end that is known: stem -> role -> key."""
    found: dict[str, dict[str, str]] = {}
    for key in lora.weight_keys:
        end = next((end for end in _BY_LENGTH if key.endswith(end)), "")
        if end and not (end == ".weight" and f"{key[: -len(end)]}.on_input" not in lora.file.tensors):
            found.setdefault(key[: -len(end)], {})[ENDS[end]] = key
    return found


def factors_of(lora: LoraFile, stem: str, keys: Mapping[str, str]) -> Factors:
    """The factors of a module that has only the file's own name."""
    component, _, path = stem.partition(".")
    module = Module(component, path) if component in lora.configs else Module("", stem)
    return _factors(lora, module, {role: lora.file.tensors[key].float32() for role, key in keys.items()})


def _factors(lora: LoraFile, module: Module, roles: Mapping[str, Float32]) -> Factors:
    """The tensors of a module. Its alpha is the file's own; else that of PEFT's configuration in the metadata."""
    alpha = roles.get("alpha")
    tensors = {role: array for role, array in roles.items() if role != "alpha"}
    if alpha is not None:
        if alpha.size != 1:
            raise UsageError(f"{lora.file.path}: the alpha of {module} is {alpha.size} numbers; it is one")
        return Factors(tensors, float(alpha.reshape(-1)[0]))
    config = lora.configs.get(module.component) or lora.configs.get("")
    if config is None:
        return Factors(tensors)
    return Factors(tensors, config.alpha_of(module.path), config.rank_stabilized)


def _peft_configs(file: TensorFile) -> dict[str, PeftConfig]:
    """PEFT's configuration by component, from the file's metadata, or from adapter_config.json beside the file.

    Raises: ValueError for a configuration that is no JSON, or whose numbers are none.
    """
    text = file.metadata.get("lora_adapter_metadata")
    if text:
        by_component: dict[str, dict[str, Any]] = {}
        for key, value in _object(text, "lora_adapter_metadata").items():
            component, _, name = key.partition(".")
            by_component.setdefault(component, {})[name] = value
        return {component: _peft_config(values) for component, values in by_component.items()}
    beside = file.path.with_name("adapter_config.json")
    if file.path.name == "adapter_model.safetensors" and beside.is_file():
        return {"": _peft_config(_object(read_given(beside, MAX_CONFIG_BYTES).decode(), beside.name))}
    return {}


def _peft_config(values: Mapping[str, Any]) -> PeftConfig:
    pattern = _object(values.get("alpha_pattern") or {}, "alpha_pattern")
    alphas = {_ending(key): _number(value, "alpha_pattern") for key, value in pattern.items()}
    alpha = values.get("lora_alpha")
    return PeftConfig(None if alpha is None else _number(alpha, "lora_alpha"), alphas, values.get("use_rslora") is True)


def _ending(pattern: str) -> str:
    """A key of `alpha_pattern`.

    Raises: ValueError for a regular expression. PEFT allows them, and trainers write plain names.
    """
    plain = pattern.removeprefix("^").removesuffix("$")
    if not re.fullmatch(r"[\w.]+", plain):
        raise ValueError(f"alpha_pattern has {pattern[:60]!r}; read are names of modules, and no regular expressions")
    return plain


def _object(value: Any, where: str) -> dict[str, Any]:
    """JSON's object, given as text or as it is. Raises: ValueError for anything else."""
    value = parse_json(value) if isinstance(value, str) else value
    if not isinstance(value, dict):
        raise ValueError(f"{where} is no JSON object")
    return cast("dict[str, Any]", value)


def _number(value: object, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"{where} has {str(value)[:60]}; allowed is a number")
    return float(value)


# ------------------------------------------------------------------------------------------- what it was made for

WIDTHS = {768: "Stable Diffusion 1.x", 1024: "Stable Diffusion 2.x", 2048: "SDXL", 1280: "SDXL's refiner"}
_CROSS = re.compile(r"attn2[._](?:processor[._])?to_[kv]")
_OTHERS = (
    (re.compile(r"double_blocks|single_blocks|single_transformer_blocks"), "Flux"),
    (re.compile(r"joint_blocks|context_embedder"), "Stable Diffusion 3"),
    (re.compile(r"control_model|lora_controlnet|input_hint_block"), "ControlNet"),
    (re.compile(r"motion_modules"), "AnimateDiff"),
    (re.compile(r"to_k_ip|ip_adapter"), "IP-Adapter"),
)


def cross_attention_width(lora: LoraFile) -> int | None:
    """How wide the prompts are that its cross-attentions read; None where it changes none by a LoRA's down half."""
    for key in lora.weight_keys:
        if _CROSS.search(key) and key.endswith(("down.weight", "lora_A.weight", "lora_A.default.weight")):
            shape = lora.file.tensors[key].shape
            if len(shape) >= 2:
                return shape[1]
    return None


def made_for(lora: LoraFile) -> str:
    """The family that a file was made for, by its shapes, keys or metadata; empty where nothing tells."""
    for pattern, family in _OTHERS:
        if any(pattern.search(key) for key in lora.weight_keys):
            return family
    width = cross_attention_width(lora)
    if width is not None:
        return WIDTHS.get(width, f"a model with cross-attention width {width}")
    return lora.file.metadata.get("ss_base_model_version", "")


def ranks(factors: Iterable[Factors]) -> list[int]:
    """The different ranks of a file, in order."""
    found = {rank for t in factors if (rank := algorithm(t).rank(t)) is not None}
    return sorted(found)
