"""sdopt: Stable Diffusion pipelines as folders that run without PyTorch.

    import sdopt
    pipe = sdopt.load()                                   # the embedded text-to-emoji model, or a bundle's path
    pipe("a red apple on a blue background").images[0].save("apple.png")

Names are loaded when first used (PEP 562), so `import sdopt` costs next to nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from sdopt import privacy

if TYPE_CHECKING:
    from sdopt.bundle.files import Bundle as Bundle
    from sdopt.engine import Engine as Engine
    from sdopt.engine import open_engine as open_engine
    from sdopt.errors import BackendError as BackendError
    from sdopt.errors import BundleError as BundleError
    from sdopt.errors import CheckpointError as CheckpointError
    from sdopt.errors import NumericsError as NumericsError
    from sdopt.errors import ParityError as ParityError
    from sdopt.errors import SdoptError as SdoptError
    from sdopt.errors import UsageError as UsageError
    from sdopt.export import export as export
    from sdopt.image import control as control
    from sdopt.pipeline import Pipeline as Pipeline
    from sdopt.pipeline import load as load
    from sdopt.request.options import Options as Options
    from sdopt.result import Result as Result
    from sdopt.samplers import SamplerTable as SamplerTable
    from sdopt.samplers import sampler_table as sampler_table

__version__ = "0.1.0"
privacy.silence()  # before any library that reads its variables

_HOME = {
    "load": "pipeline",
    "Pipeline": "pipeline",
    "Result": "result",
    "Options": "request.options",
    "export": "export",
    "control": "image.control",
    "Bundle": "bundle.files",
    "Engine": "engine",
    "open_engine": "engine",
    "SamplerTable": "samplers",
    "sampler_table": "samplers",
    "SdoptError": "errors",
    "UsageError": "errors",
    "BundleError": "errors",
    "CheckpointError": "errors",
    "BackendError": "errors",
    "ParityError": "errors",
    "NumericsError": "errors",
}
MODULES = ("export", "control")  # the first is a package that can be called
__all__ = ["__version__", *_HOME]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'sdopt' has no attribute {name!r}")
    module = importlib.import_module(f"sdopt.{_HOME[name]}")
    return module if name in MODULES else getattr(module, name)


def __dir__() -> list[str]:
    return sorted(__all__)
