"""AUTOMATIC1111's API, as clients of its web UI send and read it.

    POST /sdapi/v1/txt2img, img2img        pictures; the answer comes when they are done
    GET  /sdapi/v1/progress                how far the caller's own request is, with a preview
    POST /sdapi/v1/interrupt, skip         end it; end its current batch and go on with the next
    GET, POST /sdapi/v1/options            the caller's own: model, clip skip, format

`force_task_id` names a request, as a field of it and as a parameter of progress, interrupt and skip. Without it these
are about what the caller itself has under way, never about what others have. A picture that was interrupted is not
sent: what remains of a request that lost some are those that were done.
Ref: AUTOMATIC1111/stable-diffusion-webui, modules/api/api.py, modules/processing.py (Processed.js).
"""

from __future__ import annotations

import asyncio
import base64
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from sdopt import __version__
from sdopt.image.infotext import a1111_text
from sdopt.request.keyword import Keyword
from sdopt.request.kinds import Switch
from sdopt.serve import sdapi_wish as wishes
from sdopt.serve.context import Context, caller_of, context_of, json_body
from sdopt.serve.disconnect import unless_gone
from sdopt.serve.orders import Finished
from sdopt.serve.replies import HttpError
from sdopt.serve.sdapi_fields import ID, SETTINGS, read, refuse
from sdopt.serve.tasks import Picture, Task

MOST_CALLERS = 1000  # whose settings are kept
MEANT = {"force_task_id": Keyword("the request that is meant", ID, None, "all of the caller's")}
PROGRESS = {**MEANT, "skip_current_image": Keyword("leave out the preview", Switch(), False)}
Read = Callable[[Context, Mapping[str, Any], Mapping[str, Any], str], wishes.Request]


@dataclass(eq=False)
class Run:
    """A request under way. `batch`: how many of its pictures are one batch of the web UI."""

    task: Task
    caller: str
    batch: int
    interrupted: bool = False
    skipped: bool = False


@dataclass(eq=False)
class Desk:
    """What this API keeps: requests under way by id, the oldest first, and settings by caller."""

    runs: dict[str, Run] = field(default_factory=dict[str, Run])
    settings: dict[str, dict[str, Any]] = field(default_factory=dict[str, dict[str, Any]])

    def own(self, caller: str, id: str | None = None) -> list[Run]:
        """The caller's requests, the oldest first; with an id that one, if it is his."""
        return [run for run in self.runs.values() if run.caller == caller and id in (None, run.task.id)]

    def set(self, caller: str, values: Mapping[str, Any]) -> None:
        """Change some of a caller's settings."""
        self.settings[caller] = {**self.settings.pop(caller, {}), **values}
        if len(self.settings) > MOST_CALLERS:
            del self.settings[next(iter(self.settings))]

    def settings_of(self, caller: str) -> dict[str, Any]:
        """All settings of a caller."""
        return {**{name: setting.default for name, setting in SETTINGS.items()}, **self.settings.get(caller, {})}


def desk_of(request: Request) -> Desk:
    state = request.app.state
    if not hasattr(state, "sdapi"):
        state.sdapi = Desk()
    return cast(Desk, state.sdapi)


async def txt2img(request: Request) -> Response:
    return await _make(request, wishes.txt2img)


async def img2img(request: Request) -> Response:
    return await _make(request, wishes.img2img)


async def _make(request: Request, reading: Read) -> Response:
    """Make the pictures of a request, and wait for them as long as the client does."""
    context, desk, caller = context_of(request), desk_of(request), caller_of(request)
    body = await json_body(request)
    context.model(None)  # 503 while no worker is ready
    wanted = await asyncio.to_thread(reading, context, body, desk.settings_of(caller), caller)
    fields = wanted.fields
    if not fields["override_settings_restore_afterwards"]:
        given = cast("dict[str, Any]", fields["override_settings"] or {})
        desk.set(caller, {name: wanted.settings[name] for name in given})
    task = context.tasks.create(wanted.wish, fields["force_task_id"])
    run = desk.runs[task.token] = Run(task, caller, fields["batch_size"])
    try:
        await unless_gone(request, task.settled())
    except BaseException:
        context.tasks.cancel(task)
        raise
    finally:
        del desk.runs[task.token]
        context.tasks.forget(task)
    done = [picture.finished for picture in task.pictures if picture.finished is not None]
    failure = task.failure
    if failure is not None and (failure.reason != "cancelled" or not done):
        raise wishes.renamed(HttpError.of(failure))
    return JSONResponse(_answer(context, body, wanted, done, run))


