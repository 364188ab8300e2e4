"""Lets all ranks do the same thing at the same step, without a collective in each step.

Training loops poll at the same points on all ranks: the end of a step, of a micro-batch, of an evaluation's batch. A
rank counts its polls. When one is asked to stop, threads settle it while the main threads go on computing:

1. The rank tells rank 0, whose thread asks every rank to hold: from then on a rank waits at its next poll. Each
   answers how many polls it has passed.
2. The largest of these numbers, plus one, is a poll that no rank has passed and that all come to. Rank 0 tells
   everyone; they go on, and act at that poll.

So a step costs a look at two variables; nothing is asked or sent. A signal in the middle of a step is honoured at the
end of that step as a rule: a reduction that is started at the end of one step and read at the end of the next costs
little too, but a whole step of the notice. Ranks may be any number of polls apart (nothing keeps them together in an
evaluation, or while they accumulate gradients), and no rank waits for another's main thread, only for threads that
always answer. If one does not, its process is stopped or gone, and `preemption/watchdog.py` acts.
"""

import threading
from collections.abc import Callable

from .channel import ControlChannel, Message

ASKED = ("save", "clock", "USR1", "USR2", "HUP", "INT", "TERM", "diverged")
"""What may be asked for. If several are asked for at once, the last in this order counts."""


class StepAgreement:
    """One rank's part in the agreement. A poll answers what to do there: "" (nothing), or one of `ASKED`.

    Args:
        on_stop: called once on every rank as soon as a stop is asked for, in the channel's thread or the asker's.
    """

    def __init__(self, channel: ControlChannel, on_stop: Callable[[str], None]) -> None:
        self._channel, self._on_stop = channel, on_stop
        self._changed = threading.Condition()
        self._holding = self._over = False
        self._due: dict[int, str] = {}
        self._asks: set[str] = set()
        self._proposed = ""
        self._answers: dict[int, int] = {}
        self.polls = 0
        """How many this rank has passed."""
        self.step = 0
        """The last step at which it has polled."""
        self.stop: str | None = None
        """What has been asked for, or None; known before all ranks are there."""

    def ask(self, what: str) -> None:
        """Have all ranks do `what` at the same, next possible poll. From any thread.

        Before the ranks are connected it has no effect: whoever was signalled asks again at the first poll.
        """
        with self._changed:
            if not self._channel.connected or self._over or what in self._asks or self.stop is not None:
                return
            if self._channel.rank == 0:
                self._asked(what)
            else:
                self._asks.add(what)
                self._holding = True  # not past the poll that the answer may name
                self._channel.send(0, ask=what)

    def poll(self, step: int, asked: str = "") -> str:
        """Pass one more poll, in or at the end of `step`; wait while the ranks settle when to act.

        Args:
            asked: what this rank asks for, one of `ASKED`; "": nothing.
        """
        self.step = step
        if self._channel.world_size == 1:
            return asked
        if asked:
            self.ask(asked)
        with self._changed:
            while self._holding and not self._over:
                self._changed.wait()
            self.polls += 1
            return self._due.pop(self.polls, "")

    def end(self) -> None:
        """End the agreement: no rank polls any more, so none waits for an answer."""
        with self._changed:
            self._over = True
            self._changed.notify_all()

    def receive(self, sender: int, message: Message) -> None:
        """A message of another rank's, in the channel's thread."""
        with self._changed:
            if "ask" in message:
                self._asked(message["ask"])
            elif "hold" in message:
                self._hold(message["hold"])
                self._channel.send(0, held=self.polls)
            elif "held" in message and self._proposed:
                self._answers[sender] = message["held"]
                self._settle()
            elif "go" in message:
                self._go(message["go"], message["at"])

    def _asked(self, what: str) -> None:
        if self.stop is None:  # a stop that is on its way answers every later one
            self._asks.add(what)
            self._propose()

    def _propose(self) -> None:
        if self._proposed or not self._asks:
            return
        self._proposed = max(self._asks, key=ASKED.index)
        self._asks.clear()
        self._hold(self._proposed)
        self._answers = {0: self.polls}
        self._channel.send_all(hold=self._proposed)

    def _settle(self) -> None:
        if len(self._answers) == self._channel.world_size:
            what, at = self._proposed, max(self._answers.values()) + 1
            self._proposed = ""
            self._channel.send_all(go=what, at=at)
            self._go(what, at)
            self._propose()

    def _hold(self, what: str) -> None:
        self._holding = True
        if what not in ("save", "diverged") and self.stop is None:
            self.stop = what
            self._on_stop(what)

    def _go(self, what: str, at: int) -> None:
        self._due[at] = what
        self._holding = False
        self._changed.notify_all()
