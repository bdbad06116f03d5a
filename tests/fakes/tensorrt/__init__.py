"""The fake TensorRT of a process whose PYTHONPATH has `tests/fakes` in front."""

from __future__ import annotations

from cuda.bindings.runtime import WORDS, simulator

from tests.fakes.trt import fake_tensorrt

_module = fake_tensorrt(simulator, WORDS["tensorrt"])
globals().update({name: value for name, value in vars(_module).items() if name not in ("__name__", "__spec__")})
