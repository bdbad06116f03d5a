"""`sdopt build`: build engines for this machine from a bundle's graphs, and keep them in the bundle's `engines/`.

    graph --fuse_step, half, lower--> typed graph --TensorRT--> engine.plan + record.json

An engine's folder is named by a digest of everything that changes the engine, and appears in one rename. An engine
that is there is not built again. While one process builds an engine, another that needs the same one waits. A stale
engine is reported in a sentence, built again and then removed.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from sdopt import graph
from sdopt.build.agree import check_rows
from sdopt.build.checks import refuse_lost_islands, size_warning
from sdopt.build.derive import constant_lengths, derive
from sdopt.build.fixed import fix_lengths
from sdopt.build.fuse_step import CARRIED
from sdopt.build.lock import one_builder
from sdopt.build.options import BuildOptions, exceptions, part_options
from sdopt.build.recipe import EngineSpec, Recipe, part_profile, read_recipe, user_profiles
from sdopt.build.target import Target
from sdopt.build.trt_build import Builder, Progress, check_options
from sdopt.build.trt_types import half_products, inspected, types_of
from sdopt.bundle.disk import user_folder
from sdopt.bundle.files import Bundle, new_folder
from sdopt.bundle.specs import Profile
from sdopt.engine.cuda import bytes_text
from sdopt.engine.device import shared_device
from sdopt.engine.store import (
    COMMAND,
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

Report = Callable[[str], None]


def build(
    bundle: Bundle,
    backend: str,
    *,
    components: Sequence[str] | None = None,
    profiles: Sequence[str] = (),
    static: bool = False,
    options: BuildOptions | None = None,
    recipe: Recipe | None = None,
    command: str = "",
    report: Report = print,
    progress: Progress | None = None,
) -> list[Path]:
    """Build the engines of `bundle` that are not there yet, and return the folders of all.

    One engine takes all the profiles. With `static`, each profile has an engine of its own.
    Raises: UsageError for a wrong option; BackendError if the library or the GPU is missing, or the build fails.
    """
    target = Target.here(backend)
    recipe = recipe or read_recipe()
    options = (options or BuildOptions()).resolved(target.precision)
    ranges = user_profiles(bundle, recipe, profiles, static)
    groups = [(profile,) for profile in ranges] if static else [ranges]
    command = command or f"{COMMAND} --backend {backend}"
    if target.lib is not None:
        check_options(target.lib, asdict(options))
    folders: list[Path] = []
    for part in recipe.chosen(bundle, components):
        own = part_options(options, part, bundle, target.has_bf16)
        lines = exceptions(own, options.precision, part, bundle)
        for group in groups:
            job = Job(bundle, part, target, own, group, command, tuple(lines))
            folders.append(job.folder if job.is_done(report) else job.run(report, progress))
    return folders


@dataclass(frozen=True)
class Job:
    """One engine to be built, with everything it is made from. That also gives its folder."""

    bundle: Bundle
    part: EngineSpec
    target: Target
    options: Mapping[str, Any]
    ranges: tuple[Profile, ...]
    command: str
    lines: tuple[str, ...] = field(default=(), compare=False)  # what is reported when it is built

    @property
    def record(self) -> Record:
        """The engine's record, as far as it is known before the build."""
        component = self.bundle.component(self.part.graph)
        files = self.bundle.manifest.files
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
            sources={name: files[name].sha256 for name in names if name in files},
            options=self.options,
            command=self.command,
            asked=tuple(map(str, self.ranges)),
        )

    @property
    def folder(self) -> Path:
        return engines_folder(self.bundle) / self.record.key

    def is_done(self, report: Report) -> bool:
        """Whether this user has built the engine and all its files are sound. If not, the folder is removed."""
        if not self.folder.exists():
            return False
        engines = stored(self.bundle, self.target.backend)
        engine = next((entry for entry in engines if entry.folder == self.folder), None)
        try:
            if engine is not None and engine.ours:
                for name in engine.record.files:
                    engine.checked(name)
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
        for line in self.lines:
            report(f"{self.part.name}: {line}")
        with one_builder(self.folder, report):
            if self.folder.exists() and self.is_done(report):  # another process was first
                return self.folder
            needed = 3 * self.bundle.nbytes(self.part.graph)
            with new_folder(self.folder, needed_bytes=needed) as folder, self.target.current():
                self._write(folder, report, progress)
        for old, _ in stale:
            shutil.rmtree(old.folder)
        return self.folder

    def _write(self, folder: Path, report: Report, progress: Progress | None) -> None:
        name, builder = self.part.name, self._builder(report, progress)
        model, notes = derive(self.bundle, self.part, self.options, builder, self.target.device)
        inputs, outputs = graph.specs(model)
        record = replace(self.record, inputs=inputs, outputs=outputs)
        lengths = {} if builder is None else constant_lengths(record.profiles)
        if lengths:
            notes["fixed"] = {"lengths": lengths, "nodes": fix_lengths(model, lengths)}
        graph.save(model, folder / GRAPH)
        notes["weight_bytes"] = (folder / f"{GRAPH}.data").stat().st_size
        names = [GRAPH, f"{GRAPH}.data"]
        if builder is not None:
            if "lowered" in notes:
                library = f"{builder.lib.backend} {builder.lib.version}"
                report(f"{name}: written in operators that {library} knows: {', '.join(notes['lowered'])}")
            report(f"{name}: building, {self.options['precision']}, {'; '.join(map(str, record.profiles))}")
            types = types_of(model)
            notes["layers"] = builder.build(
                folder / GRAPH, folder / PLAN, inputs, record.profiles, types, half_products(model)
            )
            for file in names:
                (folder / file).unlink()
            names = [PLAN]
            notes |= self._checked(builder, folder / PLAN, record, types, notes["weight_bytes"], report)
        else:
            report(f"{name}: {self.target.uses(self.options['precision'])}")
        write_record(folder, replace(record, notes=notes), names)
        report(f"{name}: {bytes_text(sum((folder / file).stat().st_size for file in names))}")

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
        name, precision, notes = self.part.name, self.options["precision"], dict[str, Any]()
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
        if not builder.strongly_typed:  # here the library may have chosen other types
            notes["islands_shown"] = refuse_lost_islands(name, layers, types)
        with self._opened(builder, plan, record) as engine:
            notes["agreement"] = check_rows(name, engine, record.profiles, precision).to_json()
        return notes

    def _why_not_run(self, error: str) -> str:
        """Why a finished engine does not run on this machine's GPU, followed by the library's words."""
        gpu = self.target.gpu
        if gpu is not None and "driver version is insufficient" in error:
            cuda = f"{gpu.driver // 1000}.{gpu.driver % 1000 // 10}"
            return (
                f"this machine's NVIDIA driver (CUDA {cuda}) is older than the library needs; "
                f"install a newer one to run the engine here. It says: {error}"
            )
        return f"it does not run on this GPU: {error}"

    def _layers(self, builder: Builder, plan: Path) -> str:
        """The plan's layers, as the library's inspector tells in JSON."""
        device = shared_device(self.target.index)
        with device.queueing():
            lib = builder.lib
            return lib.load(lib.runtime(), plan.read_bytes(), self.part.name).layers()

    def _opened(self, builder: Builder, plan: Path, record: Record) -> Any:
        """The plan as an engine on the GPU."""
        from sdopt.engine.trt import TrtEngine

        return TrtEngine(
            builder.lib,
            shared_device(self.target.index),
            [Unsigned(plan.parent, record.at(self.bundle.path))],
            cache=False,
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
    """What an engine was asked to be and where it runs, whatever it was made from."""
    where = (record.environment.get("GPU"), record.environment.get("provider"))
    return (record.component, record.options, record.asked, *where)
