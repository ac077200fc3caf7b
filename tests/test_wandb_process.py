"""W&B's own process, and the watcher that ends it; with W&B and a server in test_wandb_online.py."""

import os
import signal
import subprocess
import sys

import psutil
from program import TIMEOUT

from reid.handlers import wandb_process
from reid.handlers.wandb_process import Service, kill, services_of

# Starts something in the place of W&B's process, and its watcher; says their numbers and waits to be ended.
WORKER = """
import os, subprocess, sys, time, psutil
from reid.handlers import wandb_process
service = subprocess.Popen(["sleep", sys.argv[1]], start_new_session=True)
watcher = wandb_process._start_watcher(psutil.Process(service.pid), grace=0.5)
print(service.pid, watcher.pid, flush=True)
service.wait()
watcher.wait()
print("the watcher has ended", flush=True)
"""


def start(seconds: int) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-c", WORKER, str(seconds)], stdout=subprocess.PIPE, text=True)


def test_service_and_watcher_of_a_killed_process_are_ended():
    with start(1000) as worker:
        service, watcher = map(psutil.Process, map(int, worker.stdout.readline().split()))
        sessions = {os.getsid(process.pid) for process in (worker, service, watcher)}
        worker.kill()
    gone, alive = psutil.wait_procs([service, watcher], timeout=TIMEOUT)
    assert (len(gone), alive) == (2, [])
    assert len(sessions) == 3  # Ctrl-C ends neither of them


def test_the_watcher_ends_with_what_it_watches():
    with start(1) as worker:
        out, _ = worker.communicate(timeout=TIMEOUT)
    assert out.endswith("\nthe watcher has ended\n")


def test_a_service_that_does_not_end_by_itself_is_killed(monkeypatch):
    child = subprocess.Popen(["sleep", "1000"])
    service = Service()
    service._process = psutil.Process(child.pid)
    monkeypatch.setattr(wandb_process, "_tear_down", child.wait)
    service.end(0.1)
    assert child.wait(TIMEOUT) == -signal.SIGKILL


def test_only_wandbs_processes_are_meant():
    child = subprocess.Popen(["sleep", "1000"])
    try:
        assert services_of(os.getpid()) == []
        assert services_of(child.pid) == []
    finally:
        child.kill()
        child.wait()


def test_one_that_has_ended_is_not_killed_again():
    child = subprocess.Popen(["sleep", "0"])
    process = psutil.Process(child.pid)
    child.wait()
    kill([process])
    assert services_of(child.pid) == []
