"""`sdopt build`: a bundle's graphs into engines for this machine, each built once, kept under its `engines/`.

    graph --fuse_step, half, lower--> typed graph --TensorRT--> engine.plan + record.json     in one rename

The folder's name is a digest of all that changes the engine. One process builds an engine at a time; another that
wants the same waits for it. What is stale is told in a sentence, built again and removed.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import onnx_ir as ir

from sdopt import __version__, graph
from sdopt.build.fuse_step import CARRIED, fuse_step
from sdopt.build.half import half
from sdopt.build.lock import one_builder
from sdopt.build.lower import lower
from sdopt.build.recipe import Part, Recipe, part_profile, read_recipe, user_profiles
from sdopt.build.trt_build import Builder, Progress
from sdopt.bundle import Bundle, new_folder
from sdopt.engine.cuda import Gpu, bytes_text
from sdopt.engine.device import shared_device
from sdopt.engine.plans import GRAPH, PLAN, Record, Stored, changed, engines_folder, stored, user_folder, write_record
from sdopt.engine.trt_api import LIBRARIES, TensorRT, environment
from sdopt.errors import BackendError, UsageError, choices
from sdopt.graph.ort_ops import ort_ops
from sdopt.specs import Profile

BACKENDS = (*LIBRARIES, "ort")
PRECISIONS = {"fp16": "float16", "bf16": "bfloat16", "fp32": ""}  # what `half` calls them
WEIGHTY = 100 << 20  # bytes of weights from which a plan's size tells their type

Report = Callable[[str], None]


@dataclass(frozen=True)
class Options:
    """The options of a build, by name; all of them are in an engine's key.

    Raises: UsageError for a value that is not allowed.
    """

    precision: str = "fp16"
    opt_level: int = 3
    workspace: int | None = None  # bytes; None: what is free
    refit: bool = False
    version_compatible: bool = False
    hardware_compatible: bool = False
    weight_streaming: bool = False

    def __post_init__(self) -> None:
        if self.precision not in PRECISIONS:
            raise UsageError(f"precision {self.precision!r}; allowed are {choices(self.precision, PRECISIONS)}")
        if not 0 <= self.opt_level <= 5:
            raise UsageError(f"opt_level = {self.opt_level}; allowed are 0 to 5")
        if self.workspace is not None and self.workspace < 1 << 20:
            raise UsageError(f"workspace = {self.workspace} bytes; allowed is a MiB or more")


def build(
    bundle: Bundle,
    backend: str,
    *,
    components: Sequence[str] | None = None,
    profiles: Sequence[str] = (),
    static: bool = False,
    options: Options | None = None,
    recipe: Recipe | None = None,
    command: str = "",
    report: Report = print,
    progress: Progress | None = None,
) -> list[Path]:
    """The folders of the engines of `bundle`, each built unless it is there already.

    Raises: UsageError for a wrong option; BackendError where the library or the GPU is missing, or does not build.
    """
    if backend not in BACKENDS:
        raise UsageError(f"backend {backend!r} builds no engines; these do: {choices(backend, BACKENDS)}")
    recipe, options = recipe or read_recipe(), options or Options()
    ranges = user_profiles(bundle, recipe, profiles, static)
    target = Target.here(backend)
    folders: list[Path] = []
    for part in recipe.chosen(bundle, components):
        job = Job(bundle, part, target, _for_part(options, part, bundle), ranges, command)
        folders.append(job.folder if job.is_done(report) else job.run(report, progress))
    return folders


@dataclass(frozen=True)
class Target:
    """What engines are built with, and for: a library, and the GPU that is here, if any."""

    backend: str
    lib: TensorRT | None
    gpu: Gpu | None
    free: int | None

    @staticmethod
    def here(backend: str) -> Target:
        """This machine; TensorRT-RTX and ONNX Runtime's graphs need no GPU to be built."""
        if backend == "ort":
            return Target(backend, None, None, None)
        try:
            cuda = shared_device().cuda  # before TensorRT, whose builder reports a missing driver as a TypeError
        except BackendError:
            if backend != "tensorrt-rtx":
                raise
            return Target(backend, TensorRT(backend), None, None)
        return Target(backend, TensorRT(backend), cuda.gpu, cuda.memory()[0])

    def environment(self, options: Mapping[str, Any]) -> dict[str, str]:
        return {} if self.lib is None else environment(self.lib, self.gpu, options)


