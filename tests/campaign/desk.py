"""The folder in which commands run: files of every kind that a command reads, and things that are no such files."""

from __future__ import annotations

import argparse
import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from tests.campaign.sandbox import Sandbox

ROOT = Path(__file__).parents[2]
CASES = '[tiny]\nmodel = "emoji"\nwidth = 16\nheight = 16\nsteps = 1\nguidance = 1.0\n'
Listing = dict[str, tuple[int, int, int]]  # each path -> its mode, size and time of change
VALUES = {  # right values of options, by their names in argparse
    "backend": ("ort", "ort:cpu", "openvino", "tensorrt", "auto"), "component": ("unet", "vae_decoder", "text_encoder"),
    "precision": ("fp32", "fp16", "bf16", "auto"), "size": ("16x16", "24x16"), "sampler": ("euler", "DPM++ 2M", "lcm"),
    "schedule": ("karras", "beta", "trailing"), "seed": ("1", "1,2"), "profile": ("batch=1:1:2", "batch=1"),
    "refit": ("lora",), "prompt": ("a cat", "(a:1.2) [b]"), "print_name": ("euler",), "remove": ("all",),
    "fail_over": ("5%", "5"), "side": ("sdopt",), "baselines": ("eager-fp32",), "peer": ("x=true",), "revision": ("x",),
    "variant": ("fp16",), "config": ("sd1", "sdxl-base"), "device": ("cpu", "cuda"), "guidance_interval": ("0", "0.5"),
    "timesteps": ("999,500", "500"), "sigmas": ("14.6", "1"), "vae_tile": ("64",), "island": ("*", "/conv_in*"),
    "cache_depth": ("1", "2"), "vae": ("tiny",), "cache_schedule": ("0", "1"), "budget": ("2s", "800ms"),
    "minutes": ("0.01",), "reference_steps": ("2",), "reference_sampler": ("ddim",), "pictures": ("1",),
}  # fmt: skip


class Desk:
    """`files`: names of files, folders and other things in `folder`, right ones and others. It is made once."""

    def __init__(self, sandbox: Sandbox) -> None:
        self.folder = sandbox.folder / "desk"
        self._sandbox = sandbox
        if not self.folder.is_dir():
            made = self.folder.with_name("desk-unfinished")
            shutil.rmtree(made, ignore_errors=True)
            made.mkdir()
            _fill(made, sandbox)
            made.rename(self.folder)
        self.files = sorted(os.listdir(self.folder))
        self.files += ["missing", "missing/x.png", "é\u0301/\u202e.json", "x" * 250, "missing.safetensors", "not.png"]

    def right(self, name: str) -> tuple[list[str], list[str]]:
        """Places and options of a command that make it do its work, quickly."""
        one = ["--threads", "1"]
        little = ["--backend", "ort", "--precision", "fp32", "--sampler", "euler", "--steps", "1", "--pictures", "1"]
        little += ["--reference-steps", "2", "--minutes", "0.01", "--no-presets"]
        few = ["--rounds", "1", "--warmup", "0", "--cold-rounds", "0", *one]
        return {
            "generate": (["a red apple"], ["-o", "a.png", "--steps", "1", "--size", "16x16", *one]),
            "batch": (["list.jsonl"], ["-o", "pictures", "--steps", "1", "--size", "16x16", *one]),
            "build": (["bundle"], ["--backend", "ort", "--component", "vae_decoder"]),
            "export": (["checkpoint"], ["-o", "exported", "--offline"]),
            "diagnose": (["bundle"], ["--component", "vae_decoder", "--latent", "2"]),
            "bench run": (["bundle"], ["--cases", "cases.toml", "--case", "tiny", *few]),
            "tune": (["bundle"], ["--floor", "9dB", *little, *one]),
            "bench compare": (["record.json", "record.json"], []),
            "bench report": (["record.json"], ["-o", "report.md"]),
        }.get(name, ([], []))

    def values(self, destination: str) -> tuple[str, ...]:
        return VALUES.get(destination, ("1",))

    def numbers(self, option: argparse.Action) -> tuple[str, ...]:
        """The default of an option, and numbers beside it."""
        default: Any = option.default
        if isinstance(default, bool) or not isinstance(default, (int, float)):
            return ()
        return str(default), str(default + 1), str(-default)

    def listing(self) -> Listing:
        found: Listing = {}
        for top, folders, files in os.walk(self.folder):
            for name in (*folders, *files):
                path = os.path.join(top, name)
                status = os.lstat(path)
                time = 0 if name in folders else status.st_mtime_ns
                found[os.path.relpath(path, self.folder)] = (status.st_mode, status.st_size if time else 0, time)
        return found

    def changed(self, before: Listing) -> list[str]:
        now = self.listing()
        return sorted(name for name in {*before, *now} if before.get(name) != now.get(name))

    def restore(self, before: Listing) -> None:
        """Remove what is new; make all of it again if anything else has changed."""
        for name in self.changed(before):
            path = self.folder / name
            if name in before:
                shutil.rmtree(self.folder)
                Desk(self._sandbox)
                return
            if os.path.lexists(path):
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def _fill(folder: Path, sandbox: Sandbox) -> None:
    from PIL import Image

    from tests.campaign.loras import small_lora, written

    shutil.copytree(sandbox.bundles["emoji"], folder / "bundle")
    Image.fromarray(np.full((16, 16, 3), 99, np.uint8)).save(folder / "right.png")
    written(folder / "style.safetensors", *small_lora(sandbox.bundles["emoji"]))
    shutil.copy(min((ROOT / "benchmarks/results").glob("*.json")), folder / "record.json")
    (folder / "cases.toml").write_text(CASES)
    (folder / "prompts.txt").write_text("a red apple\n")
    (folder / "list.jsonl").write_text('{"id": 1, "prompt": "a red apple"}\n')
    (folder / "scheduler_config.json").write_text(json.dumps({"_class_name": "DDIMScheduler"}))
    np.savez(folder / "arrays.npz", latent_sample=np.zeros((1, 4, 2, 2), np.float32))
    if sandbox.kept is not None and (sandbox.kept / "tiny-checkpoint").is_dir():
        shutil.copytree(sandbox.kept / "tiny-checkpoint", folder / "checkpoint")
    (folder / "empty").touch()
    (folder / "empty.json").touch()
    (folder / "empty.safetensors").touch()
    (folder / "folder").mkdir()
    (folder / "folder.png").mkdir()
    (folder / "folder.json").mkdir()
    (folder / "folder.safetensors").mkdir()
    (folder / "zeros.json").write_bytes(bytes(1000))
    (folder / "deep.json").write_text("[" * 5000)
    (folder / "nan.json").write_text('{"format_version": NaN}')
    (folder / "list.json").write_text("[1, null]")
    (folder / "latin.toml").write_bytes(b'[x]\ny = "\xe9"\n')
    (folder / "a b\nc.txt").write_text("\ufeffa\0b")
    os.mkfifo(folder / "pipe")
    os.mkfifo(folder / "pipe.safetensors")
    os.mkfifo(folder / "pipe.json")
    os.mkfifo(folder / "pipe.png")
    (folder / "of-objects.npz").write_bytes(b"PK\3\4" + bytes(40))
