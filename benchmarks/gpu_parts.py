"""One part of `gpu.py` in a process of its own: `python benchmarks/gpu_parts.py OPTIONS.json -o RESULT.json`.

Every number is a raw timing in seconds, a size in bytes or a likeness in dB. A part that cannot run ends with a
sentence on stderr and exit code 3, or 4 where its environment lacks a library. Parts share what they build in the
folder `work`, a bundle for each way of building.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).parent))

import numpy as np
from gpu_tools import (
    EMOJI,
    MISSING,
    ROOT,
    MissingError,
    Options,
    Result,
    Watch,
    against_reference,
    measured,
    need,
    prepared,
    random_inputs,
    save,
    timings,
)  # fmt: skip

from sdopt import metrics as likeness
from sdopt.bench import machine
from sdopt.bench.built import Clock
from sdopt.bench.sides import Inputs, SdoptSide, latents_of
from sdopt.bundle.files import Bundle
from sdopt.bundle.specs import Array
from sdopt.bundle.write import new_folder
from sdopt.engine import BACKENDS, describe, installed_backends, open_engine
from sdopt.engine.cores import usable_cores
from sdopt.engine.device import shared_device
from sdopt.engine.store import stored
from sdopt.errors import BackendError, SdoptError

CAPTURABLE = "sdopt.engine.trt_api.Context.capturable"
LOG_LINES = 40


def facts(o: Options) -> Result:
    """The machine, the GPU as its driver and as CUDA tell it, and every library that is installed."""
    found: Result = {"machine": machine.machine(), "nvidia_smi": machine.gpu(), "versions": machine.versions()}
    found["backends"] = {name: _attempt(lambda name=name: describe(name)) for name in installed_backends()}
    found["cuda"] = _attempt(_gpu)
    return {**found, "device": found["cuda"]["name"] if isinstance(found["cuda"], dict) else "none"}


def _attempt(call: Callable[[], Any]) -> Any:
    """What a call gives, or the words of its fault."""
    try:
        return call()
    except Exception as error:  # a library's own: what is wrong is the answer
        return f"{type(error).__name__}: {error}"


def _gpu() -> Result:
    cuda = shared_device().cuda
    free, total = cuda.memory()
    return {**vars(cuda.gpu), "free_bytes": free, "total_bytes": total}


def weights(o: Options) -> Result:
    """The model's bundle with random weights from its skeleton, where there is no exported one."""
    import skeleton

    made = not (o.models / o.case.model / "bundle").is_dir() and not o.filled.is_dir()
    if made:
        skeleton.fill(o.skeletons / o.case.model, o.filled)
    return {"bundle": "filled" if made else "there", "weights": o.weights, "digest": Bundle.open(o.source).digest}


def build(o: Options) -> Result:
    """`sdopt build` as a user runs it: its seconds, what it said and when, and what it made."""
    folder = prepared(o)
    words = [sys.executable, "-m", "sdopt", "build", str(folder), "--backend", o.library]
    words += ["--precision", o.case.precision, "--profile", o.profile, *(["--static"] if o.static else [])]
    words += [word for name in o.components for word in ("--component", name)]
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    started, log = time.perf_counter(), list[str]()
    process = subprocess.Popen(
        words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, errors="replace",
        env={**os.environ, "PYTHONPATH": path},
    )  # fmt: skip
    assert process.stderr
    for line in process.stderr:
        log.append(f"{time.perf_counter() - started:7.1f} s  {line.rstrip()}")
        print(log[-1], file=sys.stderr, flush=True)  # it is kept also when this part is stopped
    if process.wait():
        raise BackendError(f"sdopt build ended with {process.returncode}")
    return {
        "seconds": {"build": [time.perf_counter() - started]},
        "log": log[-LOG_LINES:],
        "engines": _engines(folder, o.library),
        "weights": o.weights,
    }


