"""A sweep with `cluster=local`: its cells in the foreground, `cluster.parallel_cells` at a time."""

import threading
import time
from concurrent.futures import ALL_COMPLETED, Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for

from rich.console import Console

from outlast.config.cluster import LocalCluster
from outlast.errors import OutlastError
from outlast.processes import ignore_output_errors
from outlast.rundir.cancelled import CancelMark
from outlast.rundir.directory import RunDirectory
from outlast.rundir.lock import RunLock
from outlast.rundir.progress import Progress

from ..display.live_table import LiveTable
from ..planning.sweep import PlannedCell, SweepPlan, check_cells, merged
from ..runs.standing import RunStatus, collect
from ..runs.state import State
from .freeze import freeze
from .local import Launcher
from .signals import passing_on_signals
from .sweep import left_alone, make_sweep_directory
from .wait import pause_s

LOOK_S = 0.5
AGAIN = (None, State.FAILED, State.GAVE_UP)
"""States of cells that are run: here, the same command again also retries what failed."""


class _CellNotes:
    """Prints a cell's notes above the table of its sweep."""

    def __init__(self, cell: str, table: LiveTable) -> None:
        self._cell, self._table = cell, table

    def update(self, progress: Progress | None, note: str | None = None) -> None:
        """Do nothing: the table reads the run directories itself."""

    def note(self, text: str) -> None:
        self._table.note(f"{self._cell}: {text}")


class Cells:
    """Runs the cells of a sweep that are not done, each as a single run would be run."""

    def __init__(self, sweep: SweepPlan, table: LiveTable) -> None:
        self.sweep, self.table = sweep, table
        self.stopping = threading.Event()
        self._cancelled = {cell.name: CancelMark(cell.plan.directory.path) for cell in sweep.cells}
        self._launchers: list[Launcher] = []

    def run(self, cells: list[PlannedCell]) -> None:
        """Run them to their end, or until Ctrl-C stops them."""
        cluster = self.sweep.cells[0].plan.config.cluster
        assert isinstance(cluster, LocalCluster)
        runs = [cell.plan.directory for cell in cells]
        with ThreadPoolExecutor(cluster.parallel_cells) as pool, passing_on_signals(self.stop, self.send):
            started: set[Future[None]] = {pool.submit(self._cell, cell) for cell in cells}
            waiting, pause = started, LOOK_S
            while waiting:
                waiting = wait_for(waiting, pause, ALL_COMPLETED).not_done
                looked = time.monotonic()
                self.table.show(collect(runs))
                pause = pause_s(looked, LOOK_S)
        for future in started:
            future.result()  # raises what is no cell's own failure

    def _cell(self, cell: PlannedCell) -> None:
        if self.stopping.is_set() or self._cancelled[cell.name].is_set:
            return
        launcher = Launcher(cell.plan)
        self._launchers.append(launcher)
        if self.stopping.is_set():  # it came between the two lines above
            launcher.stop()
        line = _CellNotes(cell.name, self.table)
        try:
            launcher.main(line)
        except OutlastError as error:  # the other cells go on
            line.note(str(error))
        finally:
            self._launchers.remove(launcher)

    def stop(self) -> None:
        """Make all running cells save and leave, and start no other."""
        self.stopping.set()
        for launcher in list(self._launchers):
            launcher.stop()

    def send(self, number: int) -> None:
        """Signal all running cells."""
        for launcher in list(self._launchers):
            launcher.send(number)


def run(sweep: SweepPlan, console: Console) -> list[RunStatus]:
    """Run what is neither finished nor cancelled.

    Returns:
        The status of every cell of the command, in its order.

    Raises:
        RunBusyError: the same sweep is run by another command.
    """
    make_sweep_directory(sweep)
    ignore_output_errors()
    lock = RunLock(RunDirectory(sweep.directory))
    lock.acquire("outlast train -m")
    try:
        check_cells(sweep)
        merged(sweep).write(sweep.directory)
        runs = [cell.plan.directory for cell in sweep.cells]
        todo = [cell for cell in sweep.cells if left_alone(cell.plan.directory) in AGAIN]
        for cell in todo:
            if not cell.plan.directory.config.exists():
                freeze(cell.plan)  # so that status, cancel and resume know those that have not begun
        with LiveTable(console) as table:
            done = len(runs) - len(todo)
            table.note(f"{sweep.directory}: {len(runs)} cells" + (f", {done} left as they are" if done else ""))
            Cells(sweep, table).run(todo)
        return collect(runs)
    finally:
        lock.release()
