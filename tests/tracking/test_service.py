"""The process of W&B and the watcher that ends it; with W&B and a server in test_wandb_online.py."""

import os
import signal
import subprocess
import sys

import psutil
from program import TIMEOUT

from reid.tracking import service
from reid.tracking.service import Service, kill_services, services_of, start_watcher

# Starts a process instead of wandb-core, and its watcher; prints their ids and waits to be killed.
WORKER = """
import subprocess, time
from reid.tracking.service import start_watcher
service = subprocess.Popen(["sleep", "1000"], start_new_session=True)
print(service.pid, start_watcher(service.pid).pid, flush=True)
time.sleep(1000)
"""


def test_service_and_watcher_of_a_killed_process_are_ended():
    with subprocess.Popen([sys.executable, "-c", WORKER], stdout=subprocess.PIPE, text=True) as worker:
        service, watcher = map(psutil.Process, map(int, worker.stdout.readline().split()))
        sessions = {os.getsid(process.pid) for process in (worker, service, watcher)}
        worker.kill()
    gone, alive = psutil.wait_procs([service, watcher], timeout=TIMEOUT)
    assert (len(gone), alive) == (2, [])
    assert len(sessions) == 3  # Ctrl-C ends neither of them


def test_the_watcher_kills_nothing_that_has_ended():
    child = subprocess.Popen(["sleep", "0"])
    child.wait()
    watcher = start_watcher(child.pid)
    watcher.communicate(timeout=TIMEOUT)  # closes the pipe, as the end of this process would
    assert watcher.returncode == 1  # of `kill -0`


def test_a_service_that_does_not_end_by_itself_is_killed(monkeypatch):
    child = subprocess.Popen(["sleep", "1000"])
    monkeypatch.setattr(service, "services_of", lambda pid: [psutil.Process(child.pid)])
    monkeypatch.setattr(service, "_tear_down", child.wait)
    Service().end(0.1)
    assert child.wait(TIMEOUT) == -signal.SIGKILL


def test_only_wandbs_processes_are_killed():
    child = subprocess.Popen(["sleep", "1000"])
    try:
        kill_services(os.getpid())
        assert child.poll() is None
        assert services_of(os.getpid()) == []
    finally:
        child.kill()
        child.wait()
    assert services_of(child.pid) == []
