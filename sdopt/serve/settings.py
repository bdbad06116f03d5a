"""What `sdopt serve` is told: options of the command, or a TOML file with the same names.

[bundles]
sd15 = "engines/sd15"

[loras]
neon = "engines/emoji/neon.safetensors"

port = 8000
max_steps = 60
"""

from __future__ import annotations

import ipaddress
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, cast

from sdopt.bundle.disk import parse_toml, read_given
from sdopt.bundle.files import embedded
from sdopt.errors import UsageError, choices, shown

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
EMBEDDED = "emoji"
BATCHING = ("steps", "requests")
MAX_CONFIG_BYTES = 1 << 20
OF_RAY = ("address", "replicas", "autoscale", "models_per_replica")
RANGE = re.compile(r"([0-9]{1,6}):([0-9]{1,6})")


@dataclass(frozen=True)
class Settings:
    """What one server is told.

    `bundles` and `loras`: paths by the name that requests use; a LoRA named `sd15/neon` is for the bundle sd15.
    `devices`: one worker process for each.
    `batching`: "steps" lets an order join others at any step; with "requests" it waits until those under way are done,
    to compare.
    `slots`: orders that a worker has under way at once. `queue` and `queue_seconds`: how many orders, and how many
    seconds of work, may wait for it.
    `max_...`: limits of a request; a body in bytes. `keep_...`: finished jobs, until their pictures are forgotten.
    `drain_seconds`: what is under way may take so long after SIGTERM. `stuck_seconds`: a worker whose one call takes
    longer is started again.
    `ray`: replicas in a Ray cluster make the pictures, and no worker process here. `address`: of the cluster.
    `replicas`: how many, of each group of bundles; `autoscale`: "1:8" in place of that, by the work there is.
    `models_per_replica`: the bundles that one replica may hold; 0: all.
    """

    bundles: Mapping[str, str]
    loras: Mapping[str, str] = field(default_factory=dict[str, str])
    host: str = "127.0.0.1"
    port: int = 8000
    backend: str = "auto"
    devices: tuple[str, ...] = ("",)
    precision: str = "auto"
    memory: str = "fast"
    threads: int | None = None
    trust_engines: bool = False
    api_key_file: str = ""
    cors: tuple[str, ...] = ()
    batching: str = "steps"
    slots: int = 8
    queue: int = 64
    queue_seconds: float = 600.0
    max_body: int = 64 << 20
    max_pixels: int = 4 << 20
    max_prompt_bytes: int = 8192
    max_steps: int = 150
    max_images: int = 10
    keep_jobs: int = 200
    keep_bytes: int = 256 << 20
    keep_seconds: float = 3600.0
    ping_seconds: float = 10.0
    drain_seconds: float = 60.0
    stuck_seconds: float = 900.0
    ray: bool = False
    address: str = ""
    replicas: int = 1
    autoscale: str = ""
    models_per_replica: int = 0

    def __post_init__(self) -> None:
        for name in (*self.bundles, *(key.rpartition("/")[2] for key in self.loras)):
            if not NAME.fullmatch(name):
                raise UsageError(f"{shown(name)} is no name; allowed are letters, digits, '.', '_' and '-'")
        if not self.bundles or not self.devices:
            raise UsageError("bundles and devices: there is none; give one, or leave the setting out")
        if self.batching not in BATCHING:
            raise UsageError(f"batching = {shown(self.batching)}; allowed are {', '.join(BATCHING)}", "batching")
        for one in fields(self):
            self._check(one.name, getattr(self, one.name))
        self._check_ray()
        for key in self.loras:
            owner = key.rpartition("/")[0]
            if owner and owner not in self.bundles:
                raise UsageError(f"lora {key}: there is no bundle {owner}; there are {', '.join(self.bundles)}")
        if not self.is_local and not self.api_key_file:
            raise UsageError(
                f"host = {self.host}: other machines could use this server; give --api-key-file FILE with a key in "
                "each line, or leave out --host"
            )

    @property
    def is_local(self) -> bool:
        """Whether only this machine can reach the address."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False

    @property
    def bounds(self) -> tuple[int, int]:
        """The least and the largest number of replicas of each group of bundles."""
        least, colon, most = self.autoscale.partition(":")
        return (int(least), int(most)) if colon else (self.replicas, self.replicas)

    def _check_ray(self) -> None:
        if not self.ray:
            for one in fields(self):
                if one.name in OF_RAY and getattr(self, one.name) != one.default:
                    raise UsageError(f"{one.name} has an effect with ray alone; give --ray too", one.name)
            return
        if self.autoscale:
            match = RANGE.fullmatch(self.autoscale)
            if match is None or not 1 <= int(match[1]) <= int(match[2]):
                raise UsageError(
                    f"autoscale = {shown(self.autoscale)}; allowed are two numbers from 1 on, the smaller one first, "
                    "such as 1:8",
                    "autoscale",
                )
            if self.replicas != 1:
                raise UsageError("replicas and autoscale are both given; leave one out", "autoscale")
        if self.devices != ("",):
            raise UsageError(
                "devices: Ray places the replicas; leave --device out, and give --backend ort:cuda for GPUs", "devices"
            )

    def _check(self, name: str, value: Any) -> None:
        lowest = {"port": 0, "keep_jobs": 0, "keep_bytes": 0, "queue": 0, "models_per_replica": 0}.get(name, 1)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            return
        if not lowest <= value < 1 << 40 or (name == "port" and value > 65535) or (name == "max_images" and value > 64):
            raise UsageError(f"{name} = {shown(value)}; allowed are numbers from {lowest} on", name)


def named(text: str, kind: str) -> tuple[str, str]:
    """("sd15", "engines/sd15") of "sd15=engines/sd15", or of the path alone."""
    name, equals, path = text.partition("=")
    if equals and NAME.fullmatch(name.rpartition("/")[2]) and not os.path.exists(text):
        return name, path
    stem = Path(text).name if kind == "bundle" else Path(text).stem
    return stem or kind, text


def bundles(texts: list[str]) -> dict[str, str]:
    """The startup table of BUNDLE arguments; the embedded model where there are none."""
    if not texts:
        return {EMBEDDED: str(embedded())}
    table: dict[str, str] = {}
    for text in texts:
        name, path = named(text, "bundle")
        if name in table:
            raise UsageError(f"{text}: two bundles are called {name}; name them: NAME=PATH")
        table[name] = path
    return table


def from_toml(path: Path) -> dict[str, Any]:
    """The settings in a file, by name. Raises: UsageError for a file that cannot be read, or has an unknown name."""
    try:
        table = cast("dict[str, Any]", parse_toml(read_given(path, MAX_CONFIG_BYTES).decode("utf-8")))
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} cannot be read: {error}") from error
    known = {one.name: one for one in fields(Settings)}
    for name, value in table.items():
        if name not in known:
            raise UsageError(f"{path}: unknown setting {name}; there are {choices(name, known)}", name)
        table[name] = typed(path, name, value, str(known[name].type))
    return table


def typed(source: object, name: str, value: Any, type_: str, *, from_text: bool = False) -> Any:
    """A value of TOML or YAML in the type of its setting; with `from_text`, a text may stand for it.

    Raises: UsageError for a value of another type.
    """
    kinds: dict[str, tuple[type, ...]] = {
        "str": (str,),
        "int": (int,),
        "int | None": (int,),
        "float": (int, float),
        "bool": (bool,),
        "tuple[str, ...]": (list,),
        "Mapping[str, str]": (dict,),
    }
    if from_text and isinstance(value, str):
        value = _from_text(value, type_)
    is_right = isinstance(value, kinds[type_]) and (type_ == "bool" or not isinstance(value, bool))
    items: list[Any] = []
    if isinstance(value, dict):
        items = list(cast("dict[str, Any]", value).values())
    elif isinstance(value, list):
        items = cast("list[Any]", value)
    if not is_right or not all(isinstance(one, str) for one in items):
        raise UsageError(f"{source}: {name} = {shown(value)}; allowed is {type_.replace('Mapping', 'a table')}", name)
    return tuple(items) if isinstance(value, list) else cast(Any, value)


def _from_text(text: str, type_: str) -> Any:
    """What a text means for a type; the text itself where it means nothing."""
    try:
        if type_ in ("int", "int | None"):
            return int(text)
        if type_ == "float":
            return float(text)
    except ValueError:
        return text
    if type_ == "bool":
        return {"true": True, "false": False}.get(text.lower(), text)
    if type_ == "tuple[str, ...]":
        return text.split(",")
    if type_ == "Mapping[str, str]":
        pairs = [one.partition("=") for one in text.split(",")]
        return {name: path for name, _, path in pairs} if all(equals for _, equals, _ in pairs) else text
    return text