def _answer(
    context: Context, body: Mapping[str, Any], wanted: wishes.Request, done: list[Finished], run: Run
) -> dict[str, Any]:
    fields = wanted.fields
    pictures = {"init_images", "mask"}
    echo = {k: v for k, v in body.items() if k not in pictures or fields.get("include_init_images")}
    images = [base64.b64encode(one.content).decode() for one in done] if fields["send_images"] else []
    return {"images": images, "parameters": echo, "info": json.dumps(_info(context, wanted, done, run))}


def _info(context: Context, wanted: wishes.Request, done: list[Finished], run: Run) -> dict[str, Any]:
    """What the web UI says of pictures, from what they carry themselves."""
    fields, bundle, first = wanted.fields, wanted.wish.bundle, done[0].parameters
    seeds = [one.parameters["seed"] for one in done]
    return {
        "prompt": fields["prompt"],
        "all_prompts": [fields["prompt"]] * len(done),
        "negative_prompt": fields["negative_prompt"],
        "all_negative_prompts": [fields["negative_prompt"]] * len(done),
        "seed": seeds[0],
        "all_seeds": seeds,
        "subseed": -1,
        "all_subseeds": [-1] * len(done),
        "subseed_strength": 0,
        "width": first["width"],
        "height": first["height"],
        "sampler_name": first["sampled_by"],
        "cfg_scale": first["guidance_scale"],
        "steps": first["num_inference_steps"],
        "batch_size": fields["batch_size"],
        "restore_faces": False,
        "face_restoration_model": None,
        "sd_model_name": bundle,
        "sd_model_hash": str(context.models[bundle]["digest"])[:10],
        "sd_vae_name": None,
        "sd_vae_hash": None,
        "seed_resize_from_w": -1,
        "seed_resize_from_h": -1,
        "denoising_strength": first.get("hires_strength", first.get("strength")),
        "extra_generation_params": {"Schedule type": first["schedule_type"]},
        "index_of_first_image": 0,
        "infotexts": [a1111_text(one.parameters) for one in done],
        "styles": [],
        "job_timestamp": _timestamp(run.task),
        "clip_skip": wanted.settings["CLIP_stop_at_last_layers"],
        "is_using_inpainting_conditioning": False,
        "version": f"sdopt {__version__}",
    }


def _timestamp(task: Task) -> str:
    return time.strftime("%Y%m%d%H%M%S", time.localtime(task.created))


async def progress(request: Request) -> Response:
    is_without_image = _is_true(request, "skip_current_image")
    runs = desk_of(request).own(caller_of(request), request.query_params.get("force_task_id"))
    unfinished = [run for run in runs if not run.task.is_final]
    if not unfinished:
        state = _state(0, 0, 0, 0)
        return JSONResponse(
            {"progress": 0.0, "eta_relative": 0.0, "state": state, "current_image": None, "textinfo": None}
        )
    run = next((run for run in unfinished if run.task.status == "running"), unfinished[0])
    pictures, now = run.task.pictures, _current(run)
    batches = _batches(run)
    number = sum(all(one.is_final for one in batch) for batch in batches)  # that are done
    part = sum(_part(one) for one in pictures) / len(pictures)
    seconds = time.time() - run.task.created
    left = max((one.seconds for one in pictures), default=0.0) if part == 0 else seconds / part - seconds
    state = _state(number, len(batches), now.index, now.of, run)
    shown = None if is_without_image else now.preview
    image = None if shown is None else base64.b64encode(shown).decode()
    text = f"waits behind {now.ahead}" if now.index == 0 and now.ahead else None
    return JSONResponse(
        {
            "progress": min(1.0, max(0.01, part)), "eta_relative": max(0.0, left), "state": state,
            "current_image": image, "textinfo": text,
        }
    )  # fmt: skip


