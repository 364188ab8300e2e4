"""A rank that is gone, silent or late, and the error that names it."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Lost:
    """A rank without which an attempt can't go on; or, if it is only `late`, could not for a while."""

    rank: int
    host: str
    seconds: float
    """For how long it has been gone, silent or late; `behind`: since the stop was asked for."""
    how: Literal["gone", "silent", "behind", "late"]

    def __str__(self) -> str:
        what = {
            "gone": "is gone",
            "silent": f"has given no sign of life for {self.seconds:.0f} s",
            "late": f"has kept the others waiting for {self.seconds:.1f} s",
            "behind": f"is not where the others are, {self.seconds:.0f} s after the stop was asked for",
        }
        return f"rank {self.rank} on {self.host} {what[self.how]}"


class LostRankError(Exception):
    """Another rank is gone, or gives no sign of life; the message names it."""

    def __init__(self, lost: list[Lost]) -> None:
        super().__init__("; ".join(map(str, lost)))
        self.lost, self.rank = lost, lost[0].rank
