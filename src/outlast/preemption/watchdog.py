"""Notices ranks that are dead, stopped or stuck; the others end the attempt instead of hanging with them.

Rank 0 watches all ranks, and they watch it. A rank is *gone* when its connection has closed (`ranks/channel.py`), and
*silent* when its thread says nothing: its process is stopped, or its node is out of reach. Once a stop has been asked
for, a living rank can hold up the others too. Shortly before the kill (a quarter of the notice, at most `MARGIN_S`) a
rank that is not where the others are is *behind*. The save in progress is then given up, and the last one stands.

Rank 0 acts. If rank 0 is the lost one, a rank of each node tries, and the ledger's lock lets one of them
(`Ledger.append_first`). All this happens in threads, because the main thread usually waits for the lost rank.
"""

import faulthandler
import os
import threading
import time
import traceback
from dataclasses import dataclass
from typing import Literal

from outlast import clock
from outlast.config.preemption import PreemptionSection
from outlast.errors import Exit
from outlast.processes import exit_at_once
from outlast.ranks.agreement import StepAgreement
from outlast.ranks.channel import TICK_S, ControlChannel, Message
from outlast.ranks.collectives import Collectives
from outlast.ranks.lost import Lost, LostRankError
from outlast.slurm.environment import in_own_batch_script

from .cause import StopCause
from .deadline import MARGIN_S
from .echo import may_be_echo
from .outcome import Outcome
from .shutdown import Shutdown
from .signals import PreemptionGuard

GONE_S = 1.0
"""Seconds in which the main thread may itself notice that a rank is gone, as it does in a collective."""
LATE_S = 2.0
"""Seconds after which a rank that keeps the others waiting is named."""
LEAVE_S = 5.0
"""Seconds that a rank may still run after it was told to leave, when all is saved."""
ASK_S = 2.0
"""Seconds of rank 0's silence after which another rank asks Slurm how long there is."""
FOLLOW_S = 30.0
"""Seconds that a rank waits for another one to requeue the job before it leaves."""


@dataclass
class Peer:
    """What is known of another rank."""

    silent_s: float = 0.0
    gone_at: float | None = None
    left: bool = False
    late_s: float = 0.0
    at: tuple[int, int] = (0, 0)
    """How many polls and how many small collectives it has reached."""


