"""What clients of AUTOMATIC1111's API ask for before they make a picture: lists of what is there, and png-info.

The lists of what this server has nothing of are empty. Names take the place of paths.
"""

from __future__ import annotations

import asyncio
import io
import os
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from sdopt.image.files import texts_of
from sdopt.image.infotext import parsed
from sdopt.request.keyword import Keyword
from sdopt.samplers import SAMPLERS
from sdopt.samplers.labels import ALIASES, AUTOMATIC, SCHEDULES_BY_LABEL, name_of
from sdopt.serve import sdapi_wish as wishes
from sdopt.serve.context import Context, context_of, json_body
from sdopt.serve.fields import picture_bytes
from sdopt.serve.kinds import Base64
from sdopt.serve.sdapi_fields import LATENT, read, refuse

KARRAS_RHO = 7.0
PNG_INFO = {"image": Keyword("a picture that a web UI or sdopt wrote", Base64(), optional=False)}
EMPTY = ("upscalers", "sd-vae", "hypernetworks", "face-restorers", "realesrgan-models", "prompt-styles", "extensions")


async def samplers(request: Request) -> Response:
    """Those that the served models can be sampled with."""
    described = context_of(request).models.values()
    families = {s.family for s in SAMPLERS.values() for d in described if d["scheduler"] in (s.diffusers, *s.aliases)}
    return JSONResponse(
        [
            {"name": sampler.title, "aliases": [sampler.name, *sampler.aliases], "options": {}}
            for sampler in SAMPLERS.values()
            if sampler.family in families or not families
        ]
    )


async def schedulers(request: Request) -> Response:
    return JSONResponse(
        [
            {
                "name": name_of(label),
                "label": label,
                "aliases": list(ALIASES.get(label, ())),
                "default_rho": KARRAS_RHO if label == "Karras" else -1.0,
                "need_inner_model": False,
            }
            for label in (AUTOMATIC, *SCHEDULES_BY_LABEL)
        ]
    )


async def models(request: Request) -> Response:
    return JSONResponse(
        [
            {
                "title": wishes.title(name, described),
                "model_name": name,
                "hash": str(described["digest"])[:10],
                "sha256": described["digest"],
                "filename": name,
                "config": None,
            }
            for name, described in context_of(request).models.items()
        ]
    )


async def loras(request: Request) -> Response:
    names = dict.fromkeys(name for one in context_of(request).models.values() for name in one["loras"])
    return JSONResponse([{"name": name, "alias": name, "path": name, "metadata": {}} for name in names])


async def embeddings(request: Request) -> Response:
    loaded: dict[str, Any] = {}
    for described in context_of(request).models.values():
        for token, (vectors, width) in described["embeddings"].items():
            own = {"step": None, "sd_checkpoint": None, "sd_checkpoint_name": None}
            loaded[token] = {**own, "shape": width, "vectors": vectors}
    return JSONResponse({"loaded": loaded, "skipped": {}})


async def upscale_modes(request: Request) -> Response:
    return JSONResponse([{"name": LATENT}])


async def flags(request: Request) -> Response:
    """The command of this server in the web UI's words; no path, and no key."""
    settings = context_of(request).settings
    return JSONResponse(
        {
            "api": True,
            "nowebui": False,
            "listen": not settings.is_local,
            "port": settings.port,
            "cors_allow_origins": ",".join(settings.cors) or None,
            "api_server_stop": False,
        }
    )


async def memory(request: Request) -> Response:
    """The memory of the workers."""
    context = context_of(request)
    return JSONResponse({"ram": _ram(context), "cuda": {"error": "not measured; GET /metrics has the workers' memory"}})


def _ram(context: Context) -> dict[str, Any]:
    members = [member for device in context.devices for member in device.members]
    used = sum(member.beat.memory for member in members if member.beat is not None)
    try:
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):  # not on this system
        return {"used": used}
    return {"free": max(0, total - used), "used": used, "total": total}


async def png_info(request: Request) -> Response:
    """What a picture says of how it was made: the web UI's text, all of its texts, and the values in the first."""
    context = context_of(request)
    image = read(await json_body(request), PNG_INFO)["image"]
    if image is None:
        raise refuse("image", "image is missing; send a picture in base64")
    content = io.BytesIO(picture_bytes("image", image))
    texts = await asyncio.to_thread(texts_of, "image", content, context.settings.max_pixels)
    info = texts.get("parameters", "")
    return JSONResponse({"info": info, "items": texts, "parameters": parsed(info)})


async def scripts(request: Request) -> Response:
    return JSONResponse({"txt2img": [], "img2img": []})


async def empty(request: Request) -> Response:
    return JSONResponse([])


ROUTES = [
    Route("/sdapi/v1/samplers", samplers, methods=["GET"]),
    Route("/sdapi/v1/schedulers", schedulers, methods=["GET"]),
    Route("/sdapi/v1/sd-models", models, methods=["GET"]),
    Route("/sdapi/v1/loras", loras, methods=["GET"]),
    Route("/sdapi/v1/embeddings", embeddings, methods=["GET"]),
    Route("/sdapi/v1/latent-upscale-modes", upscale_modes, methods=["GET"]),
    Route("/sdapi/v1/cmd-flags", flags, methods=["GET"]),
    Route("/sdapi/v1/memory", memory, methods=["GET"]),
    Route("/sdapi/v1/png-info", png_info, methods=["POST"]),
    Route("/sdapi/v1/scripts", scripts, methods=["GET"]),
    Route("/sdapi/v1/script-info", empty, methods=["GET"]),
    *(Route(f"/sdapi/v1/{name}", empty, methods=["GET"]) for name in EMPTY),
]
