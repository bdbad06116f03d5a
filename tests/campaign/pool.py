"""Worker processes: they are restarted when a case kills one of them, or takes too long."""

from __future__ import annotations

import json
import math
import os
import select
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.campaign.cases import CRASH, HANG, Case, Outcome
from tests.campaign.kinds import IDLE, KINDS, WAITING
from tests.campaign.sandbox import own_environment
from tests.campaign.schedule import Schedule

ROOT = Path(__file__).parents[2]
FOLDERS = ("emoji", "tiny", "sdxl", "tables", "built", "cache-of-kills")
START = 300.0  # seconds until a worker is ready


class Worker:
    """One process and its folder, which is kept from one process to the next."""

    def __init__(self, folder: Path, kept: Path) -> None:
        self.folder, self.kept = folder, kept
        self.folder.mkdir(parents=True, exist_ok=True)
        self._start()

    def _start(self) -> None:
        for name in FOLDERS:  # a case may have been killed in the middle of one
            shutil.rmtree(self.folder / name, ignore_errors=True)
        reading, writing = os.pipe()
        self.log = self.folder / "log"
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "tests.campaign.worker", str(self.folder), str(self.kept), str(writing)],
                stdin=subprocess.PIPE, stdout=log, stderr=log, pass_fds=[writing], cwd=ROOT,
                env=own_environment(self.folder),
            )  # fmt: skip
        os.close(writing)
        self._answers, self._read = reading, b""
        if self._answer(START) != "ready":
            raise RuntimeError(f"a worker does not start: {self._tail()}")

    def run(self, case: Case, end: float = math.inf) -> Outcome | None:
        """The outcome of a case; of one that is too slow, that of a second try in a new process.

        None where the campaign ends first: at `end`, on the clock of `time.monotonic`.
        """
        outcome = self._once(case, end)
        return self._once(case, end) if outcome is not None and outcome.name == HANG else outcome

    def _once(self, case: Case, end: float) -> Outcome | None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(vars(case)).encode() + b"\n")
        self.process.stdin.flush()
        kind = KINDS[case.kind]
        waiting = min(WAITING * kind.seconds, max(0.0, end - time.monotonic()))
        answer = self._answer(waiting, kind.seconds, START if kind.starts else IDLE)
        if isinstance(answer, dict):
            return Outcome(**answer)
        if answer is None and time.monotonic() >= end:
            return None
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGUSR1)
            time.sleep(0.5)
        tail = self._tail()
        if self.process.poll() is None and answer is None:
            outcome = Outcome(HANG, "see the lines of the process", tail)
        else:
            outcome = Outcome(CRASH, f"exit code {self.process.wait(10)}", tail)
        self.close()
        self._start()
        return outcome

    def _answer(self, waiting: float, computing: float = START, idle: float = START) -> Any:
        """The next line; None where it takes longer, by the clock or the processor; "" where the process has ended.

        `idle`: how long the process may do nothing.
        """
        end, began = time.monotonic() + waiting, self._computed()
        last, last_change = began, time.monotonic()
        while b"\n" not in self._read:
            if not select.select([self._answers], [], [], 0.5)[0]:
                now, computed = time.monotonic(), self._computed()
                if computed != last:
                    last, last_change = computed, now
                if now > min(end, last_change + idle) or computed > began + computing:
                    return None
                continue
            part = os.read(self._answers, 1 << 16)
            if not part:
                return ""
            self._read += part
        line, _, self._read = self._read.partition(b"\n")
        return json.loads(line)

    def _computed(self) -> float:
        """Seconds of processor time of the process so far."""
        try:
            fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
            return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
        except OSError:  # another system than Linux, or the process has ended
            return 0.0

    def _tail(self) -> str:
        return self.log.read_bytes()[-3000:].decode("utf-8", "replace")

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._answers)


def run_all(
    schedule: Schedule, end: float | None, folder: Path, kept: Path, workers: int,
    report: Callable[[Case, Outcome, float], None],
) -> None:  # fmt: skip
    """Run cases on so many workers until `end`; `report` is called by one thread at a time."""
    lock = threading.Lock()
    last = math.inf if end is None else end
    errors: list[BaseException] = []

    def work(number: int) -> None:
        worker = Worker(folder / f"worker-{number}", kept)
        try:
            while not errors and time.monotonic() < last:
                with lock:
                    case = schedule.next()
                if case is None:
                    return
                outcome = worker.run(case, last)
                with lock:
                    seconds = schedule.ended(case)
                    if outcome is not None:
                        report(case, outcome, seconds)
        finally:
            worker.close()

    def guarded(number: int) -> None:
        try:
            work(number)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(i,)) for i in range(workers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
