"""A worker: a process that runs cases one by one. Lines of JSON come on stdin and go to a descriptor of its own.

python -m tests.campaign.worker FOLDER KEPT DESCRIPTOR
"""

from __future__ import annotations

import contextlib
import faulthandler
import importlib
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

from tests.campaign.cases import FOREIGN, Case, Outcome
from tests.campaign.kinds import KINDS
from tests.campaign.sandbox import Sandbox

MEMORY = 16 << 30  # bytes of address space: more is a MemoryError, and not the end of the machine


def run(case: Case, sandbox: Sandbox) -> Outcome:
    """The outcome of one case. A mistake of the campaign itself is a fault too."""
    module: Any = importlib.import_module(KINDS[case.kind].module)
    try:
        return module.run(case, sandbox)
    except Exception:
        import traceback

        return Outcome(FOREIGN, "the campaign itself", traceback.format_exc()[-3000:])


def main(folder: str, kept: str, descriptor: str) -> None:
    with contextlib.suppress(ImportError):
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    faulthandler.register(signal.SIGUSR1)  # the pool asks where a case hangs
    sandbox = Sandbox(Path(folder), Path(kept))
    sandbox.right("emoji")
    with os.fdopen(int(descriptor), "w") as answers:
        print(json.dumps("ready"), file=answers, flush=True)
        for line in sys.stdin:
            case = Case(**json.loads(line))
            outcome = run(case, sandbox)
            print(json.dumps(outcome.to_json()), file=answers, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
