"""One process prepares a token file while the others, of this machine and of others that see the same disk, wait.

A lock of the file system where all are on one machine. A shared file system may keep its locks to one machine: there the
process that prepares also makes a claim, a file which it touches all the time; a claim that nobody touches is nobody's.
Nobody waits in a network call. Whatever happens, a token file appears by a rename, at once and whole.
"""

import contextlib
import errno
import fcntl
import os
import socket
import sys
import threading
import time

TOUCHED_EVERY = 5
NOBODYS_AFTER = 60    # seconds without a touch
_LOCAL = ("ext2", "ext3", "ext4", "xfs", "zfs", "btrfs", "overlay", "reiserfs", "jfs", "ntfs", "ntfs3", "f2fs", "tmpfs", "ramfs")


class CacheLock:
    """Held while the token file `path` is made; says so when it has to wait.

    kind    data.cache_fs_type: local, shared, or auto (as the file system's type says)
    """

    def __init__(self, path, kind="auto"):
        self.x_lock, self.x_claim = path + ".lock", path + ".claim"
        self.x_shared = kind == "shared" or (kind != "local" and file_system(os.path.dirname(path)) not in (None, *_LOCAL))
        self.x_said, self.x_done = False, threading.Event()
        self.x_thread = None

    def __enter__(self):
        self.x_file = _opened_by_any_user(self.x_lock)
        try:
            if self.x_file is not None:
                fcntl.flock(self.x_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._say()
            fcntl.flock(self.x_file, fcntl.LOCK_EX)
        except OSError:
            pass    # a file system without locks
        if self.x_shared or self.x_file is None:
            self._claim()
        return self

    def __exit__(self, *_):
        if self.x_thread is not None:
            self.x_done.set()
            self.x_thread.join()
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self.x_claim)
        if self.x_file is not None:
            os.close(self.x_file)

    def _claim(self):
        seen, since = None, time.monotonic()
        while True:
            with contextlib.suppress(FileExistsError):
                with os.fdopen(os.open(self.x_claim, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666), "w") as file:
                    file.write(f"{socket.gethostname()} {os.getpid()}\n")
                self.x_thread = threading.Thread(target=self._touch, daemon=True)
                self.x_thread.start()
                return
            self._say()
            # By this machine's clock alone: the time of another's file is only compared with itself.
            with contextlib.suppress(FileNotFoundError):
                found = os.stat(self.x_claim)
                now = found.st_ino, found.st_mtime_ns
                if now != seen:
                    seen, since = now, time.monotonic()
                elif time.monotonic() - since > NOBODYS_AFTER:
                    # Two that see this at once may both prepare: twice the work, the same file.
                    os.unlink(self.x_claim)
                    continue
            time.sleep(1)

    def _touch(self):
        while not self.x_done.wait(TOUCHED_EVERY):
            try:
                os.utime(self.x_claim)
            except OSError as error:
                if error.errno == errno.ENOENT:
                    return    # somebody took us for dead

    def _say(self):
        if not self.x_said:
            print("another process prepares the same data: waiting for it", file=sys.stderr, flush=True)
        self.x_said = True


def _opened_by_any_user(path):
    """Returns the descriptor of a lock file that any user of its folder may have made; None if it cannot be opened."""
    # A sticky folder such as /tmp may refuse O_CREAT for another user's file; a lock can be had with the right to read alone.
    for flags in (os.O_RDWR | os.O_CREAT, os.O_RDWR, os.O_RDONLY):
        try:
            descriptor = os.open(path, flags | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EPERM, errno.ELOOP):
                raise
            continue
        return descriptor
    return None


def file_system(folder):
    """The type of the file system that holds `folder`, as the kernel calls it; None where it does not say."""
    best, kind, folder = "", None, os.path.realpath(folder)
    with contextlib.suppress(OSError), open("/proc/self/mountinfo", encoding="utf-8", errors="replace") as mounts:
        for line in mounts:
            left, _, right = line.partition(" - ")
            point = left.split()[4].replace("\\040", " ")
            if len(point) >= len(best) and (folder == point or folder.startswith(point.rstrip("/") + "/")):
                best, kind = point, right.split()[0]
    return kind
