"""Engines for the fake TensorRT: real derived graphs under real, signed records."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from sdopt import graph
from sdopt.build.derive import derive
from sdopt.build.job import Job
from sdopt.build.options import BuildOptions, part_options
from sdopt.build.recipe import part_profile, read_recipe, user_profiles
from sdopt.build.target import Target
from sdopt.bundle.files import Bundle
from sdopt.bundle.write import new_folder
from sdopt.engine.cuda import Gpu
from sdopt.engine.store import PLAN, write_record
from tests.fakes.trt import fake_plan

PARTS = ("unet_step", "unet", "text_encoder", "vae_decoder", "vae_encoder")
FAKE = Gpu(0, "Fake GPU", "9.0", 13000, 1 << 30)


class FakeTarget(Target):
    """What the fake library of `tests.fakes.trt` says of itself, whichever version it plays."""

    def environment(self, options: object) -> dict[str, str]:
        if self.backend == "tensorrt-rtx":
            return {"tensorrt_rtx": "fake", "compute capability": "80 90 120"}
        return {"GPU": FAKE.name, "driver": "CUDA 13", "compute capability": "9.0", "tensorrt": "fake"}


def stock(
    source: Path,
    target: Path,
    profiles: Sequence[str],
    parts: Sequence[str] = PARTS,
    backend: str = "tensorrt",
    **more: object,
) -> Path:
    """A copy of the bundle at `source`, or the bundle at `target` as it is, with float32 engines of `parts`.

    They are for `fake_tensorrt`: one plan of all `profiles`. `more`: further options of the build.
    """
    if not target.exists():
        shutil.copytree(source, target)
    bundle, recipe = Bundle.open(target, verify=False), read_recipe()
    ranges = user_profiles(bundle, recipe, profiles, static=False)
    for name in parts:
        part = recipe.parts[name]
        options = {**part_options(BuildOptions(precision="fp32"), part, bundle), **more}
        job = Job(bundle, part, FakeTarget(backend, None, FAKE, None), options, ranges, "sdopt build BUNDLE")
        model, _ = derive(bundle, part, options)
        inputs, outputs = graph.specs(model)
        shapes = tuple(part_profile(bundle, part, inputs, r) for r in ranges)
        graphs = target.parent / f"{target.name}-graphs"
        graphs.mkdir(exist_ok=True)
        if not (graphs / f"{name}.onnx").exists():
            graph.save(model, graphs / f"{name}.onnx")
        weights = (graphs / f"{name}.onnx.data").stat().st_size
        with new_folder(job.folder) as folder:
            plan = [{s.name: [p.shape(s, i) for i in range(3)] for s in inputs} for p in shapes]
            streams = bool(options["weight_streaming"])
            made = fake_plan(graphs / f"{name}.onnx", plan, weights=weights, sharing=True, streams=streams)
            (folder / PLAN).write_bytes(made)
            write_record(folder, replace(job.record, inputs=inputs, outputs=outputs, profiles=shapes), [PLAN])
    return target
