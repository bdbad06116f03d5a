"""A process that has imported all of sdopt, and forks one that runs a command for each line on its stdin.

So a command to kill costs its own work only. One that is told so kills itself before the Nth time that it changes a
file in its folder. Lines are JSON; `Victims` writes and reads them:

    {"folder": ..., "last": N, "environment": {...}, "words": [...], "log": ...}     N = 0: never
    -> {"pid": ...}     when it has begun
    -> {"code": ..., "changes": ...}     when it has ended; less than 0 is the signal that ended it
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
CHANGES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.chmod", "os.utime", "os.truncate")
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT
IMPORTS = (
    "onnxruntime", "sdopt.pipeline", "sdopt.image.files", "sdopt.build.jobs", "sdopt.build.recipe", "sdopt.export",
    "torch.onnx", "torch.export", "torch._dynamo", "onnxscript", "diffusers", "transformers", "filelock",
)  # fmt: skip


@dataclass(frozen=True)
class Ended:
    code: int
    changes: int
    log: str


class Victims:
    """The process, from outside. It ends with this one."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        command = [sys.executable, "-m", "tests.campaign.victim"]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=dict(environment)
        )

    def start(self, folder: Path, words: Sequence[str], environment: Mapping[str, str], last: int = 0) -> int:
        """Start a command. Returns the id of its process."""
        assert self._process.stdin is not None
        self._log = folder.with_name(f"{folder.name}.log")
        message = {"folder": str(folder), "last": last, "environment": dict(environment), "words": list(words)}
        self._process.stdin.write(json.dumps({**message, "log": str(self._log)}) + "\n")
        self._process.stdin.flush()
        return int(self._answer()["pid"])

    def ended(self) -> Ended:
        """How the command that was started has ended; this waits for it."""
        answer = self._answer()
        return Ended(answer["code"], answer["changes"], self._log.read_text("utf-8", "replace"))

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the process that starts commands has ended with {self._process.wait()}")
        return json.loads(line)


def main() -> None:
    from sdopt.cli.main import COMMANDS, build_parser

    build_parser(*COMMANDS)
    for name in IMPORTS:
        importlib.import_module(name)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        message = json.loads(line)
        counter, count = os.pipe()
        pid = os.fork()
        if pid == 0:
            answers.close()
            os.close(counter)
            _run(message, count)
        os.close(count)
        print(json.dumps({"pid": pid}), file=answers, flush=True)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        with os.fdopen(counter, "rb") as changes:
            number = int(changes.read() or 0)
        print(json.dumps({"code": code, "changes": number}), file=answers, flush=True)


def _run(message: Mapping[str, Any], counter: int) -> None:
    """Run a command in this forked process, and end."""
    os.environ.clear()
    os.environ.update(message["environment"])
    log = os.open(message["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(log, 1)
    os.dup2(log, 2)
    folder, last, changes = message["folder"], message["last"], 0

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal changes
        if event == "open":
            path, _, flags = arguments
            writes = bool(flags & WRITING)
        else:
            path, writes = arguments[0] if arguments else None, event in CHANGES
        if not writes or not isinstance(path, (str, bytes, os.PathLike)) or not os.fsdecode(path).startswith(folder):
            return
        changes += 1
        if changes == last:
            os.kill(os.getpid(), signal.SIGKILL)

    code = 70
    try:
        from sdopt.cli.main import main as command

        sys.addaudithook(hook)
        code = command(message["words"])
    except SystemExit as ended:
        code = int(ended.code or 0)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os.write(counter, str(changes).encode())
        os._exit(code)


if __name__ == "__main__":
    main()
