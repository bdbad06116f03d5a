"""A diffusers checkpoint on disk: its configurations, its models, its tokenizers. Nothing here knows a family.

Only safetensors weights are read, because a pickle can run code when it is opened. `sdopt.export.source` opens
checkpoints, and compares the class of every component with those that are known before anything is loaded.
"""

from __future__ import annotations

import importlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch

from sdopt.errors import CheckpointError


@dataclass(frozen=True)
class Checkpoint:
    """A diffusers folder whose index has been checked.

    `classes`: the class of each component that it has, with its library: "diffusers.AutoencoderKL".
    """

    folder: Path
    classes: Mapping[str, str]
    variant: str | None = None
    provenance: Mapping[str, Any] = field(default_factory=dict[str, Any])

    def index(self) -> dict[str, Any]:
        """model_index.json, as it is."""
        return read_json(self.folder / "model_index.json")

    @property
    def pipeline(self) -> str:
        """The name of its pipeline class."""
        return str(self.index().get("_class_name"))

    def has(self, component: str) -> bool:
        """Whether it has this component; SDXL's refiner has one text encoder of two."""
        return component in self.classes

    def config(self, component: str) -> dict[str, Any]:
        """The configuration file of a component, as it is."""
        name = "scheduler_config.json" if component == "scheduler" else "config.json"
        config = read_json(self.folder / component / name)
        return {key: _json_number(value) for key, value in config.items()}

    def load(self, component: str) -> torch.nn.Module:
        """The component's model in float32, ready to be traced.

        Raises: CheckpointError if its weights cannot be read.
        """
        silence_libraries()
        library = self.classes[component].partition(".")[0]
        options = {"dtype" if library == "transformers" else "torch_dtype": torch.float32}
        try:
            model = self._class(component).from_pretrained(
                self.folder / component, variant=self.variant, use_safetensors=True, local_files_only=True, **options
            )
        except (OSError, ValueError, RuntimeError, KeyError) as error:
            raise CheckpointError(f"{self.folder / component}: cannot be loaded: {error}") from error
        return model.eval().requires_grad_(False)

    def tokenizer(self, component: str) -> Any:
        """A transformers tokenizer, backed by the `tokenizers` library."""
        return self._class(component).from_pretrained(self.folder / component, local_files_only=True)

    def _class(self, component: str) -> Any:
        library, _, name = self.classes[component].partition(".")
        return getattr(importlib.import_module(library), name)

    def weight_files(self, component: str) -> list[Path]:
        """The safetensors files of a component: one, or the shards of its index."""
        infix = f".{self.variant}" if self.variant else ""
        pattern = re.compile(rf"(diffusion_pytorch_)?model{re.escape(infix)}(-\d+-of-\d+)?\.safetensors")
        return sorted(p for p in (self.folder / component).glob("*.safetensors") if pattern.fullmatch(p.name))

    @property
    def nbytes(self) -> int:
        """Bytes of all weights, as they are on disk."""
        return sum(path.stat().st_size for component in self.classes for path in self.weight_files(component))


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises: CheckpointError if the file is missing or something else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: holds {type(content).__name__}, not a JSON object")
    return cast(dict[str, Any], content)


def silence_libraries() -> None:
    """Keep the libraries' progress bars off the terminal; ours are the lines that `report` is given."""
    import diffusers.utils.logging
    import transformers.utils.logging

    for library in (diffusers.utils.logging, transformers.utils.logging):
        library.disable_progress_bar()
        library.set_verbosity_error()


def _json_number(value: Any) -> Any:
    """A number that JSON does not have, as text: diffusers writes -Infinity into the configurations of DPM-Solver."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
