"""Build the images of the Dockerfile and try them out. It needs root, buildah, mmdebstrap and no container engine.

    python docker/prove.py cpu server             on a Debian that mmdebstrap makes, where no registry can be reached
    python docker/prove.py cpu server --pinned    on the bases that the Dockerfile names
    python docker/prove.py cpu --record           write the sizes into sizes.json

The images stay in the storage of buildah, as localhost/sdopt-prove:TARGET.

Each check runs a command of an image as an engine runs it: its entry point as process 1 with its environment alone, in
namespaces of its own, on a read-only root with /tmp and /dev in memory. It prints a line for each check,
and ends with 1 where one fails.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import checks

ROOT = Path(__file__).resolve().parent.parent
SIZES = ROOT / "docker/sizes.json"
DEBIAN = "localhost/sdopt-debian"


def output(*words: object) -> str:
    """What a command prints. Raises: CalledProcessError, after what it said on stderr."""
    return subprocess.run([str(word) for word in words], check=True, stdout=subprocess.PIPE, text=True).stdout.strip()


def make_debian() -> None:
    """A base of Debian's packages alone, which has Python and can make virtual environments."""
    if subprocess.run(["buildah", "inspect", "--type", "image", DEBIAN], capture_output=True).returncode == 0:
        return
    with tempfile.TemporaryDirectory() as folder:
        tar = Path(folder) / "debian.tar"
        packages = "--include=python3,python3-venv,ca-certificates"
        subprocess.run(["mmdebstrap", "--quiet", "--variant=minbase", packages, "bookworm", tar], check=True)
        container = output("buildah", "from", "scratch")
        output("buildah", "add", "--quiet", container, tar, "/")
        output("buildah", "commit", "--quiet", "--rm", container, DEBIAN)


def pip_settings(folder: Path) -> list[str]:
    """Options of buildah by which pip in a build takes packages from where this machine's pip takes them.

    They are mounts, so that no image and no line of the Dockerfile has them.
    """
    settings: dict[str, str] = {}
    pip = [sys.executable, "-m", "pip", "config", "list"]
    for line in subprocess.run(pip, capture_output=True, text=True, check=False).stdout.splitlines():
        name, _, value = line.partition("=")
        settings[name.rpartition(".")[2]] = value.strip("'").replace("\\n", " ")
    conf = folder / "pip.conf"
    conf.write_text("[global]\n" + "".join(f"{name} = {value}\n" for name, value in settings.items()))
    paths = [Path(word.removeprefix("file://")) for value in settings.values() for word in value.split()]
    trees = {path.parent if path.name == "simple" else path for path in paths}  # the files lie beside the index
    mounts = {path for path in trees if path.is_absolute() and path.exists()}
    return [f"--volume={conf}:/etc/pip.conf:ro", *(f"--volume={path}:{path}:ro" for path in sorted(mounts))]


