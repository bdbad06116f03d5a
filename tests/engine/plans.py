"""Engines for the fake TensorRT: real derived graphs under real, signed records."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from sdopt import graph
from sdopt.build.derive import derive
from sdopt.build.options import Options, part_options
from sdopt.build.plan import Job
from sdopt.build.recipe import part_profile, read_recipe, user_profiles
from sdopt.build.target import Target
from sdopt.bundle import Bundle, new_folder
from sdopt.engine.cuda import Gpu
from sdopt.engine.plans import PLAN, write_record
from tests.engine.fake_gpu import fake_plan

PARTS = ("unet_step", "unet", "text_encoder", "vae_decoder", "vae_encoder")
FAKE = Gpu(0, "Fake GPU", "9.0", 13000, 1 << 30)


class FakeTarget(Target):
    """What the fake TensorRT of `fake_gpu` says of itself, whichever version it plays."""

    def environment(self, options: object) -> dict[str, str]:
        return {"GPU": FAKE.name, "driver": "CUDA 13", "compute capability": "9.0", "tensorrt": "fake"}


def stock(source: Path, target: Path, profiles: Sequence[str], parts: Sequence[str] = PARTS) -> Path:
    """A copy of the bundle at `source` with engines of `parts`, float32, for `fake_tensorrt`."""
    shutil.copytree(source, target)
    bundle, recipe = Bundle.open(target, verify=False), read_recipe()
    ranges = user_profiles(bundle, recipe, profiles, static=False)
    for name in parts:
        part = recipe.parts[name]
        options = part_options(Options(precision="fp32"), part, bundle)
        job = Job(bundle, part, FakeTarget("tensorrt", None, FAKE, None), options, ranges, "sdopt build BUNDLE")
        model, _ = derive(bundle, part, options)
        inputs, outputs = graph.specs(model)
        shapes = [part_profile(bundle, part, inputs, r) for r in ranges]
        graphs = target.parent / f"{target.name}-graphs"
        graphs.mkdir(exist_ok=True)
        graph.save(model, graphs / f"{name}.onnx")
        with new_folder(job.folder) as folder:
            plan = [{s.name: [p.shape(s, i) for i in range(3)] for s in inputs} for p in shapes]
            (folder / PLAN).write_bytes(fake_plan(graphs / f"{name}.onnx", plan))
            record = job.record
            write_record(folder, type(record)(**{**vars(record), "inputs": inputs, "outputs": outputs}), [PLAN])
    return target
