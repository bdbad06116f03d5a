"""A pool of engines: shared by threads, and no call loses the engines that it began with."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier, Event, Thread
from typing import Any

import numpy as np
import pytest

import sdopt
from sdopt.bundle.files import Bundle
from sdopt.engine import BACKENDS, installed_backends
from sdopt.engine.pool import EnginePool
from sdopt.errors import UsageError
from tests.conftest import EMOJI_BUNDLE

OPTIONS: dict[str, Any] = {"num_inference_steps": 3, "height": 64, "width": 64, "output_type": "np"}


@pytest.fixture
def bundle() -> Bundle:
    return Bundle.open(EMOJI_BUNDLE, verify=False)


@pytest.fixture
def low(bundle: Bundle) -> Iterator[EnginePool]:
    with EnginePool(bundle, "ort:cpu", memory="low", threads=1) as pool:
        yield pool


def test_threads_that_need_a_component_at_once_share_its_engine(bundle: Bundle) -> None:
    barrier = Barrier(4)

    def opened(_: int) -> int:
        barrier.wait()
        return id(pool.open("vae_encoder"))

    with EnginePool(bundle, "ort:cpu", threads=1) as pool, ThreadPoolExecutor(4) as threads:
        assert len(set(threads.map(opened, range(4)))) == 1
        assert pool.opened == ("vae_encoder",)


def test_an_engine_that_is_used_outlives_its_release(low: EnginePool) -> None:
    latents = np.zeros((1, 4, 8, 8), np.float32)
    with low.using("vae_decoder") as decoder:
        low.open("vae_encoder")  # which retires the decoder
        assert low.opened == ("vae_encoder",)
        assert decoder(latent_sample=latents)["sample"].shape == (1, 3, 64, 64)
        low.close()
        decoder(latent_sample=latents)
    with pytest.raises(UsageError, match="closed"):
        decoder(latent_sample=latents)


def test_who_asks_after_a_release_gets_a_new_engine(low: EnginePool) -> None:
    with low.using("vae_decoder") as old:
        low.release("vae_decoder")
        with low.using("vae_decoder") as new:
            assert new is not old


def test_an_engine_that_is_given_is_used_and_not_closed(bundle: Bundle) -> None:
    class Given:
        inputs = outputs = ()
        closed = False

        def __call__(self, **arrays: Any) -> Any:
            return {}

        def close(self) -> None:
            self.closed = True

        def __enter__(self) -> Given:
            return self

        def __exit__(self, *_: object) -> None: ...

    given = Given()
    with EnginePool(bundle, given={"unet_step": given}) as pool:
        assert pool.open("unet_step") is given
        assert "unet_step" in pool.built
        assert pool.opened == ()
    assert not given.closed


@pytest.mark.parametrize("backend", [name for name in installed_backends() if BACKENDS[name].precisions])
@pytest.mark.parametrize("memory", ["fast", "low"])
def test_pictures_of_threads_survive_releases_and_other_threads(bundle: Bundle, memory: str, backend: str) -> None:
    with sdopt.Pipeline(EnginePool(bundle, backend, memory=memory, threads=1)) as pipe:
        expected = [pipe("a red apple", seed=seed, **OPTIONS).images for seed in range(3)]
        done = Event()

        def disturb() -> None:
            while not done.wait(0.02):
                pipe.release("unet")
                pipe.release("vae_decoder")
                pipe.close()

        disturber = Thread(target=disturb)
        disturber.start()
        try:
            with ThreadPoolExecutor(3) as threads:
                found = list(threads.map(lambda i: pipe("a red apple", seed=i % 3, **OPTIONS).images, range(9)))
        finally:
            done.set()
            disturber.join()
    for i, picture in enumerate(found):
        np.testing.assert_array_equal(picture, expected[i % 3])
