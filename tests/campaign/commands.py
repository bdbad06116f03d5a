"""Every option of every command, with values right and wrong, and files that are none.

The options come from the parsers, so that a new one is attacked as soon as it is there. `commands` are those that end
soon, whatever they get; `tools` (see `tools.py`) are those that compute.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import sys
from collections.abc import Sequence
from typing import Any

from sdopt.cli.main import COMMANDS, build_parser, main
from sdopt.errors import SdoptError
from tests.campaign.cases import FOREIGN, HALF, LEFT, LEGAL, MUTE, NONSENSE, REFUSED, Case, Outcome
from tests.campaign.desk import Desk
from tests.campaign.sandbox import Sandbox

WORDS = (
    "", " ", "-1", "0", "1", "1.5", "nan", "inf", "-inf", "1e999", "9" * 30, "9" * 5000, "-", "--", "x", "é", "\ud800",
    "\udcff", "\x1b[31m", "a\nb", "\t", "../..", "/proc", "/dev/null", "/dev/full", "/proc/self/mem", "~", "x" * 300,
    "x" * 9000, "None", "True", "[]", "{}", "1,2", "1,", ",", "1x1", "8x", "x8", "-8x8", "0x0", "99999999x8", "1e3",
    "0x10", "1_000", "²", "٣", "ort:", ":", "ort:cuda:99", "ort:cpu:0", "fp33", "%s", "%(prog)s", "$(x)", "@file",
    "all", "a=b", "=", "batch=1:1:2", "batch=2:1:1 height=8", "5%", "-0", "1e-320", "1:2", "x:nan", "*", "[", "(?P<",
)  # fmt: skip
NO_NUMBERS = ("nan", "inf", "-inf", "1e999", "9" * 5000)
TOOLS = ("export", "build", "diagnose", "bench run", "tune")
ENDLESS = ("serve",)  # with right options it serves until a signal comes; tests/serve has its wrong ones
SLOW_TO_START = ("doctor",)  # it looks for every library
COUNTS = {None: 1, 0: 0, "?": 1, "+": 2, "*": 1}


class FaultError(Exception):
    """What a command printed of a fault of sdopt."""


def command(words: list[str]) -> int:
    """The exit code of a command in this process. Raises: FaultError with a traceback that it printed."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(_Console(out)), contextlib.redirect_stderr(_Console(err)):
        try:
            code = main(words)
        except SystemExit as ended:
            code = int(ended.code or 0)
    text = err.getvalue()
    if "Traceback" in text or "fault of sdopt" in text:
        raise FaultError(text[-3000:])
    if code and code != BELOW and "sdopt: error:" not in text:
        raise FaultError(f"exit code {code} without a sentence: {text[-500:]!r}")
    return code


BELOW = 5  # a gate was not met: the result says so


class _Console(io.TextIOWrapper):
    """A text stream that takes only what is UTF-8, and keeps it."""

    def __init__(self, kept: io.StringIO) -> None:
        super().__init__(io.BytesIO(), encoding="utf-8")
        self._kept = kept

    def write(self, text: str) -> int:
        text.encode()
        return self._kept.write(text)


def run(case: Case, sandbox: Sandbox) -> Outcome:
    names = [name for name in forms() if name not in (*TOOLS, *ENDLESS)]
    weights = [{"generate": 6.0}.get(name, 0.1 if name in SLOW_TO_START else 1.0) for name in names]
    rng = case.random()
    return attempt(rng, sandbox, rng.choices(names, weights)[0])


def forms() -> dict[str, argparse.ArgumentParser]:
    """Every command, those of two words too, and its parser."""
    if not _forms:
        for name, parser in build_parser(*COMMANDS).commands.items():
            below = parser.commands
            _forms.update({f"{name} {word}": own for word, own in below.items()} if below else {name: parser})
    return _forms


_forms: dict[str, argparse.ArgumentParser] = {}


def attempt(rng: Any, sandbox: Sandbox, name: str) -> Outcome:
    """What comes of one command with one or two options that it does not expect."""
    desk = Desk(sandbox)
    places, options = desk.right(name)
    chosen = [_hostile(rng, forms()[name], desk) for _ in range(rng.choice((1, 1, 2)))]
    if places and rng.random() < 0.15:
        places = [*places]
        places[rng.randrange(len(places))] = _value(rng, None, desk)
    words = [*name.split(), *places, *options, *(word for _, own in chosen for word in own)]
    what = " ".join(map(repr, words))[:400]
    print(what, file=sys.__stderr__, flush=True)
    before = desk.listing()
    stdin = sys.stdin
    sys.stdin = io.TextIOWrapper(io.BytesIO(rng.choice((b"", b"a red apple\n", b"\xff\xfe\n", b"\0" * 20))))
    os.chdir(desk.folder)
    try:
        code = command(words)
    except FaultError as error:
        return Outcome(MUTE if "without a sentence" in str(error) else FOREIGN, what, str(error))
    except BaseException as error:
        import traceback

        kind = MUTE if isinstance(error, SdoptError) else FOREIGN
        return Outcome(kind, what, "".join(traceback.format_exception(error))[-3000:])
    finally:
        sys.stdin = stdin
        os.chdir(sandbox.folder)
        changed = desk.changed(before)
        desk.restore(before)
    if name == "batch" and code == 1:  # a line failed, and the report that is written says so
        changed = [one for one in changed if ".sdopt-" in one]
    return _judged(what, code, changed, chosen)


def _judged(what: str, code: int, changed: Sequence[str], chosen: Sequence[tuple[Any, list[str]]]) -> Outcome:
    unfinished = [name for name in changed if ".tmp-" in name or ".old-" in name or ".sdopt-" in name]
    if (code and code != BELOW and changed) or unfinished:
        return Outcome(HALF if not unfinished else LEFT, what, f"exit code {code}, and {(unfinished or changed)[:5]}")
    numbers = [own for action, own in chosen if action is not None and action.type in (int, float)]
    if code == 0 and len(chosen) == 1 and any(own[-1].rpartition("=")[2] in NO_NUMBERS for own in numbers):
        return Outcome(NONSENSE, what, "what is no number was taken for one")
    return Outcome(REFUSED if code and code != BELOW else LEGAL, what, f"exit code {code}")


def _hostile(rng: Any, parser: argparse.ArgumentParser, desk: Desk) -> tuple[argparse.Action | None, list[str]]:
    """One option of a command with a value that it may not expect; sometimes a value alone."""
    left_out = ("help", "ray")  # a cluster takes half a minute to begin
    options = [action for action in parser._actions if action.option_strings and action.dest not in left_out]
    if rng.random() < 0.1 or not options:
        return None, [_value(rng, None, desk)]
    option = rng.choice(options)
    flag = rng.choice(option.option_strings)
    count: int = COUNTS.get(option.nargs, option.nargs)  # pyright: ignore
    if rng.random() < 0.2 and count == 1 and flag.startswith("--"):
        return option, [f"{flag}={_value(rng, option, desk)}"]
    count += rng.random() < 0.1
    return option, [flag, *(_value(rng, option, desk) for _ in range(count))]


def _value(rng: Any, option: argparse.Action | None, desk: Desk) -> str:
    """A word, a right value, or the name of a file that may be anything."""
    kind = rng.random()
    if kind < 0.4:
        return rng.choice(WORDS)
    if kind < 0.7 or option is None:
        return rng.choice(desk.files) + rng.choice(("", "", "", ":1", ":nan", "=<me>", "/", "/x"))
    if option.choices:
        return str(rng.choice(list(option.choices)))
    return rng.choice([*desk.values(option.dest), *desk.numbers(option)])
