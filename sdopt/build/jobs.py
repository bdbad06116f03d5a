"""`sdopt build`: build engines for this machine from a bundle's graphs, and keep them in the bundle's `engines/`.

    graph --fuse_step, half, lower--> typed graph --TensorRT--> engine.plan + record.json

An engine's folder is named by a digest of everything that changes the engine, and appears by one rename. An engine
that exists is not built again. While one process builds an engine, another process that needs it waits. A stale engine
is reported with the reason, built again and then removed.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdopt import graph
from sdopt.build.agree import check_rows
from sdopt.build.checks import refuse_lost_islands, size_warning
from sdopt.build.derive import constant_lengths, derive
from sdopt.build.fixed import fix_lengths
from sdopt.build.fuse_step import CARRIED
from sdopt.build.int8 import SEVEN_BITS, Scaling
from sdopt.build.lock import one_builder, remove_engines
from sdopt.build.options import (
    IN_8_BITS,
    INT8_WEIGHTS,
    QUANTIZED,
    BuildOptions,
    exceptions,
    part_options,
    refuse_overlay,
)
from sdopt.build.recipe import EngineSpec, Recipe, part_profile, read_recipe, user_profiles
from sdopt.build.refit import check_refit, refittable
from sdopt.build.refit import write as write_table
from sdopt.build.shallow import deep_spec
from sdopt.build.target import OPENVINO, Target, refuse_part, refuse_precision
from sdopt.build.trt_build import Builder, Progress, check_options
from sdopt.build.trt_types import half_products, inspected, types_of
from sdopt.bundle.adapter import CONTROLNET, Adapter, located, open_adapter
from sdopt.bundle.disk import bytes_text, user_folder
from sdopt.bundle.files import Bundle, ModelFolder
from sdopt.bundle.format import data_file
from sdopt.bundle.joined import SHALLOW, file_of
from sdopt.bundle.specs import Profile
from sdopt.bundle.unfinished import delete, remove_leftovers
from sdopt.bundle.weights import Overlay
from sdopt.bundle.write import new_folder
from sdopt.dataclass import dataclass
from sdopt.engine.device import shared_device
from sdopt.engine.failures import foreign_in_words, of_caller
from sdopt.engine.refit import REFIT, Changes, NewWeights
from sdopt.engine.store import (
    COMMAND,
    GRAPH,
    PLAN,
    Record,
    Stored,
    Unsigned,
    changed,
    check_key,
    engines_folder,
    stored,
    write_record,
)
from sdopt.errors import BackendError, UsageError, install
from sdopt.logs import logger

if TYPE_CHECKING:
    from sdopt.build.calibrations import Calibrations

log = logger(__name__)
LESS_MEMORY = "A build needs about three times its graph: close other programs, or build on a machine with more memory"
NO_VNNI = (
    "this processor adds products of int8 in 16 bits (it has no VNNI): weights get 7 bits, and int8 is hardly faster "
    "than fp32 here; compare them with sdopt tune"
)
Report = Callable[[str], None]


def build(
    bundle: Bundle,
    backend: str,
    *,
    components: Sequence[str] | None = None,
    adapters: Sequence[str] = (),
    cache_depth: int | None = None,
    profiles: Sequence[str] = (),
    static: bool = False,
    options: BuildOptions | None = None,
    recipe: Recipe | None = None,
    overlay: Overlay | None = None,
    command: str = "",
    report: Report = log.info,
    progress: Progress | None = None,
) -> list[Path]:
    """Build the engines of `bundle` that do not exist yet, and return the folders of all.

    One engine takes all the profiles. With `static`, each profile has an engine of its own. `adapters`: those of the
    bundle that steer the engines of a step: ControlNets run inside, and what T2I-Adapters and IP-Adapters give is an
    input. Such an engine is taken where exactly these ControlNets and kinds are in use. `cache_depth`: build the two
    engines of a feature cache, and nothing else. `overlay`: LoRAs that are built
    into the engines, which are taken where exactly these are in use.
    Raises: UsageError for a wrong option; BackendError if the library or the GPU is missing, or the build fails.
    """
    target = Target.here(backend)
    recipe = recipe or read_recipe()
    options = (options or BuildOptions()).resolved(target.precision)
    refuse_precision(target.backend, options.precision)
    ranges = user_profiles(bundle, recipe, profiles, static)
    groups = [(profile,) for profile in ranges] if static else [ranges]
    command = command or f"{COMMAND} --backend {backend}"
    if target.lib is not None:
        check_options(target.lib, asdict(options))
    if cache_depth is not None:
        if components:
            raise UsageError("--cache-depth and --component: each says what is built; give one of the two")
        components = recipe.cached(bundle, cache_depth, steps=target.lib is not None)
    elif options.precision == INT8_WEIGHTS:
        components = components or _large_encoders(bundle)
    elif target.is_cpu and (options.precision in QUANTIZED or target.backend == OPENVINO) and not components:
        components = [name for name in IN_8_BITS if name in bundle.components]
    parts = recipe.chosen(bundle, components, adapters)
    if overlay is not None:
        refuse_overlay(overlay, [part.name for part in parts], options, target.lib is None)
    check_key()
    report, progress = of_caller(report), progress and of_caller(progress)
    folders: list[Path] = []
    calibrations = _calibrations(bundle, target, options.precision, report) if options.precision in QUANTIZED else None
    for part in parts:
        refuse_part(target.backend, part, options.precision)
        own = part_options(options, part, bundle, target.has_bf16, overlay, "fp32" if target.is_cpu else "fp16")
        lines = exceptions(own, options.precision, part, bundle)
        for group in groups:
            job = Job(bundle, part, target, own, group, command, tuple(lines), overlay, calibrations)
            with foreign_in_words(f"{part.name} is not built", BackendError, LESS_MEMORY):
                folders.append(job.run(report, progress))
    return folders


def _large_encoders(bundle: Bundle) -> list[str]:
    """The text encoders that give tokens of their own, as T5 does. Raises: UsageError for a bundle without one."""
    names = [one.component for one in bundle.manifest.conditioning.encoders if one.join == "tokens"]
    if not names:
        there = ", ".join(bundle.components)
        text = f"precision {INT8_WEIGHTS!r}: this bundle has no T5; name what is built with --component: {there}"
        raise UsageError(text, "precision")
    return names


def _calibrations(bundle: Bundle, target: Target, precision: str, report: Report) -> Calibrations:
    """What finds the scales of int8. Raises: BackendError where ONNX Runtime is missing, which makes the pictures."""
    try:
        from sdopt.build.calibrations import Calibrations  # late: only int8 needs ONNX Runtime here
        from sdopt.engine import ort
    except ImportError as error:
        raise BackendError(
            f"{precision} finds its scales in pictures that ONNX Runtime makes ({error}): {install('build,cpu')}"
        ) from error
    if target.backend == OPENVINO:
        from sdopt.engine import openvino

        arithmetic = target.arithmetic(precision)
        if arithmetic.largest_weight == SEVEN_BITS:
            report(NO_VNNI)
        return Calibrations(bundle, arithmetic, openvino.open_int8)
    return Calibrations(bundle, target.arithmetic(precision), ort.OrtEngine)


@dataclass(frozen=True)
class Job:
    """One engine to be built, with everything it is made from."""

    bundle: Bundle
    part: EngineSpec
    target: Target
    options: Mapping[str, Any]
    ranges: tuple[Profile, ...]
    command: str
    lines: tuple[str, ...] = field(default=(), compare=False)  # reported when it is built
    overlay: Overlay | None = field(default=None, compare=False)  # built into it; the options have its key
    calibrations: Calibrations | None = field(default=None, compare=False)  # of an int8 build

    @property
    def record(self) -> Record:
        """What is known of the engine's record before the build."""
        home, name = located(self.bundle, self.part.graph)
        component = home.component(name)
        sources = _sources(home, name)
        taken = list(component.inputs)
        if self.part.cache == SHALLOW:
            taken.append(deep_spec(graph.load(component.graph), self.part.depth))
        for adapter in self.nets.values():
            taken += adapter.component(CONTROLNET).inputs
            sources |= _sources(adapter, CONTROLNET)
        profiles = tuple(part_profile(self.bundle, self.part, taken, profile) for profile in self.ranges)
        return Record(
            component=self.part.name,
            backend=self.target.backend,
            inputs=component.inputs,
            outputs=component.outputs,
            carry=CARRIED if self.part.fuse else {},
            profiles=profiles,
            environment=self.target.environment(self.options),
            sources=sources,
            options=self.options,
            command=self.command,
            asked=() if self.target.lib is None else tuple(map(str, self.ranges)),  # a graph takes every size
        )

    @cached_property
    def nets(self) -> Mapping[str, Adapter]:
        """The ControlNets that are joined with the UNet, by name."""
        return {name: open_adapter(self.bundle, name) for name in self.part.steering.nets}

    @property
    def folder(self) -> Path:
        return engines_folder(self.bundle) / self.record.key

    @property
    def least_bytes(self) -> int:
        """What its files need on the disk at least: the graph, and beside it the plan."""
        home, model = located(self.bundle, self.part.model)
        stored_bytes = 4 if home.manifest.components[model].weights == "float32" else 2
        width = {"fp32": 4, INT8_WEIGHTS: 1}.get(self.options["precision"], 2) / stored_bytes
        copies = min(1.0, width) + (0.0 if self.target.lib is None else width)
        nets = sum(adapter.nbytes(CONTROLNET) for adapter in self.nets.values())
        return int(copies * (home.nbytes(model) + nets))

    def fault(self) -> str:
        """Why the folder of the engine is not one that this user has built, with sound files; "" if it is."""
        engines = {entry.folder: entry for entry in stored(self.bundle, self.target.backend)}
        engine = engines.get(self.folder)
        try:
            if engine is not None and engine.ours:
                for name in engine.record.files:
                    engine.checked(name)
                return ""
            return "somebody else built it"
        except BackendError as error:
            return str(error)

    def run(self, report: Report, progress: Progress | None) -> Path:
        """Build the engine if it is not there, and return its folder."""
        if self.folder.exists() and not self.fault():
            report(f"{self.part.name}: already built, {self.folder}")
            return self.folder
        stale = self._stale()
        for old, change in stale:
            report(f"{self.part.name}: built again, because {change} ({old.folder.name} is removed afterwards)")
        for line in self.lines:
            report(f"{self.part.name}: {line}")
        with one_builder(self.folder, report):
            if self.folder.exists():
                fault = self.fault()
                if not fault:  # another process was first
                    report(f"{self.part.name}: already built, {self.folder}")
                    return self.folder
                report(f"{self.part.name}: built again, because {fault}")
                delete(self.folder)
            remove_leftovers(self.folder.parent)
            with new_folder(self.folder, needed_bytes=self.least_bytes) as folder, self.target.current():
                self._write(folder, report, progress)
        for old, _ in stale:
            try:
                remove_engines([old.folder], report)
            except (OSError, BackendError) as error:  # the new one is built all the same
                report(f"{self.part.name}: {old.folder.name} stays: {error}")
        return self.folder

    def _write(self, folder: Path, report: Report, progress: Progress | None) -> None:
        """Write the engine's files and its record into `folder`."""
        name, builder = self.part.name, self._builder(report, progress)
        where = (self.target.device, self.target.backend)
        scalings, reached = self._scalings(report)
        model, notes = derive(self.bundle, self.part, self.options, builder, *where, self.overlay, scalings)
        notes |= reached
        inputs, outputs = graph.specs(model)
        record = replace(self.record, inputs=inputs, outputs=outputs)
        lengths = {} if builder is None else constant_lengths(record.profiles)
        if lengths:
            notes["fixed"] = {"lengths": lengths, "nodes": fix_lengths(model, lengths)}
        graph.save(model, folder / GRAPH)
        notes["weight_bytes"] = (folder / f"{GRAPH}.data").stat().st_size
        files = [GRAPH, f"{GRAPH}.data"]
        if builder is not None:
            if "lowered" in notes:
                library = f"{builder.lib.backend} {builder.lib.version}"
                report(f"{name}: written in operators that {library} knows: {', '.join(notes['lowered'])}")
            report(f"{name}: building, {self.options['precision']}, {'; '.join(map(str, record.profiles))}")
            types = types_of(model)
            table = refittable(model, constants=not builder.refits_some) if self.options["refit"] else None
            weights = table.weights if table is not None else ()
            notes["layers"] = builder.build(
                folder / GRAPH, folder / PLAN, inputs, record.profiles, types, half_products(model), weights
            )
            for file in files:
                (folder / file).unlink()
            files = [PLAN]
            if table is not None:
                write_table(folder / REFIT, table)
                files.append(REFIT)
            notes |= self._checked(builder, folder / PLAN, record, types, notes["weight_bytes"], report)
        else:
            report(f"{name}: {self.target.uses(self.options['precision'])}")
        write_record(folder, replace(record, notes=notes), files)
        nbytes = sum((folder / file).stat().st_size for file in files)
        report(f"{name}: {bytes_text(nbytes)}")

    def _scalings(self, report: Report) -> tuple[Mapping[str, Scaling] | None, dict[str, Any]]:
        """(the scalings of an int8 build, None for another one; notes for its record)."""
        if self.options["precision"] not in QUANTIZED or self.calibrations is None:
            return None, {}
        given = self.options["prompts"], self.options["floor"]
        scalings, part, reached = self.calibrations.searched(self.part.model, *given, report=report)
        return scalings, {"quantized_part": part, "quantized_db": reached}

    def _builder(self, report: Report, progress: Progress | None) -> Builder | None:
        """The builder of the plan; None for ONNX Runtime, which takes the graph itself."""
        if self.target.lib is None:
            return None
        name = re.sub(r"[^\w.-]", "_", "-".join(self.record.environment.values()))
        timing = user_folder("XDG_CACHE_HOME", ".cache") / "timing" / f"{name}.cache"
        return Builder(self.target.lib, self.options, self.target.free, timing, progress, report, self.part.name)

    def _checked(
        self, builder: Builder, plan: Path, record: Record, types: Mapping[str, str], weights: int, report: Report
    ) -> dict[str, Any]:
        """Check the finished plan, and return notes for its record.

        A fault that makes the engine slow or large is reported and noted.
        Raises: BackendError for a fault that makes its pictures wrong.
        """
        name, precision = self.part.name, self.options["precision"]
        notes: dict[str, Any] = {}
        warning = size_warning(precision, plan.stat().st_size, weights, len(self.ranges))
        if warning:
            report(f"{name}: {warning}")
            notes["warning"] = warning
        if self.target.gpu is None:
            return notes
        try:
            layers = self._layers(builder, plan)
        except BackendError as error:
            if self.target.backend != "tensorrt-rtx":
                raise
            report(f"{name}: not checked: {self._why_not_run(str(error))}")
            return notes
        notes["inspected"] = inspected(layers)
        if not builder.strongly_typed:  # the library may have chosen other types
            notes["islands_shown"] = refuse_lost_islands(name, layers, types)
        with self._opened(builder, plan, record) as engine:
            notes["agreement"] = check_rows(name, engine, record.profiles, precision).to_json()
        if self.options["refit"]:
            opened = partial(self._opened, builder, plan, record)
            notes["agreement"]["refitted"] = check_refit(
                name, opened, plan.with_name(REFIT), record.profiles[0], precision
            )
        return notes

    def _why_not_run(self, error: str) -> str:
        """Why a finished engine does not run on this machine's GPU, followed by the library's own words."""
        gpu = self.target.gpu
        if gpu is not None and "driver version is insufficient" in error:
            cuda = f"{gpu.driver // 1000}.{gpu.driver % 1000 // 10}"
            return (
                f"this machine's NVIDIA driver (CUDA {cuda}) is older than the library needs; "
                f"install a newer one to run the engine here. It says: {error}"
            )
        return f"it does not run on this GPU: {error}"

    def _layers(self, builder: Builder, plan: Path) -> str:
        """The plan's layers, in the JSON of the library's inspector."""
        device = shared_device(self.target.index)
        with device.queueing():
            lib = builder.lib
            return lib.load(lib.runtime(), plan.read_bytes(), self.part.name).layers()

    def _opened(self, builder: Builder, plan: Path, record: Record, changes: Changes | None = None) -> Any:
        """The plan as an engine on the GPU, with changes of its weights or without."""
        from sdopt.engine.trt import TrtEngine

        return TrtEngine(
            builder.lib,
            shared_device(self.target.index),
            [Unsigned(plan.parent, record.at(self.bundle.path))],
            cache=False,
            weights=None if changes is None else NewWeights(self.bundle, self.part.name, changes),
        )

    def _stale(self) -> list[tuple[Stored, str]]:
        """This user's engines of the same request and the same GPU that are out of date, with the reason of each."""
        record = self.record
        stale: list[tuple[Stored, str]] = []
        for old in stored(self.bundle, self.target.backend):
            same_request = _request(old.record) == _request(record)
            if old.ours and same_request and old.folder != self.folder:
                stale.append((old, changed(old.record, self.bundle, record.environment)))
        return stale


def _request(record: Record) -> tuple[Any, ...]:
    """What was requested of an engine and where it runs, without what it was made from."""
    where = (record.environment.get("GPU"), record.environment.get("provider"))
    return (record.component, record.options, record.asked, *where)


def _sources(folder: ModelFolder, component: str) -> dict[str, str]:
    """The graph and the weights of a component, each with its SHA-256. Those of an adapter have its folder's name."""
    entries, files = folder.manifest.components, folder.manifest.files
    listed = [name for name in (entries[component].graph, data_file(entries, component)) if name in files]
    return {file_of(folder.name, name) if isinstance(folder, Adapter) else name: files[name].sha256 for name in listed}
