"""The guard, in processes of its own."""

import subprocess
import sys

GUARD = """
import os, signal, sys, threading, time
from outlast.preemption.signals import PreemptionGuard
from outlast.processes import shield_worker, signals_blocked
"""


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", GUARD + code], capture_output=True, text=True, timeout=30)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_the_first_signal_is_the_one_that_counts() -> None:
    out = run("""
guard = PreemptionGuard(); guard.install(); guard.end_startup()
for number in (signal.SIGUSR2, signal.SIGTERM, signal.SIGUSR1):
    os.kill(os.getpid(), number); time.sleep(0.05)
print(guard.requested, 0 <= time.time() - guard.requested_at < 5)
""")
    assert out == "USR2 True"


INTERRUPTED = """
guard = PreemptionGuard(interrupt=True); guard.install(); guard.end_startup()
read, write = os.pipe()

def interrupt():
    signal.pthread_kill(threading.get_ident(), signal.SIGINT)
    while guard.requested is None: time.sleep(0.01)  # noted by the guard's thread,
    os.write(write, b"1")

threading.Thread(target=interrupt).start()
os.read(read, 1)  # and only now can the main thread, which was inside this call, run the handler
"""


def test_the_first_ctrl_c_saves_also_when_the_main_thread_hears_of_it_last() -> None:
    assert run(INTERRUPTED + "print(guard.requested)") == "INT"


def test_the_second_ctrl_c_interrupts() -> None:
    out = run(
        INTERRUPTED
        + """
try:
    os.kill(os.getpid(), signal.SIGINT); time.sleep(5)
except KeyboardInterrupt:
    print(guard.requested, "interrupted")
"""
    )
    assert out == "INT interrupted"


def test_a_signal_that_was_held_back_arrives_when_the_guard_is_in_place() -> None:
    out = run("""
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
os.kill(os.getpid(), signal.SIGTERM)
guard = PreemptionGuard(); guard.install()
print(guard.requested)
""")
    assert out == "TERM"


def test_a_forked_child_does_not_trip_it_and_dies_from_term() -> None:
    out = run("""
guard = PreemptionGuard(); guard.install(); guard.end_startup()
child = os.fork()
if child == 0:
    os.kill(os.getpid(), signal.SIGTERM); time.sleep(10); os._exit(0)
status = os.waitpid(child, 0)[1]
time.sleep(0.1)
print(os.WTERMSIG(status) == signal.SIGTERM, guard.requested)
""")
    assert out == "True None"


def test_a_shielded_child_ignores_the_signals() -> None:
    out = run("""
guard = PreemptionGuard(); guard.install(); guard.end_startup()
child = os.fork()
if child == 0:
    shield_worker()
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        os.kill(os.getpid(), number)
    os._exit(7)
status = os.waitpid(child, 0)[1]
print(os.WEXITSTATUS(status), guard.requested)
""")
    assert out == "7 None"


def test_a_shielded_child_ends_with_its_parent() -> None:
    out = run("""
import select
read, write = os.pipe()
parent = os.fork()
if parent == 0:
    ready, done = os.pipe()
    if os.fork() == 0:
        shield_worker()
        os.write(done, b"1"); time.sleep(60); os._exit(0)
    os.read(ready, 1); os._exit(0)
os.close(write)
os.waitpid(parent, 0)
print(select.select([read], [], [], 3.0)[0] == [read] and os.read(read, 1))  # its end, when no child has it open
""")
    assert out == "b''"


def test_a_data_loaders_worker_holds_the_signals_back_from_its_first_instruction() -> None:
    out = run("""
import torch.utils.data as data
guard = PreemptionGuard(); guard.install(); guard.end_startup()
class Numbers(data.Dataset):
    def __len__(self): return 2
    def __getitem__(self, i): return i
def blocked(worker): masks.put(signal.SIGTERM in signal.pthread_sigmask(signal.SIG_BLOCK, []))
import multiprocessing
masks = multiprocessing.SimpleQueue()
loader = data.DataLoader(Numbers(), num_workers=1, worker_init_fn=blocked)
print([int(batch) for batch in loader], masks.get(), signal.SIGTERM in signal.pthread_sigmask(signal.SIG_BLOCK, []))
""")
    assert out == "[0, 1] True False"


def test_in_start_up_the_callback_runs_also_while_the_main_thread_is_in_a_c_call() -> None:
    out = run("""
import threading
def leave(name):
    print(name, threading.current_thread() is threading.main_thread(), flush=True); os._exit(0)
guard = PreemptionGuard(); guard.install(); guard.notify(on_startup=leave, on_signal=lambda: None)
threading.Timer(0.3, lambda: os.kill(os.getpid(), signal.SIGUSR1)).start()
import hashlib
hashlib.pbkdf2_hmac('sha256', b'', b'', 10**9)  # one C call, far longer than the test may take
""")
    assert out == "USR1 False"


def test_a_helper_command_started_under_the_block_outlives_term() -> None:
    out = run("""
import subprocess
with signals_blocked():
    helper = subprocess.Popen(["sleep", "0.5"])
helper.terminate()
print(helper.wait())
""")
    assert out == "0"
