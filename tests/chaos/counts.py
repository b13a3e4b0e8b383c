"""What has been done to the jobs, and what came of it."""

from __future__ import annotations

import statistics
from collections import Counter
from dataclasses import dataclass, field


@dataclass
class Counts:
    """Counts of a run of the harness; `wrong` is how much there is that must not be."""

    seed: int
    disturbances: Counter[str] = field(default_factory=Counter)
    codes: Counter[int] = field(default_factory=Counter)  # of disturbed starts
    starts: int = 0
    jobs: int = 0  # that came to their end
    lost: int = 0  # requests without an answer
    twice: int = 0  # requests with several
    differing: int = 0  # result files that are not those of the undisturbed run
    orphans: int = 0  # processes that were still there long after a disturbance
    after_the_end: int = 0  # starts in which a rank was stopped when all was done, and stayed
    crashes: int = 0  # starts that ended in an error nobody foresaw
    other_codes: int = 0  # starts that ended with another exit code than their disturbance calls for
    longest: float = 0.0  # seconds from a disturbance until the run went on or all its processes had ended
    at_work_again: dict[str, list[float]] = field(default_factory=dict)  # seconds, by kind, with ULFM

    @property
    def wrong(self) -> int:
        """How much there is that must not be."""
        return self.lost + self.twice + self.differing + self.orphans + self.crashes + self.other_codes

    def __str__(self) -> str:
        codes = ", ".join(f"{count} x {code}" for code, count in sorted(self.codes.items()))
        lines = [f"{count:5d}  {kind}" for kind, count in sorted(self.disturbances.items())]
        for kind, seconds in sorted(self.at_work_again.items()):
            lines.append(
                f"       {kind}: at work again after {statistics.median(seconds):.2f} s (median of {len(seconds)}), "
                f"{max(seconds):.2f} s at most"
            )
        return "\n".join(
            [
                *lines,
                f"       {self.starts} starts of {self.jobs} jobs; exit codes {codes}; "
                f"stopped after the end and left alone: {self.after_the_end}",
                f"seed {self.seed}: {self.disturbances.total()} disturbances, {self.lost} lost, {self.twice} twice, "
                f"{self.differing} differing, {self.orphans} orphans, {self.crashes} crashes, "
                f"{self.other_codes} other exit codes, longest silence {self.longest:.1f} s",
            ]
        )
