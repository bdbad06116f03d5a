"""`sdopt tune`: the settings of a bundle that are worth their time on this machine.

space    what is tried: engines and keywords              tune_space
search   who makes more pictures: successive halving      tune_search
run      pictures in turns, their time and fidelity       tune_run
record   all measurements, taken up again                 tune_record
choose   presets, table, plot                             tune_choose
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import field

from sdopt.bench.machine import machine, versions
from sdopt.bench.tune_choose import Choice, presets
from sdopt.bench.tune_record import Board, Settings
from sdopt.bench.tune_run import Bench, Reference
from sdopt.bench.tune_search import Candidate, Point, search
from sdopt.bench.tune_space import Wanted, default_candidate, engines_here, refuse_unfit, space
from sdopt.bundle.files import Bundle
from sdopt.dataclass import dataclass
from sdopt.engine import choose_backend
from sdopt.errors import BackendError, UsageError

FIRST_RUNG = 0.4  # of the time; each rung after it, with half of the candidates, takes about half of that
Report = Callable[[str], None]


@dataclass(frozen=True)
class Setup:
    """What is measured. `prompts`: one for each picture, whose seed is its place. `seconds`: about how long.

    Raises: UsageError for no prompt, or numbers that are too small.
    """

    prompts: tuple[str, ...]
    reference: Reference
    threads: int
    wanted: Wanted = field(default_factory=Wanted)
    seconds: float = 600.0

    def __post_init__(self) -> None:
        if not self.prompts:
            raise UsageError("there is no prompt; give one or more", "prompts")
        if self.reference.steps < 2 or self.threads < 1 or not self.seconds > 0:
            raise UsageError("allowed are 2 or more steps of the reference, 1 or more threads, and a time above 0")


@dataclass(frozen=True)
class Outcome:
    """The points that were measured over all pictures, that of the bundle's defaults, and those that become presets."""

    points: tuple[Point, ...]
    default: Point
    presets: dict[str, Point]


def settings(bundle: Bundle, setup: Setup) -> Settings:
    """What must be the same for a record to be taken up again."""
    defaults, here, library = bundle.manifest.defaults, machine(), versions()
    return Settings(
        bundle.digest, setup.prompts, reference_text(setup.reference), defaults.width, defaults.height, setup.threads,
        f"{here['cpu']}, {here['cores']} cores", library["sdopt"],
    )  # fmt: skip


def reference_text(reference: Reference) -> str:
    """The reference in words."""
    return f"{reference.steps} steps of {reference.sampler or 'the default sampler'} in fp32"


def tune(
    bundle: Bundle,
    setup: Setup,
    choice: Choice,
    board: Board,
    report: Report = lambda line: None,
    moved: Callable[[], object] = lambda: None,
) -> Outcome:
    """Measure the bundle's settings and choose presets. `moved` is called after each picture.

    Raises: BackendError if no engine runs here, or if the bundle's defaults make no picture; UsageError as
    `Bench.exact` does.
    """
    engines = engines_here(bundle, setup.wanted)
    default = default_candidate(choose_backend("auto", "fp32", bundle))
    with Bench(bundle, setup.prompts, setup.reference, setup.threads, engines) as bench:
        candidates = _all(bench, engines, setup.wanted, default)
        bench.exact(0)  # a reference that there is not says so before the search
        report(f"{len(candidates)} candidates on {', '.join(f'{name} in {word}' for name, word in engines)}")

        def measure(left: Sequence[Candidate], picture: int, may_end: bool) -> None:
            if may_end:  # the defaults are measured whatever the time
                bench.measure([default], picture, board, moved=moved)
            bench.measure(left, picture, board, setup.seconds * FIRST_RUNG if may_end else None, moved)
            missing = sum(not board.has(one, picture) for one in left)
            failed = sum(board.has(one, picture) and not board.scores(one) for one in left)
            if missing:
                report(f"{missing} of {len(left)} were not tried in the time; --minutes gives more")
            if failed:
                report(f"{failed} of {len(left)} make no picture; the record says why")

        always = {default.key}
        points = search(candidates, len(setup.prompts), measure, board.scores, always, report)
    own = next((p for p in points if p.candidate.key == default.key), None)
    if own is None:
        raise BackendError(f"{default} makes no picture: {board.failure(default)}")
    return Outcome(tuple(points), own, presets(points, own, choice))


def _all(bench: Bench, engines: Sequence[tuple[str, str]], wanted: Wanted, default: Candidate) -> list[Candidate]:
    found = {default.key: default}
    refuse_unfit(bench.pipe(engines[0]), wanted)
    for engine in engines:
        found |= {one.key: one for one in space(bench.pipe(engine), engine, wanted)}
    return list(found.values())
