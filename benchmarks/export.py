"""How long the export of a full-size pipeline takes, and how much memory.

    python benchmarks/export.py sdxl -o FOLDER      makes FOLDER/checkpoint and FOLDER/bundle, prints one line of JSON

The export runs in a process of its own; its peak counts every page that it touched, also those of files it mapped,
which the system takes back when it needs them. `anonymous` is what it cannot: sampled from /proc ten times a second.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path


def measure(command: list[str]) -> dict[str, float]:
    """Seconds, and peaks in GB, of a command that must succeed."""
    started, peaks = time.perf_counter(), {"VmHWM": 0.0, "RssAnon": 0.0}
    process = subprocess.Popen(command)
    while process.poll() is None:
        try:
            lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
        except OSError:  # it has just ended
            break
        for key, _, value in (line.partition(":") for line in lines):
            if key in peaks:
                peaks[key] = max(peaks[key], int(value.split()[0]) * 1024 / 1e9)
        time.sleep(0.1)
    if process.wait():
        raise SystemExit(f"{' '.join(command)}: exit code {process.returncode}")
    seconds = time.perf_counter() - started
    return {"seconds": round(seconds, 1), "peak": round(peaks["VmHWM"], 2), "anonymous": round(peaks["RssAnon"], 2)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="of benchmarks/models.py, e.g. sdxl")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="FOLDER")
    args = parser.parse_args()
    checkpoint, bundle = args.output / "checkpoint", args.output / "bundle"
    if not checkpoint.exists():
        models = Path(__file__).with_name("models.py")
        subprocess.run([sys.executable, str(models), args.model, "-o", str(checkpoint)], check=True)
    found = measure([sys.executable, "-m", "sdopt", "export", str(checkpoint), "-o", str(bundle), "--force"])
    weights = sum(path.stat().st_size for path in checkpoint.rglob("*.safetensors")) / 1e9
    print(json.dumps({"model": args.model, "weights": round(weights, 2), **found, "units": "s, GB"}))


if __name__ == "__main__":
    main()