@dataclass(frozen=True)
class Job:
    """One engine to be built: what it is made from, and so its folder."""

    bundle: Bundle
    part: Part
    target: Target
    options: Mapping[str, Any]
    ranges: tuple[Profile, ...]
    command: str

    @property
    def record(self) -> Record:
        """Its record, as far as it is known before it is built."""
        component = self.bundle.component(self.part.graph)
        files: Mapping[str, Any] = self.bundle.manifest["files"]
        names = (component.graph.name, f"{component.graph.name}.data")
        profiles = tuple(part_profile(self.bundle, self.part, component.inputs, profile) for profile in self.ranges)
        return Record(
            component=self.part.name,
            backend=self.target.backend,
            inputs=component.inputs,
            outputs=component.outputs,
            carry=CARRIED if self.part.fuse else {},
            profiles=profiles,
            environment=self.target.environment(self.options),
            sources={name: files[name]["sha256"] for name in names if name in files},
            options=self.options,
            command=self.command or f"sdopt build {self.bundle.path} --backend {self.target.backend}",
            asked=tuple(map(str, self.ranges)),
        )

    @property
    def folder(self) -> Path:
        return engines_folder(self.bundle) / self.record.key

    def is_done(self, report: Report) -> bool:
        """Whether the engine is there, whole and this user's own; what else stands in its place is removed."""
        if not self.folder.exists():
            return False
        found = next((s for s in stored(self.bundle, self.target.backend) if s.folder == self.folder), None)
        try:
            if found is not None and found.ours:
                for name in found.record.files:
                    found.checked(name)
                report(f"{self.part.name}: already built, {self.folder}")
                return True
            reason = "somebody else built it"
        except BackendError as error:
            reason = str(error)
        report(f"{self.part.name}: built again, because {reason}")
        shutil.rmtree(self.folder)
        return False

    def run(self, report: Report, progress: Progress | None) -> Path:
        """Build the engine; its folder."""
        stale = self._stale()
        for old, change in stale:
            report(f"{self.part.name}: built again, because {change} ({old.folder.name} is removed afterwards)")
        with one_builder(self.folder, report):
            if self.folder.exists() and self.is_done(report):  # another process was first
                return self.folder
            with new_folder(self.folder, needed_bytes=3 * self.bundle.nbytes(self.part.graph)) as folder:
                self._write(folder, report, progress)
        for old, _ in stale:
            shutil.rmtree(old.folder)
        return self.folder

    def _write(self, folder: Path, report: Report, progress: Progress | None) -> None:
        lib, record = self.target.lib, self.record
        builder = None
        if lib is not None:
            timing = user_folder("XDG_CACHE_HOME", ".cache") / "timing" / f"{'-'.join(record.environment.values())}"
            timing = timing.with_name("".join(c if c.isalnum() or c in ".-" else "_" for c in timing.name) + ".cache")
            builder = Builder(lib, self.options, self.target.free, timing, progress, report)
        model, notes = derive(self.bundle, self.part, self.options, builder)
        inputs, outputs = graph.specs(model)
        path, name = folder / GRAPH, GRAPH
        graph.save(model, path)
        weights = (folder / f"{GRAPH}.data").stat().st_size
        names = [GRAPH, f"{GRAPH}.data"]
        if builder is not None:
            report(f"{self.part.name}: building, {self.options['precision']}, {'; '.join(map(str, record.profiles))}")
            shapes = [part_profile(self.bundle, self.part, inputs, profile) for profile in self.ranges]
            notes["layers"] = builder.build(path, folder / PLAN, inputs, shapes)
            path.unlink()
            (folder / f"{GRAPH}.data").unlink()
            name, names = PLAN, [PLAN]
            record = replace(record, profiles=tuple(shapes))
            _check_half(self.part.name, self.options["precision"], notes["layers"], folder / PLAN, weights)
            if self.target.gpu is not None:
                notes["inspected"] = inspected(_layers(builder.lib, folder / PLAN))
                if notes["inspected"] and not builder.strongly_typed:  # here the library may have chosen otherwise
                    _check_half(self.part.name, self.options["precision"], notes["inspected"], folder / PLAN, weights)
        record = replace(record, inputs=inputs, outputs=outputs, notes={**notes, "weight_bytes": weights})
        write_record(folder, record, names)
        report(f"{self.part.name}: {bytes_text((folder / name).stat().st_size)}")

    def _stale(self) -> list[tuple[Stored, str]]:
        """Engines of the same request, for this GPU, that were made from something else; and what it was."""
        mine = self.record
        asked = (mine.component, mine.options, mine.profiles, mine.environment.get("GPU"))
        found: list[tuple[Stored, str]] = []
        for old in stored(self.bundle, self.target.backend):
            theirs = old.record
            given = (theirs.component, theirs.options, theirs.profiles, theirs.environment.get("GPU"))
            if old.ours and given == asked and theirs.key != mine.key:
                found.append((old, changed(theirs, self.bundle, mine.environment)))
        return found


