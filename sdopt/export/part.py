"""A part: one component of a checkpoint, loaded and ready to be traced.

Its module wraps the checkpoint's own model. The arguments and results of `forward` are the tensors of the part's spec.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import field, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from sdopt.bundle.specs import Array, TensorSpec
from sdopt.dataclass import dataclass
from sdopt.export.file_weights import FileWeights

Sizes = Mapping[str, int]  # the length of each named dimension
Write = Callable[[Path, Path], object]  # the written graph of a part, the graph to be made of it


@dataclass(frozen=True)
class Variant:
    """A second graph of a part, which `write` makes of the written one, on the same file of weights.

    `part` is what it must compute. Its module has the same model inside, and its graph is not traced.
    """

    part: Part
    write: Write


@dataclass(frozen=True)
class Part:
    """One component, loaded and ready to be traced or run.

    `sizes`: the first are those of the trace, the others those of the parity checks.
    `limits`: exclusive upper bounds of integer inputs.
    `shared`: inputs that are the same for both halves of guidance. Their batch, "images", may be smaller than the
    "batch" of the other inputs, which is a multiple of it.
    `prefix`: the checkpoint's names of parameters are this prefix and the model's names.
    `variants`: further graphs that are made of its graph.
    `weights`: the numbers of its parameters, if the module has none.
    `unused`: the parameters that the component does not read: the beginning of their names -> the reason.
    """

    name: str
    module: torch.nn.Module
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    sizes: tuple[Sizes, ...]
    limits: Mapping[str, int] = field(default_factory=dict[str, int])
    shared: tuple[str, ...] = ()
    prefix: str = ""
    unused: Mapping[str, str] = field(default_factory=dict[str, str])
    variants: tuple[Variant, ...] = ()
    weights: FileWeights | None = None

    def example(self, sizes: Sizes, seed: int = 0) -> dict[str, Array]:
        """Seeded inputs of the given sizes: ids and timesteps in their range, everything else standard normal."""
        rng = np.random.default_rng(seed)
        arrays: dict[str, Array] = {}
        for spec in self.inputs:
            shape = tuple(sizes[d] if isinstance(d, str) else d for d in spec.shape)
            if spec.name == "timestep":
                arrays[spec.name] = rng.uniform(0, 999, shape).astype(np.float32)
            elif spec.dtype == "int32":
                highest = self.limits[spec.name] - 1
                ids = rng.integers(0, highest + 1, shape, np.int32)
                ids.flat[-1] = highest  # every example contains the highest id
                arrays[spec.name] = ids
            else:
                arrays[spec.name] = rng.standard_normal(shape, np.float32)
        return arrays

    def run(self, arrays: Mapping[str, Array]) -> dict[str, Array]:
        """The outputs that PyTorch computes in float32, which are the reference of the parity gate."""
        with torch.inference_mode(), self.weights.present() if self.weights else nullcontext():
            tensors = {spec.name: torch.from_numpy(arrays[spec.name]) for spec in self.inputs}
            batch = max(len(tensor) for tensor in tensors.values())
            for name in self.shared:
                tensor = tensors[name]
                tensors[name] = tensor.repeat(batch // len(tensor), *[1] * (tensor.ndim - 1))
            result = self.module(**tensors)
        outputs = cast(tuple[Any, ...], result if isinstance(result, tuple) else (result,))
        return {spec.name: tensor.numpy() for spec, tensor in zip(self.outputs, outputs, strict=True)}

    def released(self) -> Part:
        """The part without its model. The weights are emptied, because torch's ONNX exporter (2.13) keeps the model."""
        for weight in self.module.parameters():
            weight.data = torch.empty(0)
        variants = tuple(replace(v, part=replace(v.part, module=torch.nn.Identity())) for v in self.variants)
        return replace(self, module=torch.nn.Identity(), variants=variants, weights=None)
