"""One engine to be built: its record and its folder, and the graph, plan and checks that it takes.

    graph --fuse_step, half, lower--> typed graph --TensorRT--> engine.plan + record.json

An engine that exists is not built again. While one process builds an engine, another process that needs it waits. A
stale engine is reported with the reason, built again and then removed.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdopt import graph
from sdopt.build.agree import check_rows
from sdopt.build.checks import refuse_lost_islands, size_warning
from sdopt.build.derive import constant_lengths, derive
from sdopt.build.fixed import fix_lengths
from sdopt.build.fuse_step import CARRIED
from sdopt.build.int8 import Scaling
from sdopt.build.lock import one_builder, remove_engines
from sdopt.build.options import INT8_WEIGHTS, QUANTIZED
from sdopt.build.recipe import EngineSpec, part_profile
from sdopt.build.refit import check_refit, refittable
from sdopt.build.refit import write as write_table
from sdopt.build.shallow import deep_spec
from sdopt.build.target import Target
from sdopt.build.trt_build import Builder, Progress
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
from sdopt.engine.refit import REFIT, Changes, NewWeights
from sdopt.engine.store import (
    GRAPH,
    PLAN,
    Record,
    Stored,
    Unsigned,
    changed,
    engines_folder,
    stored,
    write_record,
)
from sdopt.errors import BackendError

if TYPE_CHECKING:
    from sdopt.build.calibrations import Calibrations

Report = Callable[[str], None]


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
            asked=tuple(map(str, self.ranges)),
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
