"""Network namespaces that stand for hosts: each has its own network, name and addresses, and no file of its own.

A switch (a bridge) lies in a namespace of its own as well, so that nothing of the machine's network is touched.
Programs get to a host through an agent that both MPIs take for ssh.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import shutil
import signal
import stat
import uuid
from collections.abc import Iterator
from pathlib import Path

from tests.conftest import Mpi, run_bounded

NETWORK = "10.77.13"

# Bytes that go through a cable as one, at most: what its queue takes as it is. Larger ones it would cut into packets of
# 1500 bytes and time each by itself, on the cores of the hosts: between four hosts that took longer than the cable.
PACKETS = 15_000

# As ssh does it, the words are joined for a shell, which starts with next to no environment.
AGENT = """\
#!/bin/sh
# {network}.N is the namespace {prefix}N. Options that are meant for ssh are left out.
while [ "${{1#-}}" != "$1" ]; do shift; done
host=$1
shift
space={prefix}${{host##*.}}
exec ip netns exec "$space" unshare --uts env -i HOME="$HOME" PATH=/usr/sbin:/usr/bin:/sbin:/bin \\
    sh -c "hostname $space; $*"
"""

POWERLESS = "--bounding-set -dac_override,-dac_read_search"


def missing() -> str | None:
    """Say why no namespaces can be made here, or None."""
    if os.geteuid() != 0:
        return "only root can make network namespaces"
    if not shutil.which("ip"):
        return "not installed: ip (apt install iproute2)"
    name = f"mpillm{os.getpid()}try"
    made = run_bounded(["ip", "netns", "add", name])
    if made.returncode:
        return f"network namespaces cannot be made here: {made.stderr.strip()}"
    linked = run_bounded(["ip", "-n", name, "link", "add", "try", "type", "bridge"])
    run_bounded(["ip", "netns", "delete", name])
    return f"bridges cannot be made here: {linked.stderr.strip()}" if linked.returncode else None


class Hosts:
    """So many hosts on one switch, with addresses NETWORK.1, NETWORK.2, ..."""

    def __init__(self, folder: Path, count: int, rate: str = "") -> None:
        """`rate`, in tc's words, is that of every cable, each way; without one it is as fast as the machine."""
        self.rate = rate
        self.prefix = f"mpillm{os.getpid()}h"
        self.switch = f"mpillm{os.getpid()}s"
        self.numbers = range(1, count + 1)
        self.addresses = [f"{NETWORK}.{number}" for number in self.numbers]
        #: words of a shell with which programs on the first host begin, where others have them in `agent`
        self.begin = ""
        self.agent = folder / "agent"
        self.agent.write_text(AGENT.format(network=NETWORK, prefix=self.prefix))
        self.agent.chmod(self.agent.stat().st_mode | stat.S_IXUSR)

    @contextlib.contextmanager
    def up(self) -> Iterator[Hosts]:
        """The hosts exist inside this block."""
        try:
            _ip("netns", "add", self.switch)
            _ip("-n", self.switch, "link", "add", "switch", "type", "bridge")
            _ip("-n", self.switch, "link", "set", "switch", "up")
            for number in self.numbers:
                host, port = f"{self.prefix}{number}", f"port{number}"
                _ip("netns", "add", host)
                _ip(
                    "-n",
                    self.switch,
                    "link",
                    "add",
                    port,
                    "type",
                    "veth",
                    "peer",
                    "name",
                    "eth0",
                    "netns",
                    host,
                )
                _ip("-n", self.switch, "link", "set", port, "master", "switch", "up")
                _ip("-n", host, "address", "add", f"{NETWORK}.{number}/24", "dev", "eth0")
                for device in ("lo", "eth0"):
                    _ip("-n", host, "link", "set", device, "up")
                if self.rate:
                    most = str(min(_burst(self.rate), PACKETS))
                    for space, device in ((self.switch, port), (host, "eth0")):
                        _ip("-n", space, "link", "set", device, "gso_max_size", most, "gro_max_size", most)
                        queue = f"tbf rate {self.rate} burst {_burst(self.rate)} latency 100ms"
                        words = f"qdisc add dev {device} root {queue}"
                        done = run_bounded(["tc", "-n", space, *words.split()])
                        assert done.returncode == 0, f"tc {words}: {done.stderr}"
            yield self
        finally:
            for name in (self.switch, *(f"{self.prefix}{number}" for number in self.numbers)):
                for left in run_bounded(["ip", "netns", "pids", name]).stdout.split():
                    with contextlib.suppress(
                        ProcessLookupError
                    ):  # such as mpiexec's daemon behind a cut cable
                        os.kill(int(left), signal.SIGKILL)
                run_bounded(["ip", "netns", "delete", name])

    def before(self, number: int, words: str) -> None:
        """Let a host do this before each program: it sees its own mounts, and root may not read others' files there."""
        agent, only = self.agent.read_text(), f"[ $space = {self.prefix}{number} ]"
        then = f"{words} && exec setpriv {POWERLESS} sh -c '$*'"
        agent = agent.replace("exec ip", f'{only} && set -- "{then}"\nexec ip')
        self.agent.write_text(agent.replace("unshare --uts", "unshare --uts --mount"))

    def apart(self) -> None:
        """Let each host be known as a machine of its own; those that share a machine are taken to share its cores."""
        boots = self.agent.with_name("boot")
        for number in self.numbers:
            boots.with_name(f"boot{number}").write_text(str(uuid.uuid4()))
        bind = f"mount --bind {boots}{{}} /proc/sys/kernel/random/boot_id; "
        agent = self.agent.read_text().replace(
            "hostname $space; ", "hostname $space; " + bind.format("${host##*.}")
        )
        self.agent.write_text(agent)
        self.begin += bind.format(1)

    def sent(self) -> list[int]:
        """The bytes that each host's interface has sent so far."""
        words = ["--json", "--statistics", "link", "show", "eth0"]
        seen = [json.loads(_ip("-n", f"{self.prefix}{number}", *words)) for number in self.numbers]
        return [int(one[0]["stats64"]["tx"]["bytes"]) for one in seen]

    def on_first(self, command: list[str | Path], env: dict[str, str]) -> list[str | Path]:
        """The command line that runs a command on the first host, with exactly this environment."""
        settings = [f"{name}={value}" for name, value in env.items()]
        line = f"hostname {self.prefix}1; {self.begin}exec {shlex.join(map(str, command))}"
        return [
            "ip",
            "netns",
            "exec",
            f"{self.prefix}1",
            "unshare",
            "--uts",
            "env",
            "-i",
            *settings,
            "sh",
            "-c",
            line,
        ]

    def listed(self, mpi: Mpi, count: int) -> str:
        """The lines of a hostfile with the first hosts, a rank on each."""
        one = ":1" if mpi.name == "mpich" else " slots=1"
        return "".join(f"{address}{one}\n" for address in self.addresses[:count])

    def launcher(self, mpi: Mpi, hostfile: Path) -> list[str | Path]:
        """mpiexec with what a cluster on Ethernet needs, and the agent where ssh would be."""
        if mpi.name == "mpich":
            return [
                mpi.mpiexec,
                "-f",
                hostfile,
                "-launcher",
                "ssh",
                "-launcher-exec",
                self.agent,
                "-iface",
                "eth0",
            ]
        lan = f"{NETWORK}.0/24"
        words = [
            "--hostfile",
            hostfile,
            "--prtemca",
            "plm_ssh_agent",
            self.agent,
            "--prtemca",
            "prte_if_include",
            lan,
        ]
        # Ranks on all hosts run the sources that the first one does.
        return [mpi.mpiexec, *words, "--mca", "btl_tcp_if_include", lan, "-x", "PYTHONPATH"]


def _burst(rate: str) -> int:
    """Bytes that a cable takes at once: a packet, or what it carries in an eighth of a millisecond.

    With many more of them a slow cable would carry a small message in no time.
    """
    bits = int(rate[:-4]) * {"mbit": 10**6, "gbit": 10**9}[rate[-4:]]
    return max(1600, bits // 8 // 8000)


def _ip(*words: str) -> str:
    done = run_bounded(["ip", *words])
    assert done.returncode == 0, f"ip {shlex.join(words)}: {done.stderr}"
    return done.stdout
