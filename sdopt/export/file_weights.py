"""Weights that stay in their files: a model without numbers, each module of which reads its own while it runs.

A model of 5 billion parameters takes 19 GB in float32. Here its parameters have a shape and no memory. What is traced
needs no more. What is run in float32, for the parity gate, has one module's numbers in memory at a time.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, cast
from unittest import mock

import torch

from sdopt.export import accounting
from sdopt.export.single_file.file import SingleFile

FLOATS = ("F16", "BF16", "F32")


@contextmanager
def without_numbers() -> Generator[None]:
    """A context in which models are made whose parameters have no memory. Buffers have their numbers."""
    register = torch.nn.Module.register_parameter

    def registered(module: torch.nn.Module, name: str, parameter: torch.nn.Parameter | None) -> None:
        if parameter is not None and not parameter.is_meta:
            parameter = torch.nn.Parameter(parameter.detach().to("meta"), requires_grad=False)
        register(module, name, parameter)

    with mock.patch.object(torch.nn.Module, "register_parameter", registered):
        yield


class FileWeights:
    """The parameters of a model by name, as float32, each read from its file when it is asked for.

    `files`: parameter -> the file and the name that it has there.
    """

    def __init__(self, model: torch.nn.Module, files: Mapping[str, tuple[Path, str]]) -> None:
        self._files = files
        self._owners: list[tuple[torch.nn.Module, dict[str, str]]] = []
        hollow: dict[int, torch.nn.Parameter] = {}  # T5 has its embeddings twice
        modules = cast("Iterable[tuple[str, torch.nn.Module]]", model.named_modules())
        for path, module in modules:
            own = [name for name, _ in module.named_parameters(recurse=False)]
            for name in own:
                parameter = module.get_parameter(name)
                module.register_parameter(name, hollow.setdefault(id(parameter), _hollow(parameter)))
            if own:
                self._owners.append((module, {name: f"{path}.{name}".lstrip(".") for name in own}))

    def __getitem__(self, name: str) -> torch.Tensor:
        """A parameter."""
        return self.stored(name).float()

    def stored(self, name: str) -> torch.Tensor:
        """The same in the type of its file, which is opened anew, so that none of it stays in memory."""
        path, there = self._files[name]
        return SingleFile.open(path).tensor(there)

    def require_finite(self, where: Path) -> None:
        """Raises: CheckpointError that names the weights with NaN or infinite values."""
        accounting.refuse_bad(where, [name for name in self._files if not torch.isfinite(self[name]).all()])

    @contextmanager
    def present(self) -> Generator[None]:
        """A context in which the model can be run: a module's own parameters are there while it runs."""
        handles: list[Any] = []
        try:
            for module, names in self._owners:
                handles.append(module.register_forward_pre_hook(partial(self._fill, names)))
                handles.append(module.register_forward_hook(_empty, always_call=True))
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _fill(self, names: Mapping[str, str], module: torch.nn.Module, inputs: Any) -> None:
        for name, full in names.items():
            module.get_parameter(name).data = self[full]


def _hollow(parameter: torch.nn.Parameter) -> torch.nn.Parameter:
    """A parameter of the same shape that takes the memory of one number."""
    return torch.nn.Parameter(torch.zeros(()).expand(parameter.shape), requires_grad=False)


def _empty(module: torch.nn.Module, inputs: Any, outputs: Any) -> None:
    for parameter in module.parameters(recurse=False):
        parameter.data = torch.zeros(()).expand(parameter.shape)


def file_weights(model: torch.nn.Module, paths: Sequence[Path]) -> FileWeights | None:
    """The weights of a model made in `without_numbers`; None if the files are not, name for name, those of the model.

    Buffers that files have are read at once.
    """
    found = {name: file for file in map(SingleFile.open, paths) for name in file.shapes}
    state: dict[str, torch.Tensor] = dict(model.state_dict(keep_vars=True))
    parameters = dict(model.named_parameters(remove_duplicate=False))
    files: dict[str, tuple[Path, str]] = {}
    for name, tensor in state.items():
        names = [name, *(other for other in parameters if parameters[other] is tensor)]
        there = next((one for one in names if one in found), None)
        if there is None or found[there].shapes[there] != tuple(tensor.shape):
            return None
        if found[there].dtypes[there] not in FLOATS:
            return None
        if name in parameters:
            files[name] = found[there].path, there
        else:
            cast(Any, tensor).copy_(found[there].tensor(there))
    return FileWeights(model, files) if found.keys() <= state.keys() else None
