"""Build a TensorRT plan from a typed ONNX graph. `sdopt.engine.trt_api` runs plans.

Both find features with `hasattr`, and enum members by name.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from sdopt.build.refit import LORA
from sdopt.build.trt_errors import is_out_of_memory, meaning
from sdopt.build.trt_types import keep_types, layer_types, product_types
from sdopt.bundle.disk import MAX_CACHED_BYTES, bytes_text, read_cached, write_cached
from sdopt.bundle.specs import Profile, TensorSpec
from sdopt.dataclass import dataclass
from sdopt.engine.trt_api import TensorRT
from sdopt.errors import BackendError, UsageError

FLAGS = {  # option -> BuilderFlag
    "refit": "REFIT",
    "version_compatible": "VERSION_COMPATIBLE",
    "weight_streaming": "WEIGHT_STREAMING",
}
# options that TensorRT-RTX ignores or refuses -> why they are not needed
NOT_IN_RTX = {
    "hardware_compatible": "its engines run on every GPU that it knows",
    "version_compatible": "its engines run with the version that built them",
}
MAX_TIMINGS = 50  # timing caches in this user's folder: one for each library, GPU and driver
Progress = Callable[[str, int, int], None]  # (phase, steps done, steps in all)


@dataclass(frozen=True)
class Builder:
    """One library's builder, with the settings that all engines of a build share."""

    lib: TensorRT
    options: Mapping[str, Any]
    free: int | None  # bytes of the GPU's memory that a build may use; None without a GPU
    timing: Path | None = None  # the timing cache, read and written
    progress: Progress | None = None
    report: Callable[[str], None] = print
    name: str = "graph"  # the engine's name in messages

    def build(
        self,
        graph: Path,
        plan: Path,
        inputs: Sequence[TensorSpec],
        profiles: Sequence[Profile],
        types: Mapping[str, str] | None = None,
        half_products: int = 0,
        refittable: Collection[str] = (),
    ) -> dict[str, int]:
        """Write `plan`, and return how many layers have each type. If memory runs out, try again with less workspace.

        `types` are the types of the graph's tensors. `half_products` is how many of its convolutions and matrix
        products are in half. `refittable`: the weights that may be changed later, if not all.
        Raises: BackendError with TensorRT's errors and their meaning; UsageError for an option that it does not have.
        """
        check_options(self.lib, self.options)
        builder = self._builder()
        network = builder.create_network(self._network_flags())
        parser = self._parsed(network, graph)
        if not self.strongly_typed and self.options["precision"] == "fp16":
            keep_types(network, types or {})
        self._check_half(network, half_products)
        if self.refits_some:
            self._mark(network, refittable)
        errors = ""
        for workspace in self._workspaces():
            self.lib.log.clear()
            raised: list[BaseException] = []
            config = self._config(builder, inputs, profiles, workspace, raised)
            built = self._write_plan(builder, network, config, plan, raised)
            if raised:
                raise raised[0]
            if built:
                self._keep_timing(config)
                del parser  # it holds the weights until here
                return layer_types(network)
            errors = self.lib.log.errors()
            if workspace is None or not is_out_of_memory(errors):
                break
            self.report(f"{self.name}: {bytes_text(workspace)} of workspace did not do; trying less")
        raise self._failed("builds no engine", errors)

    def unsupported(self, operators: Sequence[str]) -> list[str]:
        """The `operators` that this version's parser does not know."""
        network = self._builder().create_network(self._network_flags())
        parser = self.lib.trt.OnnxParser(network, self.lib.log)
        return [name for name in operators if not parser.supports_operator(name)]

    @property
    def strongly_typed(self) -> bool:
        """Whether the library takes all types from the graph. If not, half precision is also a flag of the builder."""
        return hasattr(self.lib.trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED")

    @property
    def refits_some(self) -> bool:
        """Whether single weights are marked as those that may be changed. Old versions can change all or none."""
        return self.options["refit"] == LORA and hasattr(self.lib.trt.BuilderFlag, "REFIT_INDIVIDUAL")

    def _mark(self, network: Any, refittable: Collection[str]) -> None:
        """Raises: BackendError for a weight that the network does not know."""
        unknown = [name for name in refittable if not network.mark_weights_refittable(name)]
        if unknown:
            raise self._failed(f"knows no weight {unknown[0]!r}, one of {len(unknown)}", self.lib.log.errors())

    def _builder(self) -> Any:
        """The library's builder.

        Raises: BackendError if its constructor fails. Without a driver that is a TypeError.
        """
        self.lib.log.clear()
        try:
            return self.lib.trt.Builder(self.lib.log)
        except (TypeError, RuntimeError) as error:
            raise self._failed("makes no builder", self.lib.log.errors()) from error

    def _failed(self, what: str, errors: str) -> BackendError:
        return BackendError(f"{self.name}: {self.lib.backend} {self.lib.version} {what}: {meaning(errors)}")

    def _refused(self, profile: Profile, errors: str) -> UsageError:
        return UsageError(f"{self.name}: {self.lib.backend} refuses the profile {profile}: {meaning(errors)}")

    def _check_half(self, network: Any, wanted: int) -> None:
        """Refuse a network that computes in float32 what the graph has in half: its engine would be slow.

        Raises: BackendError when less than half of the `wanted` products are in half.
        """
        products = product_types(network)
        in_half = products.get("HALF", 0) + products.get("BF16", 0)
        if 2 * in_half < wanted:
            raise BackendError(
                f"{self.name}: the graph has {wanted} convolutions and matrix products in {self.options['precision']}, "
                f"and {self.lib.backend} {self.lib.version} makes {dict(products)} of them. "
                "Build it with --precision fp32, and please report this"
            )

    def _network_flags(self) -> int:
        kinds = self.lib.trt.NetworkDefinitionCreationFlag
        names = ("STRONGLY_TYPED", "EXPLICIT_BATCH")
        return sum(1 << int(getattr(kinds, name)) for name in names if hasattr(kinds, name))

    def _parsed(self, network: Any, graph: Path) -> Any:
        parser = self.lib.trt.OnnxParser(network, self.lib.log)
        if not parser.parse_from_file(str(graph)):
            errors = [parser.get_error(i) for i in range(parser.num_errors)]
            described = "; ".join(_described(error) for error in errors)
            raise self._failed("cannot parse it", f"{described} | {self.lib.log.errors()}")
        if hasattr(self.lib.trt, "IAttentionInputLayer"):
            self._allow_decomposed_attention(network)
        return parser

    def _allow_decomposed_attention(self, network: Any) -> None:
        """Let the library split attention into other layers where it has no kernel for it, as in float32."""
        for i in range(network.num_layers):
            entry = network.get_layer(i)
            if entry.type.name == "ATTENTION_INPUT":
                entry.__class__ = self.lib.trt.IAttentionInputLayer
                entry.attention.decomposable = True

    def _workspaces(self) -> list[int | None]:
        """The sizes to try in turn: the option, at most 0.9 of the free memory; then a half and a quarter of it."""
        most = self.options["workspace"]
        if self.free is not None:
            most = min(most or self.free, int(0.9 * self.free))
        return [None] if most is None else [most, most // 2, most // 4]

    def _config(
        self,
        builder: Any,
        inputs: Sequence[TensorSpec],
        profiles: Sequence[Profile],
        workspace: int | None,
        raised: list[BaseException],
    ) -> Any:
        """The builder's configuration for one try. Exceptions from its progress monitor are appended to `raised`."""
        trt, config = self.lib.trt, builder.create_builder_config()
        if workspace is not None:
            config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, workspace)
        config.builder_optimization_level = self.options["opt_level"]
        config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
        for option, name in FLAGS.items():
            if self.options[option]:
                some = option == "refit" and self.refits_some
                config.set_flag(trt.BuilderFlag.REFIT_INDIVIDUAL if some else getattr(trt.BuilderFlag, name))
        # graphs can only capture an engine that allocates nothing as it runs; with streamed weights RTX must allocate
        if hasattr(trt.BuilderFlag, "REQUIRE_USER_ALLOCATION") and not self.options["weight_streaming"]:
            config.set_flag(trt.BuilderFlag.REQUIRE_USER_ALLOCATION)
        if self.options["hardware_compatible"]:
            config.hardware_compatibility_level = trt.HardwareCompatibilityLevel.AMPERE_PLUS
        if not self.strongly_typed:
            self._configure_8_6(config)
        self._set_timing(config)
        if self.progress is not None and hasattr(config, "progress_monitor"):
            config.progress_monitor = make_monitor(trt, self.progress, raised)
        for profile in profiles:
            self._add_profile(builder, config, inputs, profile)
        return config

    def _configure_8_6(self, config: Any) -> None:
        """What TensorRT 8.6 must be told; later versions do it by themselves."""
        trt = self.lib.trt
        if self.options["precision"] == "fp16":
            config.set_flag(trt.BuilderFlag.FP16)
            config.set_flag(trt.BuilderFlag.OBEY_PRECISION_CONSTRAINTS)
        for name in ("PROFILE_SHARING_0806", "DISABLE_EXTERNAL_TACTIC_SOURCES_FOR_CORE_0805"):
            if hasattr(trt.PreviewFeature, name):
                config.set_preview_feature(getattr(trt.PreviewFeature, name), True)
        sources = trt.TacticSource  # without cuBLAS and cuDNN, which only the oldest releases of 8.6 still find
        config.set_tactic_sources(1 << int(sources.EDGE_MASK_CONVOLUTIONS) | 1 << int(sources.JIT_CONVOLUTIONS))

    def _add_profile(self, builder: Any, config: Any, inputs: Sequence[TensorSpec], profile: Profile) -> None:
        """Raises: UsageError if TensorRT refuses the profile."""
        optimization = builder.create_optimization_profile()
        try:
            for spec in inputs:
                optimization.set_shape(spec.name, *(profile.shape(spec, i) for i in range(3)))
            index = config.add_optimization_profile(optimization)
        except (ValueError, RuntimeError) as error:
            raise UsageError(f"profile {profile}: TensorRT refuses it: {error} | {self.lib.log.errors()}") from error
        if index < 0:
            raise self._refused(profile, self.lib.log.errors())

    def _write_plan(self, builder: Any, network: Any, config: Any, plan: Path, raised: list[BaseException]) -> bool:
        """Build the plan and write it. Whether it was built. Where the library can, no copy is made in memory."""
        if hasattr(builder, "build_serialized_network_to_stream"):
            with plan.open("wb") as stream:
                writer = make_writer(self.lib.trt, stream, raised)
                return bool(builder.build_serialized_network_to_stream(network, config, writer))
        memory = builder.build_serialized_network(network, config)
        if memory is not None:
            plan.write_bytes(memory)
        return memory is not None

    def _set_timing(self, config: Any) -> None:
        if self.timing is None:
            return
        content = b""
        with suppress(OSError):
            content = read_cached(self.timing, MAX_CACHED_BYTES)
        cache = config.create_timing_cache(content) or config.create_timing_cache(b"")  # None: it is damaged
        config.set_timing_cache(cache, ignore_mismatch=False)

    def _keep_timing(self, config: Any) -> None:
        cache = config.get_timing_cache()
        if self.timing is None or cache is None:
            return
        with suppress(OSError):  # a build is not lost for a cache that cannot be written
            write_cached(self.timing, bytes(cache.serialize()), MAX_TIMINGS)


def check_options(lib: TensorRT, options: Mapping[str, Any]) -> None:
    """Raises: UsageError for an option that this library does not have. Called before anything is built."""
    trt = lib.trt
    if options["precision"] == "bf16" and not has_bf16(lib):
        raise UsageError(f"precision 'bf16': {lib.backend} {lib.version} does not have it; --precision fp16 or fp32")
    is_rtx = hasattr(trt, "ComputeCapability")
    for option, reason in NOT_IN_RTX.items():
        if is_rtx and options[option]:
            raise UsageError(f"--{option.replace('_', '-')}: {lib.backend} does not have it: {reason}")
    members = {option: (trt.BuilderFlag, name) for option, name in FLAGS.items()}
    members["hardware_compatible"] = (getattr(trt, "HardwareCompatibilityLevel", None), "AMPERE_PLUS")
    for option, (enum, name) in members.items():
        if options[option] and not hasattr(enum, name):
            words = option.replace("_", "-")
            raise UsageError(f"--{words}: {lib.backend} {lib.version} does not have it ({name}); leave it out")


def has_bf16(lib: TensorRT) -> bool:
    """Whether the library computes in bfloat16."""
    return hasattr(lib.trt.DataType, "BF16")


def _described(error: Any) -> str:
    """A parser's error with the name of its node; old releases have only its number."""
    name = error.node_name() if hasattr(error, "node_name") else ""
    return f"{name or f'node {error.node()}'}: {error.desc()}"


def make_monitor(trt: Any, progress: Progress, raised: list[BaseException]) -> Any:
    """A monitor that passes TensorRT's progress on to `progress`.

    If a call raises, as Ctrl-C does, the build stops at the next step. The exception is appended to `raised`, because
    it must not pass through the library.
    """

    class Monitor(trt.IProgressMonitor):
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self._steps: dict[str, int] = {}

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self._steps[phase_name] = num_steps
            self._tell(phase_name, 0)

        def step_complete(self, phase_name: str, step: int) -> bool:
            return self._tell(phase_name, step + 1)

        def phase_finish(self, phase_name: str) -> None:
            self._tell(phase_name, self._steps.pop(phase_name, 0))

        def _tell(self, phase: str, done: int) -> bool:
            try:
                progress(phase, done, self._steps.get(phase, done))
            except BaseException as error:
                raised.append(error)
            return not raised

    return Monitor()


def make_writer(trt: Any, stream: Any, raised: list[BaseException]) -> Any:
    """A writer through which TensorRT writes a finished plan into a file.

    If a write raises, as on a full disk, the exception is appended to `raised`. The library itself does not notice
    that the plan is incomplete.
    """

    class Writer(trt.IStreamWriter):
        def __init__(self) -> None:
            trt.IStreamWriter.__init__(self)

        def write(self, data: bytes) -> int:
            try:
                return 0 if raised else int(stream.write(data))
            except BaseException as error:
                raised.append(error)
                return 0

    return Writer()
