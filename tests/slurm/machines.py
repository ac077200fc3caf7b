"""Virtual machines, each with its own network address, host name, processes, shared memory and scratch folder.

All are inside one outer set of namespaces: nothing touches the host's network, /run or /etc. When the process that
started them dies for any reason, all machines end, with their links and mounts. Needs root.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

_SUBNET = "10.77.0"
HUB = "hub"  # the machine in the middle, whose bridge links the others

_HUB_INIT = r"""
set -eu
hostname hub
mount --bind "$LAB/hosts" /etc/hosts
mount -t tmpfs tmpfs /run
ip link set lo up
ip link add br0 type bridge
ip addr add "$SUBNET.1/24" dev br0
ip link set br0 up
echo ready > "$LAB/hub.up"
trap 'exit 0' TERM
while :; do sleep 3600 & wait $!; done
"""

_MACHINE_UP = r"""
set -eu
ip netns add "$NODE"
ip link add "v$NODE" type veth peer name eth0 netns "$NODE"
ip link set "v$NODE" master br0 up
ip -n "$NODE" addr add "$ADDR/24" dev eth0
ip -n "$NODE" link set eth0 up
ip -n "$NODE" link set lo up
exec ip netns exec "$NODE" unshare --uts --ipc --mount --pid --fork --kill-child=KILL \
     --mount-proc --propagation private bash -c "$MACHINE_INIT" "init-$NODE"
"""

_SPACES = ("--net", "--mount", "--uts", "--ipc", "--pid", "--fork", "--mount-proc", "--propagation", "private")

_MACHINE_INIT = r"""
hostname "$NODE"
mount -t tmpfs tmpfs /dev/shm
mkdir -p "$LAB/local"
mount -t tmpfs -o size=2g tmpfs "$LAB/local"
echo ready > "$LAB/$NODE.up"
trap 'exit 0' TERM
while :; do sleep 3600 & wait $!; done
"""


def missing() -> str | None:
    """Return why this machine cannot run virtual ones, or None."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    for tool in ("unshare", "nsenter", "setpriv", "ip", "mount"):
        if not shutil.which(tool):
            return f"{tool} is not installed (apt-get install iproute2 util-linux)"
    probe = "mount -t tmpfs t /run && ip link add br0 type bridge && ip link add v0 type veth peer name v1"
    done = subprocess.run(
        ["unshare", *_SPACES, "sh", "-c", probe], capture_output=True, text=True, check=False, timeout=20
    )
    return None if done.returncode == 0 else f"network namespaces: {done.stderr.strip()[:200]}"


