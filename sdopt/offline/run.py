"""One run over a list: what is there is kept, the rest is made, failures are reported and stop nothing else.

run = begin(lines, target)                      which pictures are there, and which lines are left
plan_all(pipe, run.left, source)                every wrong line is named before the first picture is made
with alone(target):                             no other run writes to this folder
    run.take(made(maker, run.left, ...))        pictures appear in the order in which they are done
                                                FOLDER/report.jsonl then has a line for each line of the list
"""

from __future__ import annotations

import json
import os
import queue
from collections import deque
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from sdopt.errors import SdoptError, UsageError, refuse_no_path
from sdopt.logs import logger
from sdopt.offline import folders
from sdopt.offline.folders import Folder
from sdopt.offline.lines import Line, checked, deciding, id_in, lines, read, refuse, written
from sdopt.offline.makers import SLOTS, Maker, OneProcess
from sdopt.offline.recipe import NAME
from sdopt.progress import bar
from sdopt.request.options import Options
from sdopt.serve.orders import FINAL, Event, Finished, Order

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from sdopt.pipeline import Pipeline

log = logger(__name__)
REPORT = "report.jsonl"
Status = Literal["made", "kept", "failed", "left"]


@dataclass(frozen=True)
class Outcome:
    """What became of one line. `seconds`: from its first step to its picture. `error`: why there is none."""

    id: str
    status: Status
    seconds: float = 0.0
    error: str = ""


@dataclass(eq=False)
class Run:
    """One run over a list.

    `left`: the lines whose picture is not there. `older`: by id, the names of pictures of the same ids whose lines were
    changed since; each is moved to FOLDER/older once its successor is there.
    """

    lines: Sequence[Line]
    folder: Folder
    left: list[Line]
    older: Mapping[str, Sequence[str]]
    outcomes: dict[str, Outcome] = field(default_factory=dict[str, Outcome])

    def add(self, outcome: Outcome) -> None:
        """Take in what became of a line."""
        self.outcomes[outcome.id] = outcome
        if outcome.status in ("made", "kept"):
            for name in self.older.get(outcome.id, ()):
                self.folder.set_aside(name)

    def count(self, status: Status) -> int:
        """How many lines have this status. Those that nothing became of are left."""
        own = sum(outcome.status == status for outcome in self.outcomes.values())
        return own + (len(self.lines) - len(self.outcomes) if status == "left" else 0)

    def take(self, outcomes: Iterable[Outcome], told: Callable[[Outcome], None] = lambda outcome: None) -> None:
        """Take in all outcomes, and write the report, also where an error or an interrupt ends them early."""
        for outcome in list(self.outcomes.values()):  # a run that was killed may have left older pictures beside these
            self.add(outcome)
        try:
            for outcome in outcomes:
                self.add(outcome)
                told(outcome)
        except BaseException:
            with suppress(OSError):  # the first error says why
                self.report()
            raise
        self.report()

    def report(self) -> None:
        """Write FOLDER/report.jsonl, which has a line for each line of the list, in its order. Raises: OSError."""
        names = self.folder.names()
        entries: list[str] = []
        for line in self.lines:
            if line.id not in self.outcomes and line.name in names:  # an interrupt came before this was counted
                self.outcomes[line.id] = Outcome(line.id, "made")
            outcome = self.outcomes.get(line.id, Outcome(line.id, "left"))
            has_picture = outcome.status in ("made", "kept")
            entry: dict[str, Any] = {"id": line.id, "line": line.place, "status": outcome.status}
            entry |= {"seed": line.options["seed"]}
            entry |= {"file": line.name} if has_picture else {}
            entry |= {"error": outcome.error} if outcome.error else {}
            entries.append(json.dumps(entry))
        self.folder.write(REPORT, "".join(f"{entry}\n" for entry in entries).encode())


