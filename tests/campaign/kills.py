"""Processes that are killed while they write: at a random moment, or before a random change of a file.

Afterwards nothing that is half-written has a real name; the next start gives the right result, and leaves in the
folder what an undisturbed one leaves, and nothing else.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import sdopt
from sdopt.errors import SdoptError
from tests.campaign.cases import DONE, HALF, LEFT, OTHER, Case, Outcome
from tests.campaign.sandbox import Sandbox, own_environment
from tests.campaign.victim import Ended, Victims

ROOT = Path(__file__).parents[2]
Files = dict[str, str]  # the name of each file -> the hash of its content


@dataclass(frozen=True)
class Scenario:
    """A command, what has to be there first, and whether its result, if it has a real name, is complete."""

    words: Callable[[Path], list[str]]
    prepare: Callable[[Path, Sandbox], None]
    check: Callable[[Path], str]


@dataclass(frozen=True)
class Right:
    """What an undisturbed run leaves, how long it takes, and how often it changes a file."""

    files: Files
    seconds: float
    changes: int


def run(case: Case, sandbox: Sandbox) -> Outcome:
    rng = case.random()
    name = NAMES[case.number % len(NAMES)]
    scenario, desk = SCENARIOS[name], sandbox.folder / "desk-of-kills" / name
    if name not in _right:
        _right[name] = _undisturbed(scenario, desk, sandbox)
    right = _right[name]
    _fresh(scenario, desk, sandbox)
    what = f"{name}: {_killed(rng, scenario, desk, right)}"
    half = scenario.check(desk)
    if half:
        return Outcome(HALF, what, half)
    after = _finished(scenario, desk)
    if after.code:
        return Outcome(LEFT, what, f"the next start ends with {after.code}: {after.log[-1000:]}")
    half = scenario.check(desk)
    if half:
        return Outcome(HALF, f"{what}; after the next start", half)
    return _compared(what, right.files, _files(desk))


_right: dict[str, Right] = {}


def _compared(what: str, right: Files, files: Files) -> Outcome:
    left = sorted(set(files) - set(right))
    lost = sorted(set(right) - set(files))
    other = sorted(name for name in files if files[name] != right.get(name, files[name]))
    if left or lost:
        return Outcome(LEFT, what, f"left behind {left[:5]}, lost {lost[:5]}")
    return Outcome(OTHER, what, f"{other[:5]}") if other else Outcome(DONE, what)


def _undisturbed(scenario: Scenario, desk: Path, sandbox: Sandbox) -> Right:
    _fresh(scenario, desk, sandbox)
    began = time.monotonic()
    done = _finished(scenario, desk)
    seconds = time.monotonic() - began
    if done.code or scenario.check(desk):
        raise RuntimeError(f"an undisturbed command ends with {done.code}: {scenario.check(desk)} {done.log[-2000:]}")
    return Right(_files(desk), seconds, done.changes)


def _fresh(scenario: Scenario, desk: Path, sandbox: Sandbox) -> None:
    shutil.rmtree(desk, ignore_errors=True)
    desk.mkdir(parents=True)
    scenario.prepare(desk, sandbox)


def _victims(desk: Path) -> Victims:
    """The process that starts commands: one for this process."""
    if not _started:
        _started.append(Victims(own_environment(desk)))
    return _started[0]


_started: list[Victims] = []


def _killed(rng: random.Random, scenario: Scenario, desk: Path, right: Right) -> str:
    """Start the command and kill it; how."""
    last = rng.randint(1, right.changes) if rng.random() < 0.6 and right.changes else 0
    seconds = rng.uniform(0.05, 1.0) * right.seconds
    victims = _victims(desk)
    process = victims.start(desk, scenario.words(desk), own_environment(desk), last)
    if last:
        victims.ended()
        return f"killed before change {last} of {right.changes}"
    time.sleep(seconds)
    with contextlib.suppress(ProcessLookupError):  # it has ended already
        os.kill(process, signal.SIGKILL)
    victims.ended()
    return f"killed after {seconds:.2f} s of {right.seconds:.2f} s"


def _finished(scenario: Scenario, desk: Path) -> Ended:
    """The next start of the same command."""
    victims = _victims(desk)
    victims.start(desk, scenario.words(desk), own_environment(desk))
    return victims.ended()


def _files(desk: Path) -> Files:
    """Every file, with its hash where its content does not depend on the moment; stamps come with age."""
    found: Files = {}
    for path in sorted(path for path in desk.rglob("*") if path.is_file()):
        name = path.relative_to(desk).as_posix()
        is_stamp = "/stamps/" in name and not path.name.startswith(".")
        if not is_stamp:
            own = "/loaded/" in name or name.endswith(("record.json", "engine-key", "manifest.json"))
            found[name] = "" if own else hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def _whole_picture(desk: Path) -> str:
    from PIL import Image

    path = desk / "out.png"
    if path.exists():
        try:
            with Image.open(path) as image:
                image.load()
        except (OSError, SyntaxError) as error:
            return str(error)
    return ""


def _whole_engines(desk: Path) -> str:
    from sdopt.engine.store import RECORD

    for folder in (desk / "bundle/engines").glob("[!.]*"):
        if not (folder / RECORD).is_file():
            return f"{folder.name} has no record"
    return ""


def _whole_bundle(desk: Path) -> str:
    if (desk / "bundle").exists():
        try:
            sdopt.Bundle.open(desk / "bundle", paranoid=True)
        except SdoptError as error:
            return str(error)
    return ""


def _empty(desk: Path, sandbox: Sandbox) -> None:
    """Nothing has to be there."""


def _copy_bundle(desk: Path, sandbox: Sandbox) -> None:
    shutil.copytree(sandbox.bundles["emoji"], desk / "bundle")


def _copy_checkpoint(desk: Path, sandbox: Sandbox) -> None:
    assert sandbox.kept is not None
    shutil.copytree(sandbox.kept / "tiny-checkpoint", desk / "checkpoint")


def _old_picture(desk: Path, sandbox: Sandbox) -> None:
    """The cache is filled, and a picture is there that is replaced.

    The cache is one for all cases: that of the worker, which other cases fill, is copied once.
    """
    kept = sandbox.folder / "cache-of-kills"
    if not kept.is_dir():
        shutil.copytree(sandbox.folder / "cache", kept)
    shutil.copytree(kept, desk / "cache")
    shutil.copy(ROOT / "engines/emoji/bundle/manifest.json", desk / "note.txt")


def _generate(desk: Path) -> list[str]:
    picture = ["-o", str(desk / "out.png"), "--seed", "1", "--steps", "1", "--size", "32x32", "--threads", "1"]
    return ["generate", "a red apple", *picture]


SCENARIOS = {
    "first start": Scenario(_generate, _empty, _whole_picture),
    "generate": Scenario(_generate, _old_picture, _whole_picture),
    "build": Scenario(
        lambda desk: ["build", str(desk / "bundle"), "--backend", "ort", "--component", "vae_decoder"],
        _copy_bundle,
        _whole_engines,
    ),
    "export": Scenario(
        lambda desk: ["export", str(desk / "checkpoint"), "-o", str(desk / "bundle"), "--force"],
        _copy_checkpoint,
        _whole_bundle,
    ),
}
NAMES = ("first start", "generate", "build", "first start", "build", "generate", "first start", "build", "export")