class Machines:
    """Context manager; `local` is a folder local to each machine.

    Args:
        folder: Folder of logs, the same on all machines, like a shared file system.
        names: Names of the machines.
    """

    def __init__(self, folder: Path, names: Sequence[str] = ("n1", "n2")) -> None:
        self.folder, self.names = folder.resolve(), list(names)
        self.local = self.folder / "local"
        self.address = {HUB: f"{_SUBNET}.1", **{name: f"{_SUBNET}.{11 + i}" for i, name in enumerate(self.names)}}
        self.init: dict[str, int] = {}  # machine -> host's pid of its first process
        self._outer: subprocess.Popen[bytes] | None = None
        self._machines: dict[str, subprocess.Popen[bytes]] = {}
        self._started: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Machines:
        try:
            self._start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def _start(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        hosts = "".join(f"{address} {name}\n" for name, address in self.address.items())
        (self.folder / "hosts").write_text(f"127.0.0.1 localhost\n{hosts}")
        with (self.folder / "hub.log").open("ab") as log:
            self._outer = subprocess.Popen(
                # Even kill -9 of this process leaves no process.
                [
                    "setpriv",
                    "--pdeathsig",
                    "KILL",
                    "unshare",
                    "--kill-child=KILL",
                    *_SPACES,
                    "bash",
                    "-c",
                    _HUB_INIT,
                    "init-hub",
                ],
                env=self._environment(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._wait_until_up(HUB, self._outer)
        for name in self.names:
            self._start_boot(name)
        for name in self.names:
            self._wait_until_up(name, self._machines[name])

    def is_up(self, name: str) -> bool:
        return self._machines[name].poll() is None

    def boot(self, name: str) -> None:
        """Start a machine again after `crash`."""
        self._start_boot(name)
        self._wait_until_up(name, self._machines[name])

    def _start_boot(self, name: str) -> None:
        (self.folder / f"{name}.up").unlink(missing_ok=True)
        variables = {"NODE": name, "ADDR": self.address[name], "MACHINE_INIT": _MACHINE_INIT}
        with (self.folder / f"{name}.log").open("ab") as log:
            self._machines[name] = subprocess.Popen(
                [*self._enter(HUB), "bash", "-c", _MACHINE_UP, f"up-{name}"],
                env=self._environment() | variables,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def _wait_until_up(self, name: str, process: subprocess.Popen[bytes]) -> None:
        deadline = time.monotonic() + 60
        while not (self.folder / f"{name}.up").exists():
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"{name} did not come up: " + (self.folder / f"{name}.log").read_text()[-500:])
            time.sleep(0.01)
        self.init[name] = _first_process_under(process.pid)

    def __exit__(self, *_: object) -> None:
        if self._outer is not None and self._outer.poll() is None:
            os.kill(self.init.get(HUB, self._outer.pid), signal.SIGKILL)  # takes all the others with it
            self._outer.wait(15)
        for process in [*self._machines.values(), *self._started]:
            process.wait(15)

    def _environment(self) -> dict[str, str]:
        return {**os.environ, "LAB": str(self.folder), "SUBNET": _SUBNET}

    def _enter(self, name: str) -> list[str]:
        return ["nsenter", "-t", str(self.init[name]), "-n", "-m", "-u", "-i", "-p", "--"]

    def _command(self, name: str, command: Sequence[object], cwd: Path) -> list[str]:
        # Entering a mount namespace moves to "/"; go back inside.
        return [*self._enter(name), "sh", "-c", 'cd "$1" && shift && exec "$@"', "sh", str(cwd), *map(str, command)]

    # ---- processes ----

    def start(self, name: str, command: Sequence[object], *, cwd: Path, **options: Any) -> subprocess.Popen[bytes]:
        """Return nsenter, which waits for the process; signal the process with `kill`."""
        pid_file = self.folder / f"pid.{len(self._started)}"
        wrapped = ["sh", "-c", 'echo $$ > "$1"; shift; exec "$@"', "sh", pid_file, *command]
        process = subprocess.Popen(self._command(name, wrapped, cwd), **options)
        process.location = (name, pid_file)  # type: ignore[attr-defined]
        self._started.append(process)
        return process

    def kill(self, process: subprocess.Popen[bytes], number: int = signal.SIGTERM) -> None:
        """Signal a process that `start` has started."""
        name, pid_file = process.location  # type: ignore[attr-defined]
        self.run(name, ["kill", f"-{int(number)}", pid_file.read_text().strip()], check=False)

    def run(
        self,
        name: str,
        command: Sequence[object],
        *,
        cwd: Path = Path("/"),
        check: bool = True,
        timeout: float = 60,
        **options: Any,
    ) -> subprocess.CompletedProcess[str]:
        """Run a command on a machine to its end."""
        done = subprocess.run(
            self._command(name, command, cwd), capture_output=True, text=True, check=False, timeout=timeout, **options
        )
        if check and done.returncode:
            raise RuntimeError(f"{name}: {command} ended with {done.returncode}\n{done.stdout}\n{done.stderr}")
        return done

    def pids(self, name: str, pattern: str) -> list[str]:
        """Return the process ids, as the machine counts them, of processes whose command line matches."""
        return self.run(name, ["pgrep", "-f", pattern], check=False).stdout.split()

    def ended(self, process: subprocess.Popen[bytes], within: float) -> bool:
        """Return whether the process ends within these seconds."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(within)
        return process.poll() is not None

    @contextlib.contextmanager
    def on_network_of(self, name: str) -> Iterator[None]:
        """Put sockets that this thread opens, and threads that it starts, on the network of the machine."""
        with Path("/proc/thread-self/ns/net").open() as host, Path(f"/proc/{self.init[name]}/ns/net").open() as other:
            _enter_network(other.fileno())
            try:
                yield
            finally:
                _enter_network(host.fileno())

    # ---- faults ----

    def unplug(self, name: str) -> None:
        """Remove the port from the switch: packets vanish silently, and the machine sees its link up."""
        self.run(HUB, ["ip", "link", "set", f"v{name}", "nomaster"])

    def plug(self, name: str) -> None:
        self.run(HUB, ["ip", "link", "set", f"v{name}", "master", "br0"])

    def crash(self, name: str) -> None:
        """End all processes at once, like a power failure; no other machine is informed."""
        self.unplug(name)
        os.kill(self.init[name], signal.SIGKILL)
        self._machines[name].wait(15)
        self.run(HUB, ["ip", "netns", "del", name], check=False)
        # Orphaned TCP sockets can keep the dead namespace (and its address) alive for minutes.
        self.run(HUB, ["ip", "link", "del", f"v{name}"], check=False)


def _enter_network(descriptor: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.setns(descriptor, 0x40000000):  # CLONE_NEWNET; os.setns comes with Python 3.12
        raise OSError(ctypes.get_errno(), "setns")


def _first_process_under(pid: int) -> int:
    """Return the host's pid of the innermost process 1 under nsenter and unshare."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        descendant: int | None = pid
        while descendant is not None:
            if descendant != pid and _is_first_process(descendant):
                return descendant
            descendant = next(iter(_children(descendant)), None)
        time.sleep(0.02)
    raise TimeoutError(f"no first process of a namespace under {pid}")


def _is_first_process(pid: int) -> bool:
    try:
        is_shell = Path(f"/proc/{pid}/cmdline").read_bytes().startswith(b"bash\0-c\0")
        (numbers,) = (line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if "NSpid:" in line)
    except (OSError, ValueError):
        return False
    return is_shell and numbers.split()[-1] == "1"


def _children(pid: int) -> list[int]:
    children = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = (folder / "stat").read_text().rpartition(")")[2].split()[1]
        except OSError:
            continue
        if int(parent) == pid:
            children.append(int(folder.name))
    return children