def build(target: str, arguments: Sequence[str]) -> str:
    """Build a target. Returns the name of the image."""
    name = f"localhost/sdopt-prove:{target}"
    with tempfile.TemporaryDirectory() as folder:
        command = ["buildah", "bud", "--quiet", "--isolation", "chroot", "--format", "docker", "--layers"]
        command += [*pip_settings(Path(folder)), *(f"--build-arg={one}" for one in arguments)]
        command += ["--target", target, "--tag", name, "-f", str(ROOT / "docker/Dockerfile"), str(ROOT)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return name


@dataclass(frozen=True)
class Image:
    """An image that was built: its configuration, as the Dockerfile gives it, and the folder that its files are in."""

    target: str
    config: dict[str, Any]
    root: Path

    @classmethod
    @contextmanager
    def opened(cls, target: str, name: str) -> Iterator[Image]:
        config = json.loads(output("buildah", "inspect", "--type", "image", name))["Docker"]["config"]
        container = output("buildah", "from", name)
        try:
            yield cls(target, config, Path(output("buildah", "mount", container)))
        finally:
            output("buildah", "rm", container)

    def command(self, words: Sequence[str], user: str = "") -> list[str]:
        """`words` in the image's file system, environment and folder, as its user or another one."""
        user = user or self.config["User"]
        user = user if ":" in user else f"{user}:0"
        environment = ["/usr/bin/env", "-i", "-C", self.config["WorkingDir"], *self.config["Env"]]
        return ["chroot", f"--userspec={user}", "--groups=", str(self.root), *environment, *words]

    def start(
        self, *words: str, user: str = "", mounts: dict[str, Path] | None = None, entrypoint: str = ""
    ) -> subprocess.Popen[str]:
        """Start the entry point, or another one, with `words` after it. `mounts`: what an engine's `-v` mounts."""
        lines = ["set -e", 'mount --bind "$1" "$1"', 'cd "$1"']
        for place, source in (mounts or {}).items():
            inner = self.root / place.lstrip("/")
            (inner if source.is_dir() else inner.parent).mkdir(parents=True, exist_ok=True)
            if not source.is_dir():
                inner.touch()
            lines.append(f"mount --bind {shlex.quote(str(source))} {shlex.quote(place.lstrip('/'))}")
        lines += ["mount -t proc proc proc", "mount -t tmpfs -o mode=1777 tmpfs tmp", "mount -t tmpfs tmpfs dev"]
        lines += ["for name in null zero random urandom; do touch dev/$name; mount --bind /dev/$name dev/$name; done"]
        lines += ["mkdir -m 1777 dev/shm", "mount -o remount,bind,ro .", "ip link set lo up", "shift", 'exec "$@"']
        command = self.command([*([entrypoint] if entrypoint else self.config["Entrypoint"]), *words], user)
        spaces = ["unshare", "--mount", "--pid", "--net", "--ipc", "--fork", "--kill-child"]
        shell = [*spaces, "sh", "-c", "\n".join(lines), "sh", str(self.root), *command]
        return subprocess.Popen(shell, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    def run(self, *words: str, **options: Any) -> tuple[int, str]:
        """As `start`, to its end. Returns the exit code, and what it printed."""
        process = self.start(*words, **options)
        text, _ = process.communicate(timeout=300)
        return process.returncode, text

    def megabytes(self) -> int:
        """The size of /opt/sdopt."""
        total = 0
        for folder, _, names in os.walk(self.root / "opt/sdopt"):
            total += sum(os.lstat(os.path.join(folder, name)).st_size for name in names)
        return round(total / 1e6)


def prove(target: str, name: str, sizes: dict[str, Any]) -> bool:
    """Run each check of a target, and print a line for each. Whether all passed."""
    ok = True
    with Image.opened(target, name) as image:
        sizes[target]["measured"] = image.megabytes()
        every: dict[str, Callable[[Image], None]] = {
            f"{sizes[target]['measured']} MB of at most {sizes[target]['budget']}": lambda _: checks.at_most(
                sizes[target]["measured"], sizes[target]["budget"]
            ),
            **{str(one.__doc__).strip(): one for one in checks.of(target)},
        }
        for what, check in every.items():
            try:
                check(image)
                print(f"ok    {target}: {what}", flush=True)
            except (AssertionError, subprocess.SubprocessError, OSError) as error:
                ok = False
                print(f"FAIL  {target}: {what}\n{error}", flush=True)
    return ok


def main() -> int:
    sizes = json.loads(SIZES.read_text())
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("targets", nargs="+", choices=[name for name in sizes if name != "unit"], metavar="TARGET")
    parser.add_argument("--pinned", action="store_true", help="build on the bases that the Dockerfile names")
    parser.add_argument("--build-arg", action="append", default=[], metavar="NAME=VALUE", help="for the Dockerfile")
    parser.add_argument("--record", action="store_true", help="write the sizes into sizes.json")
    args = parser.parse_args()
    if os.geteuid() != 0:
        parser.error("it mounts file systems: run it as root")
    if not args.pinned:
        make_debian()
        args.build_arg = [f"BASE={DEBIAN}", f"CUDA_BASE={DEBIAN}", *args.build_arg]
    ok = True
    for target in args.targets:
        ok &= prove(target, build(target, args.build_arg), sizes)
    if args.record:
        lines = [f"  {json.dumps(name)}: {json.dumps(entry)}" for name, entry in sizes.items()]
        SIZES.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
