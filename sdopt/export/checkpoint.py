"""A diffusers checkpoint on disk: its configurations, its models, its tokenizers. This module knows no families.

Only safetensors weights are read, because a pickle can run code when it is opened. `sdopt.export.source` opens
checkpoints. It checks that the class of every component is a known one before anything is loaded.
"""

from __future__ import annotations

import importlib
import inspect
import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import field
from pathlib import Path
from typing import Any, cast

import torch

from sdopt.dataclass import dataclass
from sdopt.errors import CheckpointError
from sdopt.export import accounting
from sdopt.export.file_weights import FileWeights, file_weights, without_numbers

ATTENTION = {"attn_implementation": "sdpa"}  # never one that the checkpoint names: it may be code of the hub
MODEL = ""  # the one component of a folder that holds a model, and no pipeline


@dataclass(frozen=True)
class Checkpoint:
    """A diffusers folder whose index has been checked.

    `classes`: the class of each component, with its library: "diffusers.AutoencoderKL".
    """

    folder: Path
    classes: Mapping[str, str]
    variant: str | None = None
    provenance: Mapping[str, Any] = field(default_factory=dict[str, Any])

    def index(self) -> dict[str, Any]:
        """The content of model_index.json."""
        return read_json(self.folder / "model_index.json")

    @property
    def pipeline(self) -> str:
        """The name of its pipeline class."""
        return str(self.index().get("_class_name"))

    def has(self, component: str) -> bool:
        """Whether the checkpoint has this component. SDXL's refiner, for example, has one of two text encoders."""
        return component in self.classes

    def config(self, component: str) -> dict[str, Any]:
        """The configuration of a component as its class reads it. Numbers that JSON does not have are texts.

        The class fills in the defaults of absent keys. A scheduler's class is the one that model_index.json names, and
        its absent keys stay absent.
        Raises: CheckpointError if it cannot be read.
        """
        folder = self.folder / component
        if component == "scheduler":
            config = read_json(folder / "scheduler_config.json")
            entry = self.index().get("scheduler")
            if isinstance(entry, list) and isinstance(entry[-1], str):
                config["_class_name"] = entry[-1]
            config["_class_name"] = str(config.get("_class_name")).removeprefix("Flax")
        else:
            config = read_json(folder / "config.json")
            if component in self.classes:
                config |= self._resolved(component, config)
        return {key: _json_number(value) for key, value in config.items()}

    def _resolved(self, component: str, config: Mapping[str, Any]) -> dict[str, Any]:
        """The values that the component's class takes from its configuration, or has as its defaults."""
        model: Any = self._class(component)
        if self.classes[component].startswith("transformers."):
            try:
                return model.config_class.from_pretrained(self.folder / component, local_files_only=True).to_dict()
            except Exception as error:  # transformers raises whatever its parts raise
                raise CheckpointError(f"{self.folder / component / 'config.json'}: cannot be read: {error}") from error
        parameters = inspect.signature(model.__init__).parameters
        absent = {name: p.default for name, p in parameters.items() if p.default is not p.empty and name not in config}
        return absent

    def skeleton(self, component: str) -> torch.nn.Module:
        """The component's model as its configuration says, without weights: its tensors have shapes alone.

        Raises: CheckpointError if its class cannot read the configuration.
        """
        with torch.device("meta"):
            return self._made(component)

    def _made(self, component: str) -> torch.nn.Module:
        """The model as its configuration says, with whatever numbers its class begins with."""
        silence_libraries()
        where = self.folder / component
        model: Any = self._class(component)
        try:
            if self.classes[component].startswith("transformers."):
                config = model.config_class.from_pretrained(where, local_files_only=True)
                return model._from_config(config, **ATTENTION, dtype=torch.float32).eval()
            return model.from_config(model.load_config(where, local_files_only=True)).eval()
        except Exception as error:  # a configuration can make the libraries raise anything
            raise CheckpointError(f"{where / 'config.json'}: {component} cannot be made of it: {error}") from error

    def shapes(self, component: str) -> dict[str, tuple[int, ...]]:
        """The shapes of its parameters by their names in published files, as its configuration says.

        Raises: CheckpointError if its class cannot read the configuration.
        """
        model = self.skeleton(component)
        # published CLIP encoders have a wrapper around all but their projection; transformers from 5.6 on drops it
        is_bare = self.classes[component].startswith("transformers.CLIP") and not hasattr(model, "text_model")
        prefix = "text_model." if is_bare else ""
        return {prefix + name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}

    def load(self, component: str) -> torch.nn.Module:
        """The component's model in float32, ready to be traced.

        Raises: CheckpointError if its weights cannot be read, are not finite, or are not those of the model.
        """
        silence_libraries()
        library = self.classes[component].partition(".")[0]
        where = self.folder / component
        options: dict[str, Any] = {"dtype" if library == "transformers" else "torch_dtype": torch.float32}
        if library == "transformers":
            options |= ATTENTION
        if self._is_quantized(component):
            raise CheckpointError(
                f"{where}: its weights are quantized (quantization_config in config.json); "
                "export the checkpoint that they were made from"
            )
        try:
            model, info = self._class(component).from_pretrained(
                where,
                variant=self._variant_of(component),
                use_safetensors=True,
                local_files_only=True,
                output_loading_info=True,
                **options,
            )
        except Exception as error:  # a configuration can make the libraries raise anything
            raise CheckpointError(f"{where}: cannot be loaded: {_without_advice(error)}") from error
        accounting.require_all(where, info)
        accounting.require_finite(where, model)
        return model.eval().requires_grad_(False)

    def opened(self, component: str) -> tuple[torch.nn.Module, FileWeights | None]:
        """The component's model without numbers, and its weights, which stay in their files.

        Where the files are not, name for name, those of the model, it is as `load` gives it, and None.
        Raises: CheckpointError as `load` does.
        """
        if not self._is_quantized(component):
            with without_numbers():
                model = self._made(component)
            weights = file_weights(model, self.weight_files(component))
            if weights is not None:
                weights.require_finite(self.folder / component)
                return model.requires_grad_(False), weights
        return self.load(component), None

    def _is_quantized(self, component: str) -> bool:
        return bool(self.config(component).get("quantization_config"))

    def require_weights(self, components: Iterable[str]) -> None:
        """Load each of these models, so that a fault in the last is not found after hours of tracing.

        Raises: CheckpointError as `load` does.
        """
        for component in components:
            if self.has(component):
                self.opened(component)

    def tokenizer(self, component: str) -> Any:
        """A transformers tokenizer, backed by the `tokenizers` library."""
        return self._class(component).from_pretrained(self.folder / component, local_files_only=True)

    def _class(self, component: str) -> Any:
        library, _, name = self.classes[component].partition(".")
        return getattr(importlib.import_module(library), name)

    def weight_files(self, component: str) -> list[Path]:
        """The safetensors files of a component: one, or the shards of its index. The variant's come first.

        A component that lacks the variant is read without it, as diffusers does.
        """
        return self._files(component, self.variant) or self._files(component, None)

    def _files(self, component: str, variant: str | None) -> list[Path]:
        infix = f".{variant}" if variant else ""
        pattern = re.compile(rf"(diffusion_pytorch_)?model{re.escape(infix)}(-\d+-of-\d+)?\.safetensors")
        return sorted(p for p in (self.folder / component).glob("*.safetensors") if pattern.fullmatch(p.name))

    def _variant_of(self, component: str) -> str | None:
        """The variant that a component is read as; None if it has none of this name."""
        return self.variant if self.has_variant(component) else None

    def has_variant(self, component: str) -> bool:
        """Whether a component has weights of the variant."""
        return bool(self._files(component, self.variant))

    @property
    def nbytes(self) -> int:
        """The bytes of all weights on disk."""
        return sum(path.stat().st_size for component in self.classes for path in self.weight_files(component))


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises: CheckpointError if the file is missing or is not a JSON object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: holds {type(content).__name__}, not a JSON object")
    return cast(dict[str, Any], content)