def _engines(folder: Path, library: str) -> Result:
    """Every engine of a bundle: its size, and what was noted when it was built."""
    records = [entry.record for entry in stored(Bundle.open(folder, verify=False), library)]
    return {
        record.component: {
            "bytes": sum(file.bytes for file in record.files.values()),
            "precision": record.options["precision"],
            "profiles": [str(profile) for profile in record.profiles],
            "environment": dict(record.environment),
            "notes": dict(record.notes),
        }
        for record in records
    }


def step(o: Options) -> Result:
    """The fused step: the GPU's time and the host's, launch by launch, on embeddings from a generator."""
    with measured(o) as m:
        given = random_inputs(m.side.bundle, o.case)
        m.time({"step": m.side.calls(given)["step"]}, o.rounds)
        m.loops(given, o.rounds)
    return m.found


def picture(o: Options) -> Result:
    """Prompt to picture with every component, and its likeness to the reference."""
    with measured(o) as m:
        given = Inputs(latents_of(o.case, m.side.bundle), {})
        calls = m.side.calls(given)
        m.time({name: calls[name] for name in ("text_encoder", "step", "vae_decoder", "picture")}, o.rounds)
        m.loops(given, o.rounds)
        made = calls["picture"]().output
    assert made is not None
    save(o.output / f"{o.part}.png", made)
    return {**m.found, **against_reference(o, made)}


def replay(o: Options) -> Result:
    """The same loop with each launch as one CUDA graph, and launched plainly: times, and whether pictures are equal."""
    found: Result = {}
    made: list[Array] = []
    for name in ("graph", "plain"):
        plainly = mock.patch(CAPTURABLE, return_value=False) if name == "plain" else mock.MagicMock()
        with plainly, measured(o) as m:
            given = Inputs(latents_of(o.case, m.side.bundle), {})
            output = m.side.calls(given)["picture"]().output
            assert output is not None
            made.append(output)
            m.loops(given, o.rounds)
        found[name] = m.found
    return {"device": m.found["device"], "bit_for_bit": bool(np.array_equal(*made)), **found}


def parity(o: Options) -> Result:
    """The first step, and a picture of two steps, beside ONNX Runtime in float32 on the processor."""
    need("onnxruntime")
    short = replace(o, case=replace(o.case, steps=2))
    with measured(short) as m:
        given = random_inputs(m.side.bundle, short.case)
        made = m.side.calls(given)["step"]().output
        first = m.side.first_inputs(given)
        with open_engine(Bundle.open(o.source), "unet", "ort:cpu") as unet:
            shared = {spec.name for spec in unet.inputs if spec.shape[0] == "images"}
            arrays = {name: a[: o.case.batch] if name in shared else a for name, a in first.unet.items()}
            expected = m.side.guided(unet(**arrays)["noise_pred"], given)
        assert made is not None
        m.found["unet_db"] = likeness.psnr(expected, made)
        made = m.side.calls(Inputs(given.latents, {}))["picture"]().output
    return {**m.found, **against_reference(short, made)}


def vae(o: Options) -> Result:
    """The decoder alone in one precision: built, timed, and beside ONNX Runtime where that is installed."""
    found = {"build": build(replace(o, components=("vae_decoder",)))}
    bundle = Bundle.open(o.engines)
    latents = latents_of(o.case, bundle)
    with Watch() as watch, open_engine(bundle, "vae_decoder", o.case.backend) as engine:
        clock = Clock(getattr(engine, "device", None))
        call = clock.timed(lambda: engine(latent_sample=latents)["sample"])
        found |= {"seconds": timings({"vae_decoder": call}, o.rounds, watch.stop)}
        made = call().output
    found |= {"device": watch.device, "weights": o.weights, "peak_device_bytes": watch.peak}
    if importlib.util.find_spec("onnxruntime") and made is not None:
        with open_engine(bundle, "vae_decoder", "ort:cpu") as exact:
            found["vae_db"] = likeness.psnr(exact(latent_sample=latents)["sample"], made)
    return found


