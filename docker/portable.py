"""Python packages, or a whole Python with TensorRT, for a machine without a network: packed here, unpacked there.

    python docker/portable.py site -o build-out/site                   packages for the Python 3.12 that is there
    python docker/portable.py tensorrt-8.6 -o build-out/tensorrt-8.6   Python 3.10 with TensorRT 8.6.0 and the packages

The output is a folder of pieces, none larger than --piece, with `unpack.sh`. Copy all of it there, and run
`sh unpack.sh FOLDER`: it checks every piece, unpacks them and prints the commands. Both trees are for Linux on x86-64
and need tar and xz there. sdopt itself is not in them: the commands run where this repository is.

TensorRT 8.6.0 is the newest whole TensorRT in one wheel of PyPI, and Python 3.10 the newest that it has bindings for.
Its plugin library links cuBLAS and cuDNN; stand-ins take their place, whose functions all fail. `sdopt build` asks for
no kernels of theirs. NVIDIA's licences do not allow to publish what is packed: keep it out of any repository.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import tomllib
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]
BUNDLE = ROOT / "engines/emoji/bundle"
MB = 1_000_000
XZ_HELP = "the level of xz (default: 9, whose window of 64 MB finds what is alike in TensorRT's kernels; quick: 0)"
PLATFORMS = [f"manylinux_2_{n}_x86_64" for n in (28, 27, 24, 17)] + ["manylinux2014_x86_64"]
EXTRAS = ("cpu", "build", "tensorrt")
NOT_PACKED = ("tensorrt",)  # of PyPI it only fetches gigabytes of libraries from elsewhere
# tokenizers names huggingface-hub and all that this needs, for downloads that sdopt never asks for
WITHOUT_THEIR_OWN = ("tokenizers",)
ADDITIONS = {
    "onnxruntime-gpu": ["onnxruntime-gpu"],  # with the CUDA and cuDNN that it finds there
    "tensorrt-rtx": ["tensorrt-rtx-cu13-libs", "tensorrt-rtx-cu13-bindings", "tensorrt-rtx-cu13"],
    "tensorrt-lean": ["tensorrt-lean-cu13-libs", "tensorrt-lean-cu13-bindings"],
}
SOURCES = ("tensorrt-rtx-cu13",)  # a few lines of Python, which have no wheel
NOT_IN_PYTHON = (
    "test", "tests", "idlelib", "tkinter", "lib2to3", "ensurepip", "turtledemo", "__pycache__", "site-packages",
    "config-3.10-*", "_tkinter*", "*.a",
)  # fmt: skip
THERE = r"(ld-linux|libc|libm|libdl|librt|libpthread|libutil|libgcc_s|libstdc\+\+|linux-vdso)[.-]"  # on every Linux
STAND_INS = {"libcublas.so.12": "cublas(?!Lt)", "libcublasLt.so.12": "cublasLt", "libcudnn.so.8": "cudnn"}

SITE_RUN = """#!/bin/sh
# Python with the packages of sdopt: ./run -m sdopt doctor. PYTHON names the Python {python} (default: python3).
here=$(cd "$(dirname "$0")" && pwd)
export PYTHONPATH="$here/site:$PWD${{PYTHONPATH:+:$PYTHONPATH}}"
exec "${{PYTHON:-python3}}" "$@"
"""
OWN_RUN = """#!/bin/sh
# A Python {python} of its own, with TensorRT and the packages of sdopt: ./run -m sdopt doctor.
here=$(cd "$(dirname "$0")" && pwd)
export PYTHONHOME="$here/python" PYTHONPATH="$here/tensorrt:$PWD" PYTHONNOUSERSITE=1 CUDA_MODULE_LOADING=LAZY
export LD_LIBRARY_PATH="$here/python/lib${{LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}}"
exec "$here/python/bin/python{python}" "$@"
"""
UNPACK = """#!/bin/sh
# sh unpack.sh FOLDER: checks the pieces beside this script, and unpacks them into FOLDER.
set -eu
[ $# -eq 1 ] || {{ echo "unpack.sh: no FOLDER given; type: sh $0 FOLDER" >&2; exit 2; }}
here=$(cd "$(dirname "$0")" && pwd)
(cd "$here" && sha256sum --check --quiet SHA256) || {{
  echo "unpack.sh: a piece in $here is missing or damaged, see above; copy it again" >&2; exit 1; }}
mkdir -p "$1"
folder=$(cd "$1" && pwd)
for archive in {archives}; do
  cat "$here/$archive".tar.xz.* | xz -dc -T0 | tar -x --no-same-owner -C "$folder" -f -
done
cp "$here/run" "$folder/run"
chmod +x "$folder/run"
echo "In the folder of the repository of sdopt:"
{commands}
"""
COMMANDS = {
    "site": ["-m sdopt doctor", "-m sdopt build BUNDLE --backend ort", '-m sdopt generate "a red apple" -o apple.png'],
    "tensorrt-8.6": [
        "-m sdopt doctor",
        "-m sdopt build BUNDLE --backend tensorrt",
        '-m sdopt generate "a red apple" -m BUNDLE --backend tensorrt -o apple.png',
        "-m pytest tests/engine/test_gpu.py",
    ],
}


@dataclass(frozen=True)
class Order:
    """What was asked for: the Python that runs here and like which one runs there, and more packages."""

    executable: Path
    additions: Sequence[str] = ()


@dataclass(frozen=True)
class Tree:
    """One kind of tree: the Python it is for, and what puts it into a folder; its archives are that folder's."""

    python: str
    fill: Callable[[Path, Order], None]
    run: str


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("tree", choices=TREES)
    add("-o", "--output", type=Path, required=True, metavar="FOLDER", help="for the pieces; made anew")
    add("--piece", type=float, default=60, metavar="MB", help="the largest piece, in 10^6 bytes (default: 60)")
    add("--xz", type=int, default=9, choices=range(10), metavar="0-9", help=XZ_HELP)
    add("--with", dest="additions", action="append", default=[], choices=ADDITIONS, help="site: pack this too")
    add("--python", type=Path, metavar="FILE", help="the Python of that version here (default: it is looked for)")
    add("--no-check", action="store_true", help="do not unpack and try the tree here")
    add("--check-only", action="store_true", help="do not pack: unpack and try what is in FOLDER")
    args = parser.parse_args()
    tree = TREES[args.tree]
    if args.piece < 1:
        parser.error(f"--piece {args.piece}: allowed is 1 or more, in MB")
    if args.additions and args.tree != "site":
        parser.error(f"--with is for the tree site; {args.tree} has its own TensorRT")
    order = Order(args.python or find_python(tree.python), args.additions)
    if args.check_only and not (args.output / "unpack.sh").is_file():
        parser.error(
            f"--check-only: {args.output} has no unpack.sh; pack it first: portable.py {args.tree} -o {args.output}"
        )
    if not args.check_only:
        pack(args.tree, order, args.output, int(args.piece * MB), args.xz)
    if not args.no_check:
        check(args.tree, order, args.output)


def find_python(version: str) -> Path:
    """A Python of this version on this machine."""
    candidates = [
        shutil.which(f"python{version}"),
        *Path.home().glob(f".pyenv/versions/{version}.*/bin/python{version}"),
    ]
    for path in filter(None, candidates):
        ask = [path, "-c", "import sys; print('%d.%d' % sys.version_info[:2])"]
        if subprocess.run(ask, capture_output=True, text=True, check=False).stdout.strip() == version:
            return Path(path)
    sys.exit(f"portable.py: there is no Python {version} here; install it, or name it with --python")


def pack(name: str, order: Order, output: Path, piece: int, level: int) -> None:
    """Fill a tree, and write it into `output` as pieces with their sums and `unpack.sh`."""
    tree, started = TREES[name], time.perf_counter()
    if output.exists():
        shutil.rmtree(output)
    output.mkdir(parents=True)
    with tempfile.TemporaryDirectory(prefix="sdopt-portable-") as temporary:
        folder = Path(temporary)
        tree.fill(folder, order)
        print(f"filled in {time.perf_counter() - started:.0f} s")
        archives = sorted(path.name for path in folder.iterdir())
        for archive in archives:
            compress(folder, archive, output, piece, level)
    (output / "run").write_text(tree.run.format(python=tree.python))
    finish(output, archives, COMMANDS[name])
    size = sum(path.stat().st_size for path in output.iterdir())
    pieces = len(list(output.glob("*.tar.xz.*")))
    print(f"{output}: {pieces} pieces, {size / MB:.1f} MB, {time.perf_counter() - started:.0f} s")


def compress(folder: Path, name: str, output: Path, piece: int, level: int) -> None:
    """`name` in `folder` as NAME.tar.xz.000 and so on, each of at most `piece` bytes.

    The same files give the same bytes, so that a piece that did not change need not be copied again.
    """
    same = ["--sort=name", "--mtime=@0", "--owner=0", "--group=0", "--numeric-owner"]
    tar = subprocess.Popen(["tar", *same, "-C", str(folder), "-cf", "-", name], stdout=subprocess.PIPE)
    xz = subprocess.Popen(["nice", "xz", "-T0", f"-{level}", "-c"], stdin=tar.stdout, stdout=subprocess.PIPE)
    assert tar.stdout is not None
    assert xz.stdout is not None
    tar.stdout.close()
    number, more = 0, True
    while more:
        part = output / f"{name}.tar.xz.{number:03}"
        more = _copied(xz.stdout, part, piece)
        number += 1
    codes = {"tar": tar.wait(), "xz": xz.wait()}
    if any(codes.values()):
        ends = " and ".join(f"{program} ended with code {code}" for program, code in codes.items() if code)
        sys.exit(f"portable.py: packing {name}: {ends}; if memory is short (code -9), give a lower --xz")


def _copied(stream: BinaryIO, part: Path, most: int) -> bool:
    """Write at most `most` bytes into `part`; whether there may be more. A piece without a byte is not left."""
    written = 0
    with part.open("wb") as file:
        while written < most and (block := stream.read(min(MB, most - written))):
            written += file.write(block)
    if not written:
        part.unlink()
    return written == most


def finish(output: Path, archives: Iterable[str], commands: Iterable[str]) -> None:
    """Write the sums and the script that unpacks."""
    parts = sorted(output.iterdir())
    sums = [f"{hashlib.sha256(part.read_bytes()).hexdigest()}  {part.name}\n" for part in parts]
    (output / "SHA256").write_text("".join(sums))
    lines = [f"echo '  '\"$folder\"/run '{command}'" for command in commands]
    (output / "unpack.sh").write_text(UNPACK.format(archives=" ".join(archives), commands="\n".join(lines)))


def fill_site(folder: Path, order: Order) -> None:
    """The packages, in `site`."""
    install(folder / "site", "3.12", order, Path(sys.executable))


def fill_tensorrt(folder: Path, order: Order) -> None:
    """A Python of its own with the packages in `python`, and TensorRT in `tensorrt`."""
    with tempfile.TemporaryDirectory() as temporary:
        download = ["download", "--no-deps", "--python-version", "3.10", "--platform", "manylinux_2_17_x86_64"]
        pip(order.executable, *download, "--only-binary=:all:", "-d", temporary, "tensorrt==8.6.0")
        with zipfile.ZipFile(next(Path(temporary).glob("*.whl"))) as wheel:
            wheel.extractall(folder / "tensorrt")
    copy_python(order.executable, folder / "python")
    stand_ins(folder / "tensorrt/tensorrt/libnvinfer_plugin.so.8", folder / "python/lib")
    install(folder / "python/lib/python3.10/site-packages", "3.10", order, order.executable)


def install(target: Path, python: str, order: Order, by: Path) -> None:
    """The packages that sdopt and its extras need, for Python `python`, in `target`."""
    wanted = requirements(python, order.additions)
    alone = [entry for entry in wanted if Requirement(entry).name in WITHOUT_THEIR_OWN]
    built = [entry for entry in wanted if Requirement(entry).name in SOURCES]
    others = [entry for entry in wanted if entry not in (*alone, *built)]
    where = ["install", "--no-compile", "--only-binary=:all:", "--python-version", python, "--target", str(target)]
    where += [word for platform in PLATFORMS for word in ("--platform", platform)]
    pip(by, *where, *others)
    pip(by, *where, "--no-deps", *alone)
    for entry in built:
        with tempfile.TemporaryDirectory() as temporary:
            pip(by, "wheel", "--no-deps", "-w", temporary, entry)
            pip(by, *where, "--no-deps", *map(str, Path(temporary).glob("*.whl")))


def requirements(python: str, additions: Iterable[str] = ()) -> list[str]:
    """What pyproject.toml asks for on Python `python`, beside it pytest and the additions."""
    project: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    entries: list[str] = [*project["dependencies"], "pytest"]
    for extra in EXTRAS:
        entries += project["optional-dependencies"][extra]
    environment = {"python_version": python, "python_full_version": f"{python}.0", "extra": ""}
    wanted: list[str] = []
    for entry in map(Requirement, entries):
        if entry.name not in ("sdopt", *NOT_PACKED) and (not entry.marker or entry.marker.evaluate(environment)):
            wanted.append(f"{entry.name}{entry.specifier}")
    if "onnxruntime-gpu" in additions:  # both have the module `onnxruntime`
        wanted = [entry for entry in wanted if Requirement(entry).name != "onnxruntime"]
    return wanted + [entry for name in additions for entry in ADDITIONS[name]]


def pip(python: Path, *words: str) -> None:
    command = [str(python), "-m", "pip", "--quiet", "--disable-pip-version-check", *words]
    if subprocess.run(command, check=False).returncode:
        sys.exit(f"portable.py: pip failed, see above: {' '.join(words)}")


def copy_python(executable: Path, target: Path) -> None:
    """The Python of `executable` with the libraries that it needs and not every Linux has; its symbols stay here."""
    ask = [executable, "-c", "import sys; print(sys.base_prefix)"]
    home = Path(subprocess.run(ask, capture_output=True, text=True, check=True).stdout.strip())
    library = target / "lib/python3.10"
    shutil.copytree(home / "lib/python3.10", library, ignore=shutil.ignore_patterns(*NOT_IN_PYTHON))
    (target / "bin").mkdir()
    binary = Path(shutil.copy(home / "bin/python3.10", target / "bin/python3.10"))
    native = [binary, *library.glob("lib-dynload/*.so")]
    for path in native:
        for name, found in re.findall(r"(\S+) => (/\S+)", output_of("ldd", path)):
            if not re.match(THERE, name):
                shutil.copy(found, target / "lib" / name)
    subprocess.run(["strip", *map(str, native)], check=True)


def stand_ins(plugins: Path, target: Path) -> None:
    """Libraries with the functions of cuBLAS and cuDNN that TensorRT's plugins name; each returns an error."""
    names = re.findall(r" U (\w+)", output_of("nm", "-D", "--undefined-only", plugins))
    for library, pattern in STAND_INS.items():
        source, versions = (target / f"{library}{suffix}" for suffix in (".c", ".map"))
        source.write_text("".join(f"int {name}(void) {{ return 1; }}\n" for name in names if re.match(pattern, name)))
        versions.write_text(f"{library} {{ global: *; }};\n")
        command = ["gcc", "-shared", "-fPIC", "-s", f"-Wl,-soname,{library}", f"-Wl,--version-script,{versions}"]
        subprocess.run([*command, "-o", str(target / library), str(source)], check=True)
        source.unlink()
        versions.unlink()


def output_of(*command: str | Path) -> str:
    return subprocess.run([str(word) for word in command], capture_output=True, text=True, check=True).stdout


def check(name: str, order: Order, output: Path) -> None:
    """Unpack the tree here, and run it with nothing of this environment until only the driver is missing."""
    with tempfile.TemporaryDirectory(prefix="sdopt-portable-") as temporary:
        folder = Path(temporary)
        started = time.perf_counter()
        subprocess.run(["sh", str(output / "unpack.sh"), str(folder / "tree")], check=True)
        print(f"unpacked in {time.perf_counter() - started:.0f} s")
        bundle = shutil.copytree(BUNDLE, folder / "bundle", ignore=shutil.ignore_patterns("engines"))
        environment = {"PATH": "/usr/bin:/bin", "HOME": str(folder), "PYTHON": str(order.executable.absolute())}
        picture = ["-m", "sdopt", "generate", "a red apple", "--steps", "2", "-o", str(folder / "apple.png")]
        build = ["-m", "sdopt", "build", str(bundle), "--backend"]
        driver = "there is no NVIDIA driver"
        tries: list[tuple[list[str], str]] = [
            (["-m", "sdopt", "doctor"], ""),
            (picture, ""),
            ([*build, "tensorrt"], driver),
            (["-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/engine/test_gpu.py"], ""),
        ]
        if name != "site":
            tries.append((["-c", "import tensorrt; print(tensorrt.__version__)"], ""))
            tries.append(([*picture, "--backend", "tensorrt"], driver))
        if "tensorrt-rtx" in order.additions:
            tries.append(([*build, "tensorrt-rtx"], ""))
            tries.append(([*picture, "-m", str(bundle), "--backend", "tensorrt-rtx"], driver))
        for words, missing in tries:
            started = time.perf_counter()
            done = subprocess.run(
                [folder / "tree/run", *words], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
            )
            print(f"  run {' '.join(words)}: {done.returncode}, {time.perf_counter() - started:.1f} s")
            for line in (done.stdout + done.stderr).splitlines()[-9:]:
                print(f"    {line[:160]}")
            if done.returncode and not (missing and missing in done.stderr):
                sys.exit(f"portable.py: the tree in {output} does not work here, see above")
    print("the tree works" + (", but for the driver that is not here" if not os.path.exists("/dev/nvidia0") else ""))


TREES = {
    "site": Tree("3.12", fill_site, SITE_RUN),
    "tensorrt-8.6": Tree("3.10", fill_tensorrt, OWN_RUN),
}

if __name__ == "__main__":
    main()
