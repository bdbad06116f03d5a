"""The refitter of the fake TensorRT: it changes weights inside a plan's graph, and makes a new session of it.

| what                                                                   | how it is refused              |
|------------------------------------------------------------------------|--------------------------------|
| a name that was not marked, or any in a plan that was built without    | set_named_weights gives False  |
| numbers of another type or another count than the plan was built with  | set_named_weights gives False  |
| a weight without the others that the builder joined it with            | refit_cuda_engine gives False  |
| an array that is gone when the engine is refitted: nothing copies it   | refit_cuda_engine gives False  |

The builder joins the weights that one node reads, as a product and its bias.
Ref: NVIDIA TensorRT, C++ API, IRefitter.
"""

from __future__ import annotations

import ctypes
import weakref
from types import ModuleType
from typing import Any

import numpy as np

from sdopt.bundle.specs import Array
from tests.fakes.trt import DataType, FakeEngine, Library

STORED = {DataType.FLOAT: np.float32, DataType.HALF: np.float16, DataType.BF16: np.uint16}
TYPE_OF = {np.dtype(np.float32): DataType.FLOAT, np.dtype(np.float16): DataType.HALF}


def add_to(trt: ModuleType, library: Library) -> None:
    """Give a fake library its refitter."""
    trt.__dict__.update(Weights=FakeWeights, Refitter=lambda engine, log: FakeRefitter(library, engine, log))


class FakeWeights:
    """Weights: where numbers are. It holds none of them."""

    def __init__(self, first: Any, ptr: int | None = None, count: int = 0) -> None:
        if ptr is None:
            assert first.flags.c_contiguous
            self.dtype, self.ptr, self.size = TYPE_OF[first.dtype], first.ctypes.data, first.size
            self._owner: Any = weakref.ref(first)
        else:
            self.dtype, self.ptr, self.size, self._owner = first, ptr, count, lambda: self

    def read(self) -> Array | None:
        """The numbers in float32; None if the array is gone."""
        if self._owner() is None:
            return None
        kind = np.dtype(STORED[self.dtype])
        stored = np.frombuffer((ctypes.c_char * (self.size * kind.itemsize)).from_address(self.ptr), kind)
        wide = (stored.astype(np.uint32) << 16).view(np.float32) if self.dtype == DataType.BF16 else stored
        return wide.astype(np.float32)


class FakeRefitter:
    """IRefitter."""

    def __init__(self, library: Library, engine: FakeEngine, log: Any) -> None:
        import onnx

        self._library, self._engine, self._log, self._given = library, engine, log, dict[str, FakeWeights]()
        self._table: dict[str, int] = engine.entry.get("refittable", {})
        self._model: Any = onnx.load_from_string(engine.graph) if self._table else onnx.ModelProto()
        self._tensors = {tensor.name: tensor for tensor in self._model.graph.initializer}

    def get_all_weights(self) -> list[str]:
        return list(self._table)

    def set_named_weights(self, name: str, weights: FakeWeights) -> bool:
        if name not in self._table:
            return self._refuse(f"Given weights name {name} does not correspond to any refittable weights")
        count = int(np.prod(self._tensors[name].dims))
        if (weights.dtype, weights.size) != (self._table[name], count):
            return self._refuse(f"{name}: {weights.size} of {weights.dtype!r}, built with {count}")
        self._given[name] = weights
        return True

    def get_missing_weights(self) -> list[str]:
        missing = dict[str, None]()
        for node in self._model.graph.node:
            if any(name in self._given for name in node.input):
                missing |= {name: None for name in node.input if name in self._table and name not in self._given}
        return list(missing)

    def refit_cuda_engine(self) -> bool:
        if self.get_missing_weights():
            return self._refuse(f"missing weights: {self.get_missing_weights()}")
        if not self._library.simulator.hold("refits", 1):
            return self._refuse("Cuda error: 2 (OutOfMemory)")
        self._library.simulator.let_go("refits", 1)
        import onnx

        for name, weights in self._given.items():
            array, tensor = weights.read(), self._tensors[name]
            if array is None:
                return self._refuse(f"{name}: its memory was freed")
            dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
            tensor.CopyFrom(onnx.numpy_helper.from_array(array.reshape(tuple(tensor.dims)).astype(dtype), name))
        self._engine.open(self._model.SerializeToString())
        return True

    def _refuse(self, text: str) -> bool:
        self._library.complain(self._log, f"[refit.cpp] {text}")
        return False