def silence_libraries() -> None:
    """Keep the libraries' progress bars off the terminal. sdopt reports progress through `report`."""
    import diffusers.utils.logging
    import transformers.utils.logging

    for library in (diffusers.utils.logging, transformers.utils.logging):
        library.disable_progress_bar()
        library.set_verbosity_error()


def _without_advice(error: Exception) -> str:
    """What a library says, without what it tells those who call it to type: the exporter has no such option."""
    text = str(error).strip()
    for advice in LIBRARIES_ADVICE:
        text = re.sub(advice, "", text, flags=re.DOTALL).strip()
    if "ignore_mismatched_sizes" in str(error):
        unlike = "its weights have other shapes than its config.json says; take both from the same checkpoint"
        return f"{text} {unlike}".strip()
    return text


# diffusers, `load_model_dict_into_meta` and `_load_state_dict_into_model`; transformers, `log_state_dict_report`
LIBRARIES_ADVICE = (
    r"\s*If you want to instead overwrite.*",
    r"\s*You may consider adding `ignore_mismatched_sizes.*",
    r"You set `ignore_mismatched_sizes` to `False`.*",
)


def _json_number(value: Any) -> Any:
    """The value itself, but a number that JSON does not have as text: "-inf" of DPM-Solver's -Infinity."""
    is_in_json = not isinstance(value, float) or math.isfinite(value)
    return value if is_in_json else str(value)