def derive(
    bundle: Bundle, part: Part, options: Mapping[str, Any], builder: Builder | None = None
) -> tuple[ir.Model, dict[str, Any]]:
    """(the typed graph of one engine, what was noted on the way): fused, in half, and in operators that are parsed."""
    model = graph.load(bundle.component(part.graph).graph)
    notes: dict[str, Any] = {}
    if part.fuse:
        channels = bundle.manifest["latents"]["channels"]
        fuse_step(model, guided=part.fuse == "guided", latent_channels=channels)
    if PRECISIONS[options["precision"]]:
        dtype = PRECISIONS[options["precision"]]
        found = half(model, dtype=dtype, islands=part.islands, attention=part.attention)
        notes |= {"half_nodes": found.half_nodes, "islands": len(found.islands), "outside": found.outside}
    if builder is not None:
        unknown = builder.unsupported(sorted({node.op_type for node in model.graph}))
        if unknown:
            notes["lowered"] = unknown
            lower(model)
    elif not PRECISIONS[options["precision"]]:
        ort_ops(model)
    return model, notes


def _for_part(options: Options, part: Part, bundle: Bundle) -> dict[str, Any]:
    """The options of one engine: the recipe's and the model's own needs go before what was asked."""
    precision = part.precision or options.precision
    if precision == "fp16" and part.graph in bundle.manifest.get("float16_unsafe", ()):
        precision = "fp32"
    own = {"fuse": part.fuse, "attention": part.attention, "islands": list(part.islands), "sdopt": __version__}
    return {**asdict(options), "precision": precision, **own}


def _check_half(name: str, precision: str, layers: Mapping[str, int], plan: Path, weights: int) -> None:
    """Raises: BackendError if an engine that was asked for in half is not: then it would be slow without a word."""
    if precision == "fp32":
        return
    wanted = {"fp16": "HALF", "bf16": "BF16"}[precision]
    if layers.get(wanted, 0) <= layers.get("FLOAT", 0):
        raise BackendError(f"{name}: asked for {precision}, but its layers are {dict(layers)}; please report this")
    size = plan.stat().st_size
    if weights > WEIGHTY and size > 1.6 * weights:
        raise BackendError(
            f"{name}: asked for {precision}, but the plan has {bytes_text(size)} for {bytes_text(weights)} of weights: "
            "the library made them float32; please report this"
        )


def inspected(layers: str) -> dict[str, int]:
    """How many tensors of each type a finished engine's layers take and give, as its inspector tells in JSON."""
    words = {"HALF": "Half|FP16", "FLOAT": "Float|FP32"}
    counts = {name: len(re.findall(rf'"Format/Datatype": "[^"]*\b({word})\b', layers)) for name, word in words.items()}
    return {name: count for name, count in counts.items() if count}


def _layers(lib: TensorRT, plan: Path) -> str:
    device = shared_device()
    with device.queueing():
        return lib.load(lib.runtime(), plan.read_bytes(), plan.parent.name).layers()
