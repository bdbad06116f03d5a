"""The kinds of attack: one row each."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Kind:
    """`share`: how many of a campaign's inputs are of this kind, of 100; 0 for a kind that has its own number.

    `seconds`: a case that computes for longer is a hang. So is one that takes `WAITING` times as long on the clock,
    which a machine with other work may need, and one that does nothing at all for `IDLE` seconds. `starts`: its cases
    wait for processes of their own, and may do nothing themselves. `time`: the part of a campaign's time, of 100, that
    a kind with its own number gets.
    """

    module: str
    what: str
    share: float
    seconds: float = 5.0
    starts: bool = False
    time: int = 0


WAITING, IDLE = 12, 8.0
KINDS = {
    "manifest": Kind("tests.campaign.manifest", "the manifest of a bundle, changed by its structure", 40),
    "files": Kind("tests.campaign.files", "every other file that the runtime reads, changed by bytes", 30),
    "graphs": Kind("tests.campaign.graphs", "graphs, tokenizers and tables whose hashes fit, by their structure", 10),
    "arguments": Kind("tests.campaign.arguments", "hostile values for every argument in Python", 12),
    "commands": Kind("tests.campaign.commands", "hostile values for every option of the commands that end soon", 8),
    "tools": Kind("tests.campaign.tools", "every option of the commands that compute", 0.5, 90.0, starts=True),
    "loras": Kind("tests.campaign.loras", "LoRA files, changed by their structure", 8),
    "kills": Kind("tests.campaign.kills", "processes that are killed while they write", 0, 20.0, starts=True, time=30),
    "threads": Kind("tests.campaign.threads", "pictures in many threads at once", 0, 60.0, starts=True, time=10),
    "soak": Kind("tests.campaign.soak", "many pictures in one process", 0, 60.0, starts=True, time=10),
}
