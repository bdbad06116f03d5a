"""The names of backends, precisions and memory policies as types, so that an editor completes them.

A parameter is `BackendName | str`: other spellings, such as "ort:cuda", and variables are welcome too.
`tests/test_types.py` compares them with the tables.
"""

from __future__ import annotations

from typing import Literal

BackendName = Literal["auto", "ort", "openvino", "tensorrt", "tensorrt-rtx"]
PrecisionName = Literal["auto", "fp32", "bf16", "fp16", "int8", "fp8", "int8-weights"]
MemoryName = Literal["fast", "low"]
