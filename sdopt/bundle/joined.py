"""Engines of a step that adapters steer: how they and their inputs are called, and which files of adapters they use.

    unet_step.canny.pose                          the step with the ControlNets canny and pose inside
    control_image.canny, conditioning_scale.canny what canny is given beside what the UNet is given
    unet_step+t2i_adapter                         the step that takes the features of T2I-Adapters, whichever they are
    unet_step.canny+ip_adapter                    the step with canny inside, which takes image prompts too
    unet_deep_2, unet_shallow_2                   the two halves of a feature cache of depth 2; unet_step_deep_2, ...
    adapters/canny/controlnet.onnx                a file of canny, as the bundle's folder has it

A name of an adapter has no dot and no plus. Names and kinds are in alphabetical order.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from sdopt.bundle.adapter import ADAPTERS, IP_ADAPTER, T2I_ADAPTER, Adapter
from sdopt.bundle.files import ModelFolder
from sdopt.bundle.specs import Range
from sdopt.dataclass import dataclass
from sdopt.errors import BundleError

PICTURE, SCALE = "control_image", "conditioning_scale"  # inputs of a ControlNet
FEATURE_SCALE = "feature_scale"  # input of a step that takes features: 0 in calls without them, else 1
GIVING = (IP_ADAPTER, T2I_ADAPTER)  # kinds that run before the loop: the step takes what they give
PICTURES: Range = (1, 1, 4)  # that an IP-Adapter sees in one request, where a profile does not say
FEATURE, KEPT, TYPE = "control_feature", "control_kept", "control_type"  # inputs of a union one, which sees no picture
DEEP, SHALLOW = "deep", "shallow"  # the UNets of a feature cache: one gives the tensor `deep`, the other one takes it


@dataclass(frozen=True)
class Steering:
    """What steers an engine: the ControlNets inside of it, and of which kinds of adapters it takes what they give."""

    nets: tuple[str, ...] = ()
    kinds: tuple[str, ...] = ()

    @staticmethod
    def of(name: str) -> Steering:
        """That of an engine: `Steering(("canny",), ("ip_adapter",))` of "unet_step.canny+ip_adapter"."""
        inside, *kinds = name.split("+")
        return Steering(tuple(inside.split(".")[1:]), tuple(kinds))

    def named(self, engine: str) -> str:
        """The engine that is `engine` with this steering."""
        return "+".join((".".join((engine, *sorted(self.nets))), *sorted(self.kinds)))

    def __bool__(self) -> bool:
        return bool(self.nets or self.kinds)


PLAIN = Steering()


def engine_of(name: str) -> str:
    """What an engine is made of: "unet_step" of "unet_step.canny+ip_adapter" and of "unet_step_deep_2"."""
    own, depth = depth_of(name.partition("+")[0].partition(".")[0])
    return own.rpartition("_")[0] if depth else own


def divided(dimension: str, by: int) -> str:
    """The dimension of a feature that is so many times smaller than the latents: "latent_height_over_2"."""
    return dimension if by == 1 else f"{dimension}_over_{by}"


def divisor_of(dimension: str) -> tuple[str, int]:
    """The dimension of the latents, and how many times smaller: ("latent_height", 2) of "latent_height_over_2"."""
    own, _, by = dimension.partition("_over_")
    return own, int(by or 1)


def cached_engine(unet: str, kind: str, depth: int) -> str:
    """The engine of a feature cache of this depth: "unet_deep_2" of ("unet", DEEP, 2)."""
    return f"{unet}_{kind}_{depth}"


def depth_of(name: str) -> tuple[str, int]:
    """("unet_deep", 2) of "unet_deep_2", an engine of a feature cache; of any other one its name, and depth 0."""
    own, _, depth = name.rpartition("_")
    is_cached = own.endswith((f"_{DEEP}", f"_{SHALLOW}")) and depth.isdecimal()
    return (own, int(depth)) if is_cached else (name, 0)


def shallow_depth(name: str) -> int:
    """The depth of an engine that takes deep features; 0 of any other one."""
    own, depth = depth_of(name)
    return depth if own.endswith(f"_{SHALLOW}") else 0


def picture_input(net: str) -> str:
    return f"{PICTURE}.{net}"


def scale_input(net: str) -> str:
    return f"{SCALE}.{net}"


def file_of(net: str, name: str) -> str:
    """A file of an adapter, as the record of an engine lists it."""
    return f"{ADAPTERS}/{net}/{name}"


def adapter_hashes(bundle: ModelFolder, names: Iterable[str]) -> Mapping[str, str]:
    """The SHA-256 of those files of adapters, by `names` such as `file_of` gives, that the bundle has now."""
    hashes: dict[str, str] = {}
    for net in {parts[1] for parts in (name.split("/", 2) for name in names) if len(parts) == 3}:
        try:
            files = Adapter.read_manifest(bundle.path / ADAPTERS / net).files
        except BundleError:  # it was deleted or damaged
            continue
        hashes |= {file_of(net, name): file.sha256 for name, file in files.items()}
    return hashes
