"""A download is compared with the room on the disk before it begins; where the hub gives no sizes, it just begins."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest

from sdopt.errors import BundleError, CheckpointError
from sdopt.export import hub

FILES = {
    "model_index.json": 500, "unet/diffusion_pytorch_model.safetensors": 10**18, "unet/config.json": 900,
    "unet/diffusion_pytorch_model.fp16.safetensors": 10**6, "README.md": 10**19, "model.ckpt": 10**19,
}  # fmt: skip


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Any]:
    """What the hub is asked: its answers are here, since no test reaches for a network."""
    questions: list[Any] = []

    class Api:
        def model_info(self, repo_id: str, **options: Any) -> Any:
            questions.append((repo_id, options))
            siblings = [SimpleNamespace(rfilename=name, size=size) for name, size in FILES.items()]
            return SimpleNamespace(sha="a" * 40, siblings=siblings)

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "none/hub"))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **options: questions.append(options) or "here")
    return questions


def test_what_does_not_fit_is_not_begun(asked: list[Any], tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"has .* free, about 1000000000.00 GB needed; free some space") as caught:
        hub.download("owner/name", "main", None, offline=False)
    assert str(caught.value).startswith(str(tmp_path))
    assert [question[0] for question in asked] == ["owner/name"]
    assert asked[0][1]["revision"] == "main"


def test_only_the_files_that_are_downloaded_count(asked: list[Any]) -> None:
    assert hub.download("owner/name", None, "fp16", offline=False) == Path("here")
    assert hub.download("owner/name", None, None, offline=False, weights=False) == Path("here")
    assert len(asked) == 4


def test_files_in_the_cache_need_no_room(asked: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def cached(repo_id: str, name: str, **_: Any) -> str | None:
        return f"/cache/{name}" if "unet" in name else None

    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", cached)
    assert hub.download("owner/name", None, None, offline=False) == Path("here")


@pytest.mark.parametrize("offline", ["asked for", "by the environment"])
def test_offline_nothing_is_asked(offline: str, asked: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", offline == "by the environment")
    assert hub.download("owner/name", None, None, offline=offline == "asked for") == Path("here")
    assert len(asked) == 1


@pytest.mark.parametrize("error", [OSError("no network"), ValueError("x"), RuntimeError("y"), KeyError("z")])
def test_a_question_that_fails_stops_nothing(
    error: Exception, asked: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any, **__: Any) -> Any:
        raise error

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", fails)
    assert hub.download("owner/name", None, None, offline=False) == Path("here")
    assert len(asked) == 1


def test_what_is_not_there_offline_is_said_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(CheckpointError, match="owner/name is not in the local cache"):
        hub.download("owner/name", None, None, offline=True)
