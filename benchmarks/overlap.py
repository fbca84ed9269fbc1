"""The time of a training step whose gradients are reduced bucket by bucket while backward runs. Pure Python."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Compute:
    """A step of one device alone, in seconds.

    before: of the forward pass. backward. after: of clipping and the optimizer. earlier: of what is done before without
    communication: the micro-batches that are accumulated.
    """

    before: float
    backward: float
    after: float = 0.0
    earlier: float = 0.0

    @property
    def seconds(self) -> float:
        return self.earlier + self.before + self.backward + self.after

    def accumulated(self, steps: int) -> "Compute":
        """With so many micro-batches in a step."""
        return Compute(self.before, self.backward, self.after, (steps - 1) * (self.before + self.backward))

    def scaled_to(self, seconds: float) -> "Compute":
        factor = seconds / self.seconds
        return Compute(*(factor * part for part in (self.before, self.backward, self.after, self.earlier)))


@dataclass(frozen=True)
class Bucket:
    """size: bytes of gradients. ready: the share of backward, from 0 to 1, after which all of them are there."""

    size: float
    ready: float


@dataclass(frozen=True)
class Step:
    """seconds: of a step with communication. communication: of all reductions. alone: of a step without."""

    seconds: float
    communication: float
    alone: float

    @property
    def efficiency(self) -> float:
        """Speed by that of a device alone: weak scaling, the batch of a device stays what it is."""
        return self.alone / self.seconds

    @property
    def hidden(self) -> float:
        """The share of the communication that costs nothing."""
        return 1 - (self.seconds - self.alone) / self.communication if self.communication else 1.0


def simulate(
    compute: Compute,
    buckets: Sequence[Bucket],
    cost: Callable[[float], float],
    wire: float = 1.0,
    overlap: bool = True,
    stolen: float = 0.0,
) -> Step:
    """A step in which each bucket is reduced when it is full and the one before it has been reduced.

    buckets: in the order in which they are launched. cost: of bytes, seconds. wire: bytes sent by bytes of gradients, 0.5
    for halves of float32. overlap: whether reductions start while backward runs. stolen: the share of a reduction's time
    in which backward stands still, from 0 (the network works alone) to 1 (the processor does it all).
    """
    now = done = 0.0  # the time since backward began; how much of backward is done by then
    communication = 0.0
    for bucket in buckets:
        ready = bucket.ready * compute.backward if overlap else compute.backward
        if done < ready:
            now, done = now + ready - done, ready
        seconds = cost(bucket.size * wire)
        communication += seconds
        done = min(compute.backward, done + seconds * (1 - stolen))
        now += seconds
    now += compute.backward - done
    seconds = compute.earlier + compute.before + now + compute.after
    return Step(seconds, communication, compute.seconds)
