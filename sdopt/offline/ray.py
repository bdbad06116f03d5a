"""A list on a Ray cluster: actors of Ray Data, each with a worker process whose step loop holds rows of several blocks.

    rows -> blocks of a few rows -> actors -> worker processes; the actors write the pictures

Where a worker process dies, its actor starts another one, and only the row that ends its process twice has no picture.
An actor that is killed, with its machine perhaps, is started again by Ray and gets its blocks again; what has a
picture by then is not made twice.
Ref: docs.ray.io, Ray Data, `ActorPoolStrategy`
"""

from __future__ import annotations

import json
import logging
from collections.abc import Generator, Iterable, Mapping
from dataclasses import replace
from math import ceil
from pathlib import Path
from typing import Any

from sdopt.cluster import connected
from sdopt.errors import SdoptError
from sdopt.logs import logger
from sdopt.offline.folders import Disk, Folder
from sdopt.offline.lines import Line
from sdopt.offline.makers import AHEAD, Workers
from sdopt.offline.recipe import Recipe
from sdopt.offline.run import Outcome, made

log = logger(__name__)
ROWS = 4  # of a block: the driver hears of none before all of them are done
ON_GPU = ("cuda", "tensorrt", "tensorrt-rtx")  # words of backends that need a GPU


class Actor:
    """What Ray Data calls with the rows of a block, from several threads at once: their orders share one step loop."""

    def __init__(self, recipe: Recipe, source: Folder, target: Folder, slots: int) -> None:
        self._source, self._target, self._problem = source, target, ""
        try:
            if isinstance(target, Disk) and not target.path.is_dir():
                raise SdoptError(
                    f"{target} is not there on one of the cluster's machines; name a folder that all of them share"
                )
            self._maker = Workers(recipe, [""], slots)
        except (SdoptError, OSError) as error:
            self._problem = str(error)

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """The outcomes of a batch as JSON; errors too, since those of an actor would arrive as tracebacks."""
        if self._problem:
            return {"outcome": [json.dumps({"problem": self._problem})]}
        lines = [Line(**json.loads(text)) for text in batch["line"]]
        told: list[Any] = []
        try:
            told += map(vars, made(self._maker, lines, self._source, self._target))
        except (SdoptError, OSError) as error:
            told.append({"problem": str(error)})
        return {"outcome": [json.dumps(one) for one in told]}


def made_by_actors(
    recipe: Recipe,
    lines: Iterable[Line],
    source: Folder,
    target: Folder,
    *,
    address: str = "",
    workers: int | None = None,
    slots: int,
) -> Generator[Outcome]:
    """Make the pictures of lines on a cluster; see `sdopt.cluster.connected` for `address`, `made` for the rest.

    `workers`: actors; without it one for each GPU if the backend needs one, else one for each machine.
    Raises: BackendError without a cluster; SdoptError where an actor cannot begin, or cannot write.
    """
    rows = [{"line": json.dumps(vars(line))} for line in lines]
    source, target = _absolute(source), _absolute(target)
    if recipe.path is not None:
        recipe = replace(recipe, path=str(Path(recipe.path).absolute()))
    with connected(address) as ray:
        data: Any = ray.data
        logging.getLogger("ray.data").setLevel(logging.ERROR)
        context = data.DataContext.get_current()
        context.enable_progress_bars = False
        count, cpus, gpus = shares(ray.nodes(), recipe, workers)
        recipe = replace(recipe, threads=recipe.threads or max(1, int(cpus)))
        blocks = ceil((slots + AHEAD) / ROWS)
        actors = data.ActorPoolStrategy(
            size=count,
            max_tasks_in_flight_per_actor=blocks,
            max_concurrent_calls_per_actor=blocks,
            enable_true_multi_threading=True,
        )
        # made here, without tasks: where actors have all CPUs, a task that repartitions would wait for ever
        small = data.from_items(rows, override_num_blocks=ceil(len(rows) / ROWS))
        outcomes = small.map_batches(
            Actor,
            batch_size=None,
            fn_constructor_args=(recipe, source, target, slots),
            compute=actors,
            num_cpus=cpus,
            num_gpus=gpus,
        )
        try:
            for row in outcomes.iter_rows():
                told = json.loads(row["outcome"])
                if "problem" in told:
                    raise SdoptError(told["problem"])
                yield Outcome(**told)
        except ray.exceptions.RayError as error:
            text = f"{error}".strip().splitlines()
            raise SdoptError(f"Ray ends the run: {text[-1]}; the same command again makes the rest") from error


def _absolute(folder: Folder) -> Folder:
    """A folder whose path does not depend on where a process runs."""
    return Disk(folder.path.absolute()) if isinstance(folder, Disk) else folder


def shares(nodes: Iterable[Mapping[str, Any]], recipe: Recipe, workers: int | None) -> tuple[int, float, int]:
    """(actors, CPUs of each, GPUs of each) on the machines of a cluster, as `ray.nodes()` has them.

    An actor fits on the smallest machine that it may be on, beside its share of the others, and one CPU stays free.
    """
    on_gpu = any(word in ON_GPU for word in recipe.backend.split(":"))
    alive = [node["Resources"] for node in nodes if node["Alive"] and node["Resources"].get("CPU", 0) > 0]
    gpus = int(sum(one.get("GPU", 0) for one in alive))
    if on_gpu:
        count = workers or max(1, gpus)
        if count > gpus:
            log.warning("%d actors, and %d GPUs in the cluster; the others wait until it has more", count, gpus)
        return count, 1.0, 1
    count = workers or max(1, len(alive))
    smallest = min((float(one["CPU"]) for one in alive), default=1.0)
    share = max(smallest - 1, smallest / 2) / ceil(count / max(1, len(alive)))
    return count, float(int(share)) if share >= 1 else int(share * 1000) / 1000, 0