class Watchdog:
    """One rank's view of the others.

    Args:
        shutdown: this rank's way out; another rank than 0 may have to stand in for rank 0.
        preemption: how long a rank may be silent (`hang_s`), and the notice that is assumed when none is known.
    """

    def __init__(
        self,
        guard: PreemptionGuard,
        collectives: Collectives,
        channel: ControlChannel,
        agreement: StepAgreement,
        cause: StopCause,
        shutdown: Shutdown,
        outcome: Outcome,
        preemption: PreemptionSection,
    ) -> None:
        self._guard, self._collectives, self._channel, self._agreement = guard, collectives, channel, agreement
        self._cause, self._shutdown, self._outcome = cause, shutdown, outcome
        self._hang_s, self._lead_s = preemption.hang_s, preemption.lead_s
        self._others = {rank: Peer() for rank in channel.others}
        self._asking = self._alone = self._saved = False
        self._over = threading.Event()
        self._noting: list[threading.Thread] = []

    # In the channel's thread ---------------------------------------------------------------------------------------

    def receive(self, sender: int, message: Message) -> None:
        """Take in a message from another rank."""
        peer = self._others[sender]
        peer.silent_s = 0.0
        if "at" in message and "go" not in message:
            peer.at = message["at"][0], message["at"][1]
        elif "gone" in message:
            peer.gone_at = time.monotonic()
        elif "bye" in message:
            peer.left = True
            self._agreement.end()
        elif "leave" in message:
            self.leaving(Exit(message["leave"]), lost=message["lost"])
        else:
            self._agreement.receive(sender, message)

    def tick(self, elapsed_s: float) -> None:
        """Tell the others where this rank is, and look for ranks that are lost."""
        self._channel.send_all(at=[self._agreement.polls, self._collectives.calls])
        for peer in self._others.values():
            peer.silent_s += elapsed_s
        if self._over.is_set():
            return
        if self._stopping and self._channel.rank != 0 and not self._asking and self._others[0].silent_s > ASK_S:
            self._asking = True  # rank 0 would have said when the job will be killed
            self._cause.ask_why_in_background()
        if self._channel.rank == 0:
            self._note_late(elapsed_s)
        lost = self._lost()
        if lost is not None:
            self._over.set()
            threading.Thread(target=self._act, args=(lost,), name="outlast-last-resort", daemon=True).start()

    @property
    def _stopping(self) -> bool:
        return self._agreement.stop is not None or self._guard.requested is not None

    def _note_late(self, elapsed_s: float) -> None:
        """Name the ranks that keep the others waiting in a save; never rank 0, which has more to do in one."""
        furthest = max([self._collectives.calls, *(peer.at[1] for peer in self._others.values())])
        for rank, peer in self._others.items():
            if peer.at[1] < furthest:
                peer.late_s += elapsed_s
            else:
                self._caught_up(rank, peer)

    def _caught_up(self, rank: int, peer: Peer) -> None:
        late_s, peer.late_s = peer.late_s, 0.0
        if late_s >= LATE_S:  # the ledger may be what is slow: the channel's thread must not wait for it
            late = self._named(rank, "late", late_s)
            self._noting.append(threading.Thread(target=self._shutdown.note_late, args=(late,), daemon=True))
            self._noting[-1].start()

    def _lost(self) -> list[Lost] | None:
        """The ranks without which this attempt can't go on; None if all is well.

        An empty list says that no time is left and no rank is behind: the job is requeued, and the save goes on.
        """
        now, limit_s, give_up = time.monotonic(), self._hang_s, None
        if self._stopping:
            asked_at, deadline = self._guard.requested_at, self._cause.deadline()
            notice_s = deadline - asked_at if deadline is not None and deadline > asked_at else self._lead_s
            limit_s = min(notice_s / 2, limit_s or notice_s)
            if deadline is not None and deadline > asked_at:
                give_up = deadline - min(notice_s / 4, MARGIN_S)
        found = []
        for rank, peer in self._others.items():
            if peer.left:
                continue
            if peer.gone_at is not None and now - peer.gone_at >= GONE_S:
                found.append(self._named(rank, "gone", now - peer.gone_at))
            elif peer.gone_at is None and limit_s is not None and peer.silent_s >= limit_s:
                found.append(self._named(rank, "silent", peer.silent_s))
        if found or give_up is None or clock.now() < give_up or self._channel.rank != 0 or self._saved:
            return found or None
        places = {rank: peer.at for rank, peer in self._others.items()} | {
            0: (self._agreement.polls, self._collectives.calls)
        }
        late_s = clock.now() - self._guard.requested_at
        return [self._named(rank, "behind", late_s) for rank, at in places.items() if at < max(places.values())]

    def _named(self, rank: int, how: Literal["gone", "silent", "behind", "late"], seconds: float) -> Lost:
        return Lost(rank=rank, host=self._channel.hosts[rank], seconds=round(seconds, 3), how=how)

    # In threads of their own ------------------------------------------------------------------------------------

    def _act(self, lost: list[Lost]) -> None:
        code = Exit.FAILED
        try:
            self._show(lost)
            code = self._end_attempt(lost)
        except Exception:
            traceback.print_exc()
        finally:  # whatever it was: this process must not stay
            exit_at_once(code)

    def _end_attempt(self, lost: list[Lost]) -> Exit:
        """Write why, requeue the job if the policy says so, and have all ranks leave; returns this rank's exit code."""
        step, rank = self._agreement.step, self._channel.rank
        if (code := self._settled()) is not None:
            return code  # the lost rank had left, in good order
        if rank not in (0, 1) and os.environ.get("LOCAL_RANK", "0") != "0":
            return self._followed()
        self._shutdown.stand_in(lost)
        if self._stopping and not may_be_echo(lost, self._cause):
            if rank != 0 or self._shutdown.signal is None:
                self._shutdown.announce(self._guard.requested or "TERM", step)
            code = self._shutdown.requeue(step)
            if not self._shutdown.ended_it:
                code = self._followed()  # another rank was first
            elif not lost:
                code = self._wait_for_the_save(step)
        else:
            code = self._shutdown.fail(LostRankError(lost), step)
        self._channel.send_all(leave=int(code), lost=[str(one) for one in lost] or ["no time left"])
        return code

    def _wait_for_the_save(self, step: int) -> Exit:
        """Let a slow save, in which all ranks are, use the time that Slurm still gives to a requeued job."""
        notice = self._cause.notice
        time.sleep(max((notice.kill_wait_s or 0.0) - 2 * MARGIN_S if notice else 0.0, 0.0))  # leaving ends it
        print("[outlast] the save is given up", flush=True)
        return self._shutdown.requeue(step)

    def _settled(self) -> Exit | None:
        """The exit code, if the ledger says that this attempt has ended, or that the batch script will see to it."""
        if self._outcome.is_left_to_epilogue:
            return Exit.DONE
        return self._followed() if self._outcome.has_ended else None

    def _followed(self) -> Exit:
        """Wait until another rank has requeued the job, and return the exit code.

        `srun` ends the whole step, the rank that acts included, when one rank leaves early.
        """
        if not self._stopping and in_own_batch_script():
            return Exit.FAILED
        deadline = time.monotonic() + (FOLLOW_S if self._stopping else LEAVE_S)
        in_job = self._cause.in_job
        while time.monotonic() < deadline and not self._outcome.is_settled(in_job=in_job):
            time.sleep(0.2)
        if self._outcome.has_given_up:
            return Exit.GAVE_UP
        return Exit.RESUME_ME if self._stopping else Exit.FAILED

    def _show(self, lost: list[Lost]) -> None:
        """Print in the log why this rank leaves, and where its threads are."""
        print(f"[outlast] rank {self._channel.rank} leaves: {'; '.join(map(str, lost)) or 'no time left'}", flush=True)
        faulthandler.dump_traceback()

    # In any thread ----------------------------------------------------------------------------------------------

    def leaving(self, code: Exit, lost: list[str] | None = None) -> None:
        """End this process soon, whatever its main thread waits for: the attempt is over."""
        self._over.set()
        if self._channel.rank == 0:
            self._channel.send_all(leave=int(code), lost=[])
            self._all_caught_up()
        if lost:
            print(f"[outlast] rank {self._channel.rank} leaves: {'; '.join(lost)}", flush=True)
            faulthandler.dump_traceback()
            exit_at_once(code)
        timer = threading.Timer(LEAVE_S, exit_at_once, args=(code,))
        timer.daemon = True
        timer.start()

    def all_saved(self) -> None:
        """Stop looking for ranks that are behind: all is saved, and rank 0 still has to requeue the job."""
        self._saved = True

    def alone(self) -> None:
        """Watch a run of a single rank, which has no channel, from the moment it is asked to stop."""
        if not self._alone:
            self._alone = True
            threading.Thread(target=self._tick_alone, name="outlast-watch", daemon=True).start()

    def _tick_alone(self) -> None:
        while not self._over.wait(TICK_S):
            self.tick(TICK_S)

    def close(self) -> None:
        """Stop watching: the run has finished, and ranks may end when they like."""
        self._over.set()
        self._agreement.end()
        self._channel.close()
        self._all_caught_up()
        for note in list(self._noting):
            note.join(LEAVE_S)

    def _all_caught_up(self) -> None:
        """Note the late ranks: the save is done, though not every rank's thread has said so yet."""
        if self._channel.rank == 0:
            for rank, peer in self._others.items():
                self._caught_up(rank, peer)

    def blame(self, error: BaseException, wait_s: float = 2.0) -> Lost | None:
        """The rank whose end made this one raise `error`, or None; waits until that can be known."""
        of_a_collective = type(error).__name__.startswith("Dist") or "gloo" in str(error)
        if not of_a_collective or not self._channel.connected:
            return None
        deadline = time.monotonic() + wait_s
        while time.monotonic() < deadline and not self._over.is_set():
            for rank, peer in self._others.items():
                if peer.gone_at is not None and not peer.left:
                    return self._named(rank, "gone", time.monotonic() - peer.gone_at)
            time.sleep(0.02)
        return None
