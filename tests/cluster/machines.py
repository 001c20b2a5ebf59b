"""Machines to launch on: network namespaces of this one, each with an sshd of its own."""

import contextlib
import os
import pathlib
import shutil
import subprocess
import time

PORT = 2222


class Unavailable(Exception):
    """Why there are none here."""


def call(*command, **more):
    return subprocess.run([str(part) for part in command], check=True, capture_output=True, text=True, **more)


class Host:
    """A namespace with an address; what runs there sees this machine's files."""

    port = PORT

    def __init__(self, name, address, folder):
        self.name, self.address, self.folder, self.sshd = name, address, folder, None

    def start_sshd(self):
        config = self.folder / f"sshd-{self.name}.conf"
        config.write_text(
            f"Port {PORT}\nListenAddress {self.address}\nHostKey {self.folder}/host_key\nAuthorizedKeysFile {self.folder}/key.pub\n"
            "PidFile none\nUsePAM no\nStrictModes no\nPermitRootLogin yes\nPasswordAuthentication no\nMaxStartups 100\n"
        )
        pathlib.Path("/run/sshd").mkdir(exist_ok=True)
        log = open(self.folder / f"sshd-{self.name}.log", "w")
        self.sshd = subprocess.Popen(["ip", "netns", "exec", self.name, "/usr/sbin/sshd", "-D", "-e", "-f", str(config)], stdin=subprocess.DEVNULL, stderr=log)

    def kill_sshd(self):
        """Its listener and all connections, as when the daemon's machine loses them."""
        for pid in subprocess.run(["ip", "netns", "pids", self.name], capture_output=True, text=True, check=True).stdout.split():
            with contextlib.suppress(OSError):
                if "sshd" in pathlib.Path(f"/proc/{pid}/comm").read_text():
                    os.kill(int(pid), 9)
        self.sshd.wait()

    def answers(self):
        return subprocess.run([self.folder / "bin" / "ssh", "-o", "BatchMode=yes", "-p", str(PORT), self.address, "true"], capture_output=True).returncode == 0

    @contextlib.contextmanager
    def own(self, place, content):
        """This machine sees the folder `content` at `place`; the others do not."""
        there = ["nsenter", "-t", self.sshd.pid, "-m"]
        call(*there, "mount", "--bind", content, place)
        try:
            yield content
        finally:
            call(*there, "umount", "-l", place)

    def link(self, up):
        call("ip", "netns", "exec", self.name, "ip", "link", "set", "eth0", "up" if up else "down")
        if up:
            call("ip", "netns", "exec", self.name, "ip", "route", "replace", "default", "dev", "eth0")


@contextlib.contextmanager
def machines(folder):
    """Two hosts on a bridge; `folder`, whose `bin` has to come first on PATH: its ssh knows their keys. Raises Unavailable."""
    for program, package in (("/usr/sbin/sshd", "openssh-server"), ("ssh-keygen", "openssh-client"), ("ip", "iproute2")):
        if shutil.which(program) is None:
            raise Unavailable(f"no {program} here: Debian's package {package}")
    if os.geteuid() != 0:
        raise Unavailable("only root makes network namespaces")
    folder.chmod(0o755)
    tag, net = f"u{os.getpid() % 100000}", f"10.{77 + os.getpid() % 100}.{os.getpid() // 100 % 250}"
    bridge = f"{tag}br"
    hosts = [Host(f"{tag}h{i}", f"{net}.{i + 2}", folder) for i in range(2)]
    try:
        call("ip", "link", "add", bridge, "type", "bridge")
        call("ip", "addr", "add", f"{net}.1/24", "dev", bridge)
        call("ip", "link", "set", bridge, "up")
        for i, host in enumerate(hosts):
            call("ip", "netns", "add", host.name)
            call("ip", "link", "add", f"{tag}v{i}", "type", "veth", "peer", "name", "eth0", "netns", host.name)
            call("ip", "link", "set", f"{tag}v{i}", "master", bridge, "up")
            call("ip", "netns", "exec", host.name, "ip", "addr", "add", f"{host.address}/24", "dev", "eth0")
            call("ip", "netns", "exec", host.name, "ip", "link", "set", "lo", "up")
            call("ip", "netns", "exec", host.name, "ip", "link", "set", "eth0", "up")
    except (subprocess.CalledProcessError, OSError) as error:
        remove(bridge, hosts)
        raise Unavailable(f"no network namespaces here: {getattr(error, 'stderr', error)}") from error
    try:
        for name in ("key", "host_key"):
            call("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / name)
        public = (folder / "host_key.pub").read_text().split()[:2]
        (folder / "known_hosts").write_text("".join(f"[{h.address}]:{PORT} {' '.join(public)}\n" for h in hosts))
        (folder / "config").write_text(f"IdentityFile {folder}/key\nIdentitiesOnly yes\nUserKnownHostsFile {folder}/known_hosts\nGlobalKnownHostsFile /dev/null\n")
        (folder / "bin").mkdir()
        (folder / "bin" / "ssh").write_text(f'#!/bin/sh\nexec {shutil.which("ssh")} -F {folder}/config "$@"\n')
        (folder / "bin" / "ssh").chmod(0o755)
        for host in hosts:
            host.start_sshd()
        for host in hosts:
            for _ in range(100):
                if host.answers():
                    break
                time.sleep(0.1)
            else:
                raise Unavailable(f"sshd does not answer: {(folder / f'sshd-{host.name}.log').read_text()[-300:]}")
        yield hosts
    finally:
        remove(bridge, hosts)


def remove(bridge, hosts):
    for host in hosts:
        if host.sshd:
            host.sshd.kill()
        pids = subprocess.run(["ip", "netns", "pids", host.name], capture_output=True, text=True).stdout.split()
        subprocess.run(["kill", "-9", *pids], capture_output=True)
        subprocess.run(["ip", "netns", "del", host.name], capture_output=True)
    subprocess.run(["ip", "link", "del", bridge], capture_output=True)
