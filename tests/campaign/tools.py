"""The commands that compute, from `export` to `tune`; values and files are those of `commands`."""

from __future__ import annotations

from tests.campaign.cases import Case, Outcome
from tests.campaign.commands import TOOLS, attempt
from tests.campaign.sandbox import Sandbox

WEIGHTS = {"export": 1, "build": 6, "diagnose": 3, "bench run": 3, "tune": 2}


def run(case: Case, sandbox: Sandbox) -> Outcome:
    rng = case.random()
    return attempt(rng, sandbox, rng.choices(TOOLS, [WEIGHTS[name] for name in TOOLS])[0])