def ort(o: Options) -> Result:
    """ONNX Runtime on the bundle's own graphs."""
    side = SdoptSide(o.case, o.source, usable_cores())
    found: Result = {"device": (machine.gpu() or {}).get("name", o.case.backend), "weights": o.weights}
    try:
        calls = side.calls(random_inputs(side.bundle, o.case))
        made, found["peak_device_bytes"] = machine.with_peak_device_bytes(lambda: calls["picture"]().output)
        found["seconds"] = timings({name: calls[name] for name in ("unet", "vae_decoder", "picture")}, o.rounds)
    finally:
        side.close()
    return {**found, **against_reference(o, made)}


def torch(o: Options) -> Result:
    """diffusers on PyTorch, in one way of running it, with torch's own switches."""
    need("torch", "diffusers")
    from sdopt.bench.baseline import DiffusersSide, find_device, versions

    device = find_device("cpu" if o.case.backend == "ort:cpu" else "cuda")
    checkpoint = _checkpoint(o)
    started = time.perf_counter()
    side = DiffusersSide(o.baselines[0], o.case, checkpoint, usable_cores(), device)
    found: Result = {"load_seconds": time.perf_counter() - started, "note": side.note, "versions": versions()}
    try:
        latents = latents_of(o.case, Bundle.open(EMOJI / "bundle", verify=False))  # 4 channels, an eighth of the size
        calls = side.calls(side.inputs(latents))
        found["seconds"] = timings({name: calls[name] for name in ("unet", "vae_decoder", "picture")}, o.rounds)
    finally:
        side.close()
    if device == "cuda":
        cuda: Any = importlib.import_module("torch").cuda
        found |= {"device": cuda.get_device_name(), "peak_device_bytes": cuda.max_memory_allocated()}
    return {"device": device, **found, "weights": o.weights}


def _checkpoint(o: Options) -> Path:
    """The model's checkpoint: the emoji's, one that was made, or one with random weights that is made now."""
    made = EMOJI / "checkpoint" if o.case.model == "emoji" else o.models / o.case.model / "checkpoint"
    target = o.work / f"{o.case.model}-checkpoint"
    if made.is_dir() or target.is_dir():
        return made if made.is_dir() else target
    import models

    with new_folder(target) as folder:
        models.build(o.case.model, folder)
    return target


def beside(o: Options) -> Result:
    """A record of `sdopt bench`: all sides in one process, in turns, with the parity of what was timed."""
    need("torch", "diffusers", BACKENDS[o.library].library)
    import models

    from sdopt.bench import record
    from sdopt.bench.baseline import find_device
    from sdopt.bench.harness import Setup, new_record, run_case

    on_cpu = o.case.backend == "ort:cpu"
    device = find_device("cpu" if on_cpu else "cuda")
    emoji = (EMOJI / "checkpoint", EMOJI / "bundle")
    checkpoint, bundle = emoji if o.case.model == "emoji" else models.prepared(o.case.model, o.models)
    bundle = bundle if on_cpu else prepared(o)
    setup = Setup(bundle, checkpoint, usable_cores(), o.baselines, rounds=o.rounds, cold_rounds=0, device=device)
    found = run_case(o.case, setup, lambda line: print(line, file=sys.stderr, flush=True))
    path = o.output / f"record-{o.part}.json"
    record.write(path, new_record("python benchmarks/gpu.py", [found]))
    return {"device": device, "record": path.name, "parity": {s["name"]: s["parity"] for s in found["sides"]}}


DOES: Mapping[str, Callable[[Options], Result]] = {
    "facts": facts, "weights": weights, "build": build, "step": step, "picture": picture, "replay": replay,
    "parity": parity, "vae": vae, "ort": ort, "torch": torch, "beside": beside,
}  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("options", type=Path)
    parser.add_argument("-o", "--output", type=Path, required=True)
    args = parser.parse_args(argv)
    options = Options.read(args.options)
    try:
        result = DOES[options.does](options)
    except MissingError as error:
        print(error, file=sys.stderr)
        return MISSING
    except SdoptError as error:
        print(error, file=sys.stderr)
        return 3
    args.output.write_text(json.dumps(result, default=str))
    return 0


if __name__ == "__main__":
    sys.exit(main())
