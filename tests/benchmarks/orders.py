"""The far end of `remote`: a side in a process of its own does what it is told, line by line.

It needs no more than the standard library and runs in any environment.

    told       {"do": "advance", "rounds": 3}    {"do": "result"}      end of input: end
    answers    {"done": 3}                       {"result": [1.23]}

The first line that a side writes is {"ready": true}, once it has been set up.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable

Result = Callable[[], list[float]]


class Orders:
    """Reads orders from standard input and answers on what was standard output.

    From then on standard output is standard error, so that a framework may print what it likes.
    """

    def __init__(self) -> None:
        self._in = os.fdopen(os.dup(0), encoding="utf-8")
        self._out = os.fdopen(os.dup(1), "w", encoding="utf-8")
        nothing = os.open(os.devnull, os.O_RDONLY)
        os.dup2(nothing, 0)
        os.close(nothing)
        os.dup2(2, 1)
        self._started = False
        self._running = 0
        self._left = 0

    def take(self, result: Result) -> int:
        """Returns how many rounds to run now, 0 for the end; the last ones have been run."""
        if self._running:
            self._say({"done": self._running})
        elif not self._started:
            self._say({"ready": True})
        self._started, self._running = True, 0
        for line in self._in:
            order = json.loads(line)
            if order["do"] == "advance":
                self._running = int(order["rounds"])
                return self._running
            self._say({"result": result()})
        return 0

    def once_more(self, result: Result) -> bool:
        """Returns whether to run one more round, for a loop that belongs to a framework."""
        if not self._left:
            self._left = self.take(result)
        self._left -= 1
        return self._left >= 0

    def _say(self, answer: object) -> None:
        print(json.dumps(answer), file=self._out, flush=True)
