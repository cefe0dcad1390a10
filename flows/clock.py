"""Estimate how long a run still takes."""

import threading
from collections.abc import Callable, Sequence

from flows import workers
from flows.graph import Node
from fmn.store.stage import Outcome, read_sidecar

TYPICAL = {
    "full-fisher": 60.0,
    "realign": 60.0,
    "calibrate": 50.0,
    "finetune": 30.0,
    "evaluate": 15.0,
    "merge": 15.0,
    "gram": 10.0,
    "compare": 10.0,
    "fisher": 8.0,
    "fisher-part": 8.0,
    "register": 8.0,
    "evaluate-expert": 4.0,
    "report": 3.0,
}
"""Seconds of the quick start's stages, used for a run that has not been recorded before."""
SHORT = 1.0  # seconds of other stages
_ENOUGH = 0.05  # share of a first run after which the remaining time is shown
Key = tuple[str, str]  # stage and name


class Clock:
    """Counts the stages of a run, and estimates the remaining time. It is thread-safe.

    The expected time of a stage is that in the sidecar of its present output, or a typical time.
    The actual times of finished stages correct the estimate.
    """

    def __init__(self, nodes: Sequence[Node], show: Callable[[str], None]) -> None:
        self._lock, self._show = threading.Lock(), show
        self._waiting: dict[Key, float] = {}
        self._total, self._is_recorded = len(nodes), True
        for node in nodes:
            out = node.arguments.get("out")
            sidecar = read_sidecar(out) if out else None
            typical = TYPICAL.get(node.stage, SHORT)
            self._is_recorded &= sidecar is not None or typical == SHORT
            expected = sidecar.seconds if sidecar and sidecar.seconds else typical
            self._waiting[node.stage, node.name] = expected
        self._expected = self._seconds = 0.0  # of the stages that were computed
        self._all = sum(self._waiting.values())
        self.up_to_date = 0
        show(f"stage 1 of {self._total}")

    def count(self, node: Node, outcome: Outcome) -> str:
        """Count a finished stage; returns the progress, such as "12 of 31, about 3 min left"."""
        with self._lock:
            expected = self._waiting.pop((node.stage, node.name), 0.0)
            if outcome.computed:
                self._expected += expected
                self._seconds += outcome.seconds
            else:
                self.up_to_date += 1
            ended = self._total - len(self._waiting)
            text = f"{ended} of {self._total}" + self._left()
            self._show(f"stage {text}")
            return text

    def _left(self) -> str:
        if not self._waiting:
            return ""
        if not self._is_recorded and self._expected < _ENOUGH * self._all:
            return ""
        pace = self._seconds / self._expected if self._expected else 1.0
        rest = list(self._waiting.values())
        seconds = pace * max(max(rest), sum(rest) / workers.count())
        return f", about {duration(seconds)} left"


def duration(seconds: float) -> str:
    """A rounded time.

    >>> [duration(3), duration(47), duration(200), duration(9000)]
    ['3 s', '50 s', '3 min', '2.5 h']
    """
    if seconds < 10:
        return f"{max(seconds, 1):.0f} s"
    if seconds < 55:
        return f"{10 * round(seconds / 10)} s"
    return f"{max(round(seconds / 60), 1)} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
