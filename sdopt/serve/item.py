"""An order on its way through the step loop, what it costs, and what is told of it."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field

from sdopt.bundle.joined import SHALLOW, shallow_depth
from sdopt.bundle.specs import Float32
from sdopt.denoise.batch import Job
from sdopt.denoise.model import Predict
from sdopt.errors import SdoptError, UsageError
from sdopt.request.plan import Plan
from sdopt.serve.costs import Costs
from sdopt.serve.models import Model
from sdopt.serve.orders import EVERY_STEP, Failed, Order

DECODE = "vae_decoder"
SWITCH = "switch"  # of weights


@dataclass(eq=False)
class Item:
    """An order on its way.

    `cost`: the seconds that it takes. `left`: the passes that have not begun. `now`: the one that has.
    """

    order: Order
    model: Model
    plan: Plan
    cost: float
    arrived: float
    started: float = 0.0
    left: list[Plan] = field(default_factory=list[Plan])
    now: Plan | None = None
    job: Job | None = None
    latest: Float32 | None = None  # the sample of the last call
    done: int = 0  # calls
    cancelled: bool = False

    @property
    def pixels(self) -> int:
        """Of a picture of the pass that has begun."""
        plan = self.now or self.plan
        return plan.width * plan.height


def kind_of(name: str, job: Job) -> Hashable:
    """What the next call of a job costs depends on this, the size, and the number of images."""
    launch = job.launch
    guided = launch.guided if isinstance(launch, Predict) else "alone" not in job.engines[0]
    depth = shallow_depth(job.engines[0])
    return (name, guided, *job.engines[1:], *([(SHALLOW, depth)] if depth else []))


def decode_of(name: str, plan: Plan) -> Hashable:
    """What decoding a picture costs depends on this and on its size."""
    return (name, DECODE) if plan.vae is None else (name, DECODE, plan.vae)


def cost_of(name: str, plan: Plan, costs: Costs, slots: int) -> float:
    """The seconds that a plan takes on a bundle, sharing calls as far as that pays."""
    total = 0.0
    for one in plan.passes:
        pixels = one.width * one.height
        for k, scale in enumerate(one.guidance):
            kind: Hashable = (name, one.guided and scale > 1)
            if one.cache is not None and not one.cache.full[k]:
                kind = (name, one.guided and scale > 1, (SHALLOW, one.cache.depth))
            images = max(1, costs.cap(kind, pixels, slots))
            total += costs.call(kind, pixels, images) / images
    last = plan.passes[-1]
    return total + costs.call(decode_of(name, plan), last.width * last.height)


def is_wanted(previews: int, done: int, calls: int) -> bool:
    """Whether there is a preview after so many calls: they are evenly spaced, none is of the finished picture."""
    if not previews or done >= calls:
        return False
    if previews == EVERY_STEP:
        return True
    return done in {max(1, calls * (i + 1) // (previews + 1)) for i in range(previews)}


def failed(id: str, error: SdoptError) -> Failed:
    """What an error says of an order: a wrong keyword is the client's, anything else is not."""
    if isinstance(error, UsageError):
        return Failed(id, "usage", str(error), error.param)
    return Failed(id, "failed", str(error))


def cancelled(id: str) -> Failed:
    """What is told of an order that nobody wants any more."""
    return Failed(id, "cancelled", "cancelled")
