"""Stand-ins for NVIDIA's libraries, as strict as the real ones. See `gpu` and `trt`.

In a test process `tests.engine.conftest` puts them in place. For a process of its own, this folder goes to the front of
PYTHONPATH: then `cuda.bindings.runtime` and `tensorrt` are the ones here, and the environment variable `SDOPT_FAKE_GPU`
says which TensorRT they play and how much memory the GPU has, e.g. "10 bytes=1000000000".
"""
