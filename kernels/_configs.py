"""Which tile each kernel runs with: plain tables, keyed by operator, layout, shape class and architecture."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Launch:
    """A kernel that works lane by lane: `block` lanes a program; `rows` output rows each lane walks down."""

    block: int
    warps: int
    rows: int = 1


# (direction, channels_last): candidates, best guess first
LRN = {
    ("forward", True): (Launch(128, 4), Launch(256, 4)),
    ("forward", False): (Launch(128, 4), Launch(256, 4)),
    ("backward", True): (Launch(128, 4), Launch(64, 2)),
    ("backward", False): (Launch(128, 4), Launch(64, 2)),
}

# (direction, channels_last, normalised): a lane that normalises walks further, as each row it keeps saves more
POOL = {
    ("forward", True, False): (Launch(128, 4, 2), Launch(128, 4, 4)),
    ("forward", False, False): (Launch(256, 4, 2), Launch(512, 4, 2)),
    ("forward", True, True): (Launch(128, 4, 4), Launch(128, 4, 8)),
    ("forward", False, True): (Launch(128, 4, 4), Launch(128, 4, 8)),
    ("backward", True, False): (Launch(128, 4), Launch(256, 8)),
    ("backward", False, False): (Launch(256, 4), Launch(512, 4)),
    ("backward", True, True): (Launch(128, 4), Launch(64, 2)),
    ("backward", False, True): (Launch(128, 4), Launch(64, 2)),
}


def lrn_launch(direction: str, channels_last: bool) -> Launch:
    return LRN[direction, channels_last][0]


def pool_launch(direction: str, channels_last: bool, normalised: bool) -> Launch:
    return POOL[direction, channels_last, normalised][0]