def make(
    pipe: Pipeline,
    requests: str | os.PathLike[str] | Iterable[Mapping[str, Any]],
    folder: str | os.PathLike[str],
    *,
    slots: int = SLOTS,
    progress: bool | None = None,
    **defaults: Unpack[Options],
) -> Run:
    """Make the picture of each request in a folder, with this pipeline, and keep those that are there.

    `requests`: a list in a file, see `sdopt.offline.lines`, or such objects themselves. `slots`: pictures under way at
    once. `progress`: True shows a bar on stderr, None only on a terminal. `defaults`: keywords for requests without
    them. What became of each id is in `outcomes` of the run, and in FOLDER/report.jsonl.
    Raises: UsageError that names every wrong request, before the first picture is made; OSError where one cannot be
    written. The same call again makes what is left.
    """
    refuse_no_path("folder", folder)
    target = folders.folder(os.fspath(folder))
    folders.check(target)
    if isinstance(requests, (str, os.PathLike)):
        refuse_no_path("requests", requests)
        objects, source = listed(os.fspath(requests))
    else:
        objects, source = [(f"request {i}", one) for i, one in enumerate(requests)], folders.folder("")
    run = begin(lines(objects, checked(defaults), source, deciding(pipe)), target)
    plan_all(pipe, run.left, source)
    if not run.left:
        run.take(())
        return run
    with closing(OneProcess(pipe, slots)) as maker:
        folders.make(target)
        with folders.alone(target), bar("making", len(run.left), show=progress) as counted:
            run.take(made(maker, run.left, source, target), lambda outcome: counted.update())
    return run


def listed(text: str) -> tuple[list[tuple[str, Mapping[str, Any]]], Folder]:
    """The objects in a list, each with its place, and the folder that its pictures are relative to.

    Raises: UsageError for a list that cannot be read, or has wrong lines.
    """
    above, name = folders.parent(text)
    source = folders.folder(above)
    try:
        return read(source.read(name), text), source
    except (OSError, ValueError) as error:
        if isinstance(error, UsageError):
            raise
        reason = getattr(error, "strerror", None) or error
        raise UsageError(f"{text} cannot be read: {reason}; name a file with a JSON object in each line") from error


def begin(lines: Sequence[Line], folder: Folder) -> Run:
    """A run whose outcomes are those lines whose pictures are there. Nothing is changed yet."""
    there: dict[str, list[str]] = {}
    names = folder.names()
    for name in sorted(names):
        id = id_in(name)
        if id is not None:
            there.setdefault(id, []).append(name)
    older: dict[str, list[str]] = {}
    left: list[Line] = []
    run = Run(lines, folder, left, older)
    for line in lines:
        others = [name for name in there.get(written(line.id), ()) if name != line.name]
        if others:
            older[line.id] = others
        if line.name in names and folder.is_complete(line.name):
            run.outcomes[line.id] = Outcome(line.id, "kept")
        else:
            left.append(line)
    return run


def plan_all(pipe: Pipeline, lines: Iterable[Line], folder: Folder, told: Callable[[], None] = lambda: None) -> None:
    """Plan every line: what its keywords are together, and on this bundle.

    Sentences about keywords without effect are logged, each once. `folder`: where the pictures of the lines are.
    Raises: UsageError that names every wrong line.
    """
    wrong: list[str] = []
    remarks: dict[str, list[str]] = {}
    for line in lines:
        try:
            options = line.opened(folder)
            plan = pipe.plan(options.pop("prompt", None), **options)
            for remark in dict.fromkeys((*plan.remarks, *(note for one in plan.passes for note in one.table.notes))):
                remarks.setdefault(remark, []).append(line.place)
        except SdoptError as error:
            wrong.append(f"{line.place}: {error}")
        told()
    refuse(wrong)
    for remark, places in remarks.items():
        more = f" and {len(places) - 1} other lines" if len(places) > 1 else ""
        log.warning("%s%s: %s", places[0], more, remark)


def made(maker: Maker, lines: Iterable[Line], source: Folder, target: Folder) -> Generator[Outcome]:
    """Make the picture of each line and write it, in whatever order they are done.

    `source`: where the pictures of the lines are.
    Raises: SdoptError where no picture is made any more; OSError where one cannot be written.
    """
    left, under_way = deque(lines), dict[str, Line]()
    events: queue.SimpleQueue[Event] = queue.SimpleQueue()
    while left or under_way:
        while left and len(under_way) < maker.room:
            line = left.popleft()
            if target.is_complete(line.name):  # another run has made it meanwhile, or an actor that was killed
                yield Outcome(line.id, "kept")
                continue
            try:
                order = Order(line.id, NAME, line.opened(source))
            except SdoptError as error:
                yield Outcome(line.id, "failed", error=str(error))
                continue
            under_way[line.id] = line
            maker.submit(order, events.put)
        if not under_way:
            continue
        event = events.get()
        if not isinstance(event, FINAL):
            continue
        line = under_way.pop(event.id)
        if isinstance(event, Finished):
            target.write(line.name, event.content)
            yield Outcome(line.id, "made", round(event.computed, 3))
        elif event.reason in ("usage", "failed"):
            yield Outcome(line.id, "failed", error=event.message)
        else:
            raise SdoptError(event.message)
