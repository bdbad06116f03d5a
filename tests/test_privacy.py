"""A fresh process of a user who decided nothing connects to nothing, and leaves no identity of its own."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from sdopt.privacy import SENDER, SILENT
from tests.conftest import ROOT

CONTINUOUS_INTEGRATION = ("CI", "TF_BUILD", "JENKINS_URL", "GITHUB_ACTIONS")
DECISIONS = (*SILENT, "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "DO_NOT_TRACK", "DISABLE_TELEMETRY")
# a socket alone is nothing yet: urllib3 makes one and closes it
OUTSIDE = re.compile(r"(?:connect|sendto|sendmsg|sendmmsg)\(.*sa_family=AF_INET")
AUDITED = """
import sys
sys.addaudithook(lambda event, args: print("AUDIT", event, args) if event in {events!r} else None)
from sdopt.cli.main import main
sys.exit(main({arguments!r}))
"""
EVENTS = ("socket.connect", "socket.getaddrinfo", "socket.sendto", "socket.gethostbyname", "urllib.Request")


def fresh_environment(home: Path) -> dict[str, str]:
    """The environment of a user with an empty home folder, outside of any CI, who set no variable of a library."""
    hidden = (*CONTINUOUS_INTEGRATION, *DECISIONS, "XDG_CACHE_HOME", "XDG_STATE_HOME")
    home.mkdir(exist_ok=True)
    return {**{name: value for name, value in os.environ.items() if name not in hidden}, "HOME": str(home)}


def outside(arguments: list[str], home: Path) -> list[str]:
    """What a command sends outside: names that it looks up, addresses that it connects to."""
    command = [sys.executable, "-c", AUDITED.format(events=EVENTS, arguments=arguments)]
    trace = home.parent / "trace"
    if shutil.which("strace"):  # libraries in C open their own sockets, which Python does not see
        command = ["strace", "-f", "-e", "trace=network", "-o", str(trace), *command]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=fresh_environment(home), check=False)
    assert done.returncode == 0, done.stderr
    audited = [line for line in done.stdout.splitlines() if line.startswith("AUDIT")]
    traced = trace.read_text().splitlines() if trace.exists() else []
    return [*audited, *(line for line in traced if OUTSIDE.search(line))]


@pytest.mark.parametrize("backend", ["ort", "openvino"])
def test_a_picture_is_made_without_a_word_to_anybody(backend: str, tmp_path: Path) -> None:
    pytest.importorskip({"ort": "onnxruntime"}.get(backend, backend))
    home, picture = tmp_path / "home", tmp_path / "a.png"
    assert outside(["generate", "a", "--steps", "1", "--backend", backend, "-o", str(picture)], home) == []
    assert picture.is_file()
    own = {path.relative_to(home).parts[:2] for path in home.rglob("*") if path.is_file()}
    assert own == {(".cache", "sdopt")}


@pytest.mark.parametrize("command", [["doctor"], ["inspect"], ["samplers"]], ids=lambda command: command[0])
def test_other_commands_neither(command: list[str], tmp_path: Path) -> None:
    assert outside(command, tmp_path / "home") == []
    assert not list((tmp_path / "home").rglob("deviceid"))


def test_an_export_offline_asks_nobody(least_checkpoint: Path, tmp_path: Path) -> None:
    home = tmp_path / "home"
    assert outside(["export", str(least_checkpoint), "-o", str(tmp_path / "bundle"), "--offline"], home) == []
    assert (tmp_path / "bundle/manifest.json").is_file()
    assert not list(home.rglob("deviceid"))


def after_import(code: str, home: Path, **decided: str) -> dict[str, str]:
    """The variables of a process that ran `code` after `import sdopt`."""
    program = f"import sdopt, os, json, sys\n{code}\nprint(json.dumps(dict(os.environ)))"
    environment = {**fresh_environment(home), **decided}
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, env=environment, check=True
    )
    return json.loads(done.stdout.splitlines()[-1])


def test_the_users_decision_stays(tmp_path: Path) -> None:
    assert after_import("", tmp_path / "home")["ORT_DISABLE_TELEMETRY"] == "1"
    assert after_import("", tmp_path / "home", ORT_DISABLE_TELEMETRY="0")["ORT_DISABLE_TELEMETRY"] == "0"


@pytest.mark.parametrize(("decision", "sends"), [(None, False), ("0", False), ("1", True)])
def test_openvino_sends_only_if_the_user_opted_in(decision: str | None, sends: bool, tmp_path: Path) -> None:
    pytest.importorskip(SENDER)
    home = tmp_path / "home"
    (home / "intel").mkdir(parents=True)
    if decision is not None:
        (home / "intel" / SENDER).write_text(decision)
    program = f"""
        class Sender:
            loaded = False
            def find_spec(self, name, path=None, target=None):
                Sender.loaded |= name == "{SENDER}"
        sys.meta_path.insert(0, Sender())
        os.environ["CI"] = "true"  # so that this test sends nothing either
        import sdopt.engine.openvino
        os.environ["LOADED"] = str(Sender.loaded)
        assert "{SENDER}" not in sys.modules or Sender.loaded
    """
    assert after_import("\n".join(line[8:] for line in program.splitlines()), home)["LOADED"] == str(sends)


def test_the_attention_that_a_configuration_names_is_not_downloaded(tiny_checkpoint: Path, tmp_path: Path) -> None:
    from sdopt.export.checkpoint import Checkpoint

    folder = Path(shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint"))
    path = folder / "text_encoder/config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "attn_implementation": "kernels-community/flash-attn2"}))
    model = Checkpoint(folder, {"text_encoder": "transformers.CLIPTextModel"}).load("text_encoder")
    assert model.config._attn_implementation == "sdpa"  # type: ignore[union-attr]


def test_quantized_weights_are_refused_by_name(tiny_checkpoint: Path, tmp_path: Path) -> None:
    from sdopt.errors import CheckpointError
    from sdopt.export.checkpoint import Checkpoint

    folder = Path(shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint"))
    path = folder / "text_encoder/config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "quantization_config": {"quant_method": "mxfp4"}}))
    with pytest.raises(CheckpointError, match="its weights are quantized"):
        Checkpoint(folder, {"text_encoder": "transformers.CLIPTextModel"}).load("text_encoder")