def _batches(run: Run) -> list[list[Picture]]:
    pictures = run.task.pictures
    return [pictures[at : at + run.batch] for at in range(0, len(pictures), run.batch)]


def _current(run: Run) -> Picture:
    """The picture of an unfinished request that is being made, else the next one. Machines may finish out of order."""
    left = [one for one in run.task.pictures if not one.is_final]
    return next((one for one in left if one.index), left[0])


def _part(picture: Picture) -> float:
    """How much of a picture is done, 0 to 1."""
    return 1.0 if picture.is_final else picture.index / picture.of if picture.of else 0.0


def _state(number: int, count: int, step: int, steps: int, run: Run | None = None) -> dict[str, Any]:
    return {
        "skipped": run is not None and run.skipped,
        "interrupted": run is not None and run.interrupted,
        "stopping_generation": run is not None and run.interrupted,
        "job": "" if run is None else run.task.id,
        "job_count": count,
        "job_timestamp": "0" if run is None else _timestamp(run.task),
        "job_no": number,
        "sampling_step": step,
        "sampling_steps": steps,
    }


def _is_true(request: Request, name: str) -> bool:
    """A switch in the address. Raises: HttpError 422."""
    text = request.query_params.get(name, "false").lower()
    if text not in ("true", "1", "false", "0"):
        raise refuse(name, f"{name} = {text[:40]!r}; allowed are true and false")
    return text in ("true", "1")


async def interrupt(request: Request) -> Response:
    for run in await _runs(request):
        run.interrupted = True
        context_of(request).tasks.cancel(run.task)
    return JSONResponse({})


async def skip(request: Request) -> Response:
    """End the pictures of the batch that is being made; those of the next batches go on."""
    for run in (await _runs(request))[:1]:
        run.skipped = True
        now = _current(run)
        for one in next(batch for batch in _batches(run) if any(one is now for one in batch)):
            if not one.is_final:
                one.device.cancel(one.order.id)
    return JSONResponse({})


async def _runs(request: Request) -> list[Run]:
    """The caller's requests that are meant: the one of force_task_id, in the address or a body, or all of his.

    Raises: HttpError 404 where he has no such request.
    """
    id = request.query_params.get("force_task_id")
    if id is None and await request.body():
        id = read(await json_body(request), MEANT)["force_task_id"]
    runs = desk_of(request).own(caller_of(request), id)
    if id is not None and not runs:
        raise HttpError(404, f"there is no request {str(id)[:100]!r} of yours under way", "force_task_id", "not_found")
    return [run for run in runs if not run.task.is_final]


async def options(request: Request) -> Response:
    context, settings = context_of(request), desk_of(request).settings_of(caller_of(request))
    name = wishes.model_named(context, settings["sd_model_checkpoint"])
    return JSONResponse({**settings, "sd_model_checkpoint": wishes.title(name, context.models[name])})


async def set_options(request: Request) -> Response:
    """Change the caller's settings; those of others stay."""
    context, body = context_of(request), await json_body(request)
    read(body, SETTINGS)
    given = {name: value for name, value in body.items() if value is not None}
    if "sd_model_checkpoint" in given:
        given["sd_model_checkpoint"] = wishes.model_named(context, given["sd_model_checkpoint"])
    desk_of(request).set(caller_of(request), given)
    return JSONResponse(None)


ROUTES = [
    Route("/sdapi/v1/txt2img", txt2img, methods=["POST"]),
    Route("/sdapi/v1/img2img", img2img, methods=["POST"]),
    Route("/sdapi/v1/progress", progress, methods=["GET"]),
    Route("/sdapi/v1/interrupt", interrupt, methods=["POST"]),
    Route("/sdapi/v1/skip", skip, methods=["POST"]),
    Route("/sdapi/v1/options", options, methods=["GET"]),
    Route("/sdapi/v1/options", set_options, methods=["POST"]),
]
