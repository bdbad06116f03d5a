"""Is the fake GPU strict? Takes one safeguard of the GPU code away at a time, and expects a test to fail for each.

    python -m tests.engine.mutants            all of them, each in a copy of the project of its own; some minutes
    python -m tests.engine.mutants arena      those whose name has the word
    python -m tests.engine.mutants --list

Exit code 0 if every mutant fails a test. `test_mutants.py` proves in each run of the tests that every mutant can still
be made: that its line stands in the source, once.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
TESTS = tuple(f"tests/engine/test_{name}.py" for name in ("trt", "trt_memory", "cuda", "trt_faults"))
COPIED = ("sdopt", "tests", "engines", "pyproject.toml")


@dataclass(frozen=True)
class Mutant:
    """A change of one file that must not go unnoticed."""

    name: str
    file: str
    old: str
    new: str

    def source(self, root: Path) -> str:
        """The changed file's text.

        Raises: ValueError unless the text to be changed stands there once.
        """
        text = (root / "sdopt/engine" / self.file).read_text(encoding="utf-8")
        if text.count(self.old) != 1:
            raise ValueError(f"mutant {self.name!r}: its text stands {text.count(self.old)} times in {self.file}")
        return text.replace(self.old, self.new)


MUTANTS = (
    # capture
    Mutant("no warm-up before the capture", "bound_context.py", "elif not self._graph", "if not self._graph"),
    Mutant("no scratch memory", "bound_context.py", "self.context.scratch(*self.device.arena(self._scratch))", "self.device.arena(self._scratch)"),
    Mutant("too little scratch memory", "bound_context.py", "self.device.arena(self._scratch))", "self.device.arena(self._scratch // 2))"),
    Mutant("the arena's move goes unnoticed", "bound_context.py", "if self._epoch != self.device.epoch or", "if self._epoch < 0 or"),
    Mutant("a graph forgets what it gives on", "bound_context.py", " or self.feeds != self._graph_feeds:", ":"),
    Mutant("nothing is given on", "bound_context.py", "self.device.cuda.copy(feed.target, feed.source, feed.nbytes, self.device.stream)", "pass"),
    Mutant("the old graph is kept", "bound_context.py", "        self._drop_graph()\n        self.context.scratch", "        self.context.scratch"),
    Mutant("no collection rests during a capture", "device.py", "gc.disable()", "pass"),
    Mutant("a refused capture leaves the stream in it", "cuda.py", "status, *graph = self._rt.cudaStreamEndCapture(handle)  # the stream", "status = 1  # the stream"),
    Mutant("what an interrupt left of a capture is leaked", "cuda.py", "                self._rt.cudaGraphDestroy(*graph)", "                pass"),
    Mutant("a graph that fails late is leaked", "cuda.py", "            self.drop(kept)\n            raise", "            raise"),
    Mutant("a graph is leaked", "bound_context.py", "            self.device.cuda.drop(self._graph)", "            pass"),
    Mutant("that there is no graph is not told", "bound_context.py", "        log.warning(", "        log.debug("),
    # order
    Mutant("no settling before an input is written again", "trt.py", "        self._context.settle()\n", ""),
    Mutant("settling waits for nothing", "bound_context.py", "self.device.wait(self.uploaded)", "pass"),
    Mutant("an upload is not recorded", "bound_context.py", "self.device.cuda.record(self.uploaded, self.device.stream)", "pass"),
    Mutant("a download is not recorded", "bound_context.py", "self.device.cuda.record(self.done, self.device.stream)", "pass"),
    Mutant("a call does not wait", "trt.py", "            self.device.wait(context.done)\n", ""),
    Mutant("a fetch does not wait", "trt.py", "        self._device.wait(self._context.done)\n", ""),
    Mutant("streamed inputs share a place", "bound_context.py", "memory.upload(slot * k,", "memory.upload(0 * k,"),
    Mutant("the context closes while work is queued", "bound_context.py", "self.closed = True\n        self.device.cuda.synchronize(self.device.stream)", "self.closed = True"),
    Mutant("memory moves while work is queued", "bound_context.py", "            self.device.cuda.synchronize(self.device.stream)\n            self.free()", "            self.free()"),
    Mutant("the arena moves while work is queued", "device.py", "            self.cuda.synchronize(self.stream)\n            self._drop_arena()\n            self._arena =", "            self._drop_arena()\n            self._arena ="),
    Mutant("the arena goes while work is queued", "device.py", "        self.cuda.synchronize(self.stream)\n        self._drop_arena()\n\n    def free", "        self._drop_arena()\n\n    def free"),
    Mutant("the wrong stream", "bound_context.py", "self.context.enqueue(self.device.stream)", "self.context.enqueue(0)"),
    # the step
    Mutant("rows stay where they are", "bound_context.py", "self.tables.address + offset + k * nbytes", "self.tables.address + offset"),
    Mutant("a call takes the rows of the run before it", "trt.py", "                context.launch()\n", "                context.launch(0)\n"),
    Mutant("a slot is filled again while the GPU is behind", "bound_context.py", "if (name, k) in self._filled:", "if False:"),
    Mutant("an input of another size passes", "bound_context.py", "if array.shape != place.shape:", "if False:"),
    Mutant("nothing is carried", "bound_context.py", "for output, name in self._carry.items():", "for output, name in ():"),
    Mutant("a run begins with what the last one left", "trt.py", "                context.clear()\n", ""),
    Mutant("a profile is chosen after the shapes", "trt_api.py", "        done = self.context.set_optimization_profile_async(profile, stream)\n        for name, shape in shapes.items():\n            done = done and self.context.set_input_shape(name, shape)\n", "        done = True\n        for name, shape in shapes.items():\n            done = done and self.context.set_input_shape(name, shape)\n        done = done and self.context.set_optimization_profile_async(profile, stream)\n"),
    Mutant("no size of scratch memory passes", "trt_api.py", "if not needed and most:", "if False:"),
    Mutant("the library's words are lost", "trt_api.py", "It says: {self.log.errors()}", "It says nothing"),
    # memory
    Mutant("pinned memory is leaked", "bound_context.py", "            self.device.cuda.unpin(self.staging)\n", ""),
    Mutant("an event is leaked", "bound_context.py", "in (self.uploaded, self.done):", "in (self.uploaded,):"),
    Mutant("a closed context stays alive", "bound_context.py", "        del self.context\n", "        self._kept = [self.context, self]\n        self.device.kept = self._kept\n"),
    Mutant("a dropped engine is not freed", "trt.py", "weakref.finalize(self, _discard, device, self._loaded)", "None"),
    Mutant("an engine that is dropped while another queues is freed there", "device.py", "if not self._depth and self._lost is None:", "if self._lost is None:\n                self._free_discarded()"),
    Mutant("what was discarded stays", "device.py", "            self._discarded.popleft().close()", "            self._discarded.popleft()"),
    Mutant("idle contexts are kept when memory is short", "device.py", "            holder.trim()", "            pass"),
    Mutant("plans for other sizes are kept when memory is short", "trt.py", "                    self._loaded.pop(other).close()", "                    pass"),
    Mutant("the arena outlives the engines", "device.py", "        if not self._holders:\n            self._drop_arena()", "        pass"),
    Mutant("idle contexts pile up", "loaded.py", "MAX_IDLE = 4", "MAX_IDLE = 400"),
    Mutant("the newest plan is taken, whatever its profile", "trt.py", "        plan, index = min(choices, key=rank)", "        plan, index = choices[0]"),
    Mutant("weights are not streamed", "trt_api.py", "engine.weight_streaming_budget = -1", "engine.weight_streaming_budget = 0"),
    Mutant("streamed weights have no budget", "loaded.py", "            lib.stream_weights(self._plan)", "            pass"),
    # the process
    Mutant("the current GPU is not given back", "cuda.py", "            self._rt.cudaSetDevice(before)", "            pass"),
    Mutant("the GPU is not made current", "cuda.py", '        self._do("cudaSetDevice", self._index)\n        try:', "        try:"),
    Mutant("a wait keeps a core busy", "cuda.py", "self._rt.cudaEventDisableTiming | self._rt.cudaEventBlockingSync", "self._rt.cudaEventDisableTiming"),
    Mutant("a lost context is touched again", "device.py", "            if self._lost is not None:\n                raise LostContextError(str(self._lost))\n            self._depth", "            self._depth"),
    # TensorRT-RTX
    Mutant("kernels are compiled late", "trt_api.py", "strategies.EAGER", "strategies.LAZY"),
    Mutant("compiled kernels are not kept", "loaded.py", "        self._compiled.keep()\n", ""),
    Mutant("compiled kernels are not found", "loaded.py", "            self._cache.deserialize(self._kept)", "            pass"),
)  # fmt: skip


def survives(mutant: Mutant, folder: Path) -> bool:
    """Whether all tests pass in a copy of the project, in `folder`, that has the mutant."""
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            ignored = shutil.ignore_patterns("__pycache__", "checkpoint")
            shutil.copytree(source, folder / name, ignore=ignored, dirs_exist_ok=True)
        else:
            shutil.copy(source, folder)
    (folder / "sdopt/engine" / mutant.file).write_text(mutant.source(ROOT), encoding="utf-8")
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *TESTS]
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
    try:
        done = subprocess.run(
            command, cwd=folder, capture_output=True, text=True, env=environment, timeout=600, check=False
        )
    except subprocess.TimeoutExpired:
        return False
    if done.returncode not in (0, 1):  # 1: a test failed; everything else is no verdict
        raise RuntimeError(f"{mutant.name}: the tests did not run:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    failed = next((line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))), "")
    print(f"{'SURVIVES' if done.returncode == 0 else 'fails   '}  {mutant.name}   {failed[:140]}", flush=True)
    return done.returncode == 0


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("word", nargs="?", default="", help="only mutants whose name has it")
    parser.add_argument("--list", action="store_true", help="print their names")
    args = parser.parse_args(argv)
    chosen = [mutant for mutant in MUTANTS if args.word in mutant.name]
    if args.list:
        print("\n".join(f"{mutant.file:<18}{mutant.name}" for mutant in chosen))
        return 0
    with tempfile.TemporaryDirectory(prefix="sdopt-mutants-") as folder:
        alive = [mutant.name for mutant in chosen if survives(mutant, Path(folder))]
    print(f"{len(chosen) - len(alive)} of {len(chosen)} mutants fail a test", *alive, sep="\n")
    return 1 if alive or not chosen else 0


if __name__ == "__main__":
    sys.exit(main())
