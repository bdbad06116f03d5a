"""Every TensorRT name that our source uses exists in every version that we support, or is used only where it is found.

`trt_facts.json` was read off the bindings of these versions: member -> the versions that have it.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import ROOT

FACTS = json.loads((Path(__file__).parent / "trt_facts.json").read_text())
VERSIONS = set(FACTS["versions"])
SOURCES = [
    ROOT / "sdopt/engine/trt_api.py",
    ROOT / "sdopt/build/trt_build.py",
    ROOT / "sdopt/build/trt_types.py",
]
# what our variables are, in these files
CLASSES = {
    "builder": "Builder", "network": "INetworkDefinition", "parser": "OnnxParser", "config": "IBuilderConfig",
    "optimization": "IOptimizationProfile", "cache": "ITimingCache", "runtime": "Runtime", "engine": "ICudaEngine",
    "context": "IExecutionContext", "inspector": "EngineInspector", "e": "ParserError",
    "runtime_config": "IRuntimeConfig",
    "refitter": "Refitter", "layer": "ILayer", "tensor": "ITensor",
}  # fmt: skip
ENUMS = {"kinds": "NetworkDefinitionCreationFlag", "sources": "TacticSource", "levels": "HardwareCompatibilityLevel"}
# used without asking first, because what stands for the version was asked: (member, asked for, has it)
IMPLIED = {
    "BuilderFlag.FP16": ("NetworkDefinitionCreationFlag.STRONGLY_TYPED", False),
    "BuilderFlag.OBEY_PRECISION_CONSTRAINTS": ("NetworkDefinitionCreationFlag.STRONGLY_TYPED", False),
    "ILayer.precision": ("NetworkDefinitionCreationFlag.STRONGLY_TYPED", False),
    "ILayer.set_output_type": ("NetworkDefinitionCreationFlag.STRONGLY_TYPED", False),
    "ICudaEngine.create_execution_context_without_device_memory": ("ExecutionContextAllocationStrategy", False),
    "ExecutionContextAllocationStrategy.USER_MANAGED": ("ExecutionContextAllocationStrategy", True),
    "IRuntimeConfig.set_execution_context_allocation_strategy": ("ICudaEngine.create_runtime_config", True),
    "IRuntimeConfig.dynamic_shapes_kernel_specialization_strategy": (
        "DynamicShapesKernelSpecializationStrategy",
        True,
    ),
    "ICudaEngine.device_memory_size": ("ICudaEngine.device_memory_size_v2", False),
    "IExecutionContext.device_memory": ("IExecutionContext.set_device_memory", False),
    "BuilderFlag.REFIT_INDIVIDUAL": ("BuilderFlag.REFIT_INDIVIDUAL", True),
    "INetworkDefinition.mark_weights_refittable": ("BuilderFlag.REFIT_INDIVIDUAL", True),
    "IStreamWriter": ("Builder.build_serialized_network_to_stream", True),
    "ICudaEngine.weight_streaming_budget_v2": ("ICudaEngine.get_weight_streaming_automatic_budget", True),
    "ICudaEngine.weight_streaming_budget": ("ICudaEngine.weight_streaming_budget", True),  # 8.6 has no such flag
    "IProgressMonitor": ("IBuilderConfig.progress_monitor", True),
    "IBuilderConfig.progress_monitor": ("IBuilderConfig.progress_monitor", True),
    "Builder.build_serialized_network_to_stream": ("Builder.build_serialized_network_to_stream", True),
}


def used(path: Path) -> Iterator[str]:
    """ "IBuilderConfig.set_flag" and the like, for all that a file takes from TensorRT's objects, classes and enums."""
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.Attribute):
            continue
        owner, name = node.value, node.attr
        if name.startswith("__"):
            continue
        if isinstance(owner, ast.Name | ast.Attribute):
            variable = owner.id if isinstance(owner, ast.Name) else owner.attr
            if variable in CLASSES:
                yield f"{CLASSES[variable]}.{name}"
            elif variable in ENUMS:
                yield f"{ENUMS[variable]}.{name}"
            elif variable == "trt":
                yield name
            elif variable[0].isupper() and isinstance(owner, ast.Attribute):
                yield f"{variable}.{name}"


def asked(path: Path) -> set[str]:
    """The names that a file looks for with hasattr or getattr before it uses them."""
    calls = (n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Call))
    looks = (n for n in calls if isinstance(n.func, ast.Name) and n.func.id in ("hasattr", "getattr"))
    return {arg.value for call in looks for arg in call.args if isinstance(arg, ast.Constant)}


def versions_of(member: str) -> set[str]:
    return set(FACTS["members"].get(member, ()))


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: p.name)
def test_every_name_exists_in_every_version_or_is_asked_for(path: Path) -> None:
    members = sorted(set(used(path)))
    assert len(members) > 5
    for member in members:
        missing = VERSIONS - versions_of(member)
        if missing and member in IMPLIED:
            sign, present = IMPLIED[member]
            where = {v for v in VERSIONS if (v in versions_of(sign)) is present}
            assert where <= versions_of(member), member
        elif missing:
            assert member.rpartition(".")[2] in asked(path), f"{member} is not in {sorted(missing)}, and nobody asks"


def test_the_flags_and_enum_members_that_are_looked_up_by_name_are_spelled_right() -> None:
    from sdopt.build.trt_build import FLAGS
    from sdopt.build.trt_types import OWN_TYPE, PRODUCTS
    from sdopt.engine.trt_api import DTYPES, SEVERITIES, WEIGHTS

    names = [*(f"BuilderFlag.{n}" for n in (*FLAGS.values(), "REFIT_INDIVIDUAL")), *(f"DataType.{n}" for n in DTYPES)]
    names += (
        [f"LayerType.{n}" for n in (*OWN_TYPE, *PRODUCTS)]
        + [f"DataType.{n}" for n in WEIGHTS.values()]
        + ["DataType.BF16", "LayerType.NORMALIZATION"]
    )
    names += [f"ILogger.{n}" for n in SEVERITIES] + ["NetworkDefinitionCreationFlag.STRONGLY_TYPED"]
    names += ["PreviewFeature.PROFILE_SHARING_0806", "HardwareCompatibilityLevel.AMPERE_PLUS", "OnnxParser.num_errors"]
    for name in names:
        assert versions_of(name), name


def test_nothing_else_touches_the_bindings() -> None:
    for path in (ROOT / "sdopt").rglob("*.py"):
        if path not in SOURCES:
            text = path.read_text()
            assert not [word for word in ("lib.trt.", "import tensorrt", "create_execution_context") if word in text]
