"""Prepares samples in parts, by several processes: each part a token file of its own, in a folder beside the file to be.

A preparation that was ended goes on with the parts that it finds whole. Memory does not depend on how many samples there are.
"""

import contextlib
import ctypes
import glob
import multiprocessing
import os
import shutil
import signal
import sys
import time
from collections import deque
from concurrent.futures import ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool

from ulysses_plus import token_file
from ulysses_plus.errors import UserError

# Below this many samples, starting processes costs more than it saves.
WORTH_PROCESSES = 4000
_STEP = 64          # samples between two looks at the clock
_SUFFIX = ".safetensors"


class Parts:
    """The parts of one preparation.

    folder    where they lie; made if missing. What is there of a preparation that was ended is used, once its checksum is right
    encode    f(source's index, sample's index) -> (ids, flags, whether somebody answers), None for an empty text, which is left out;
              raises UserError, or with `encode.skip` leaves the sample out
    sources   opened sources
    """

    def __init__(self, folder, encode, sources):
        self.folder, self.encode, self.sources = folder, encode, sources
        os.makedirs(folder, exist_ok=True)
        self._clear()

    def names(self):
        """(source's index, first sample, last, path) of each part in order. Parts do not depend on the number of processes."""
        for which, source in enumerate(self.sources):
            count = len(source)
            size = max(_STEP, min(4096, -(-count // 256)))
            for first in range(0, count, size):
                last = min(first + size, count)
                yield which, first, last, os.path.join(self.folder, f"{which}-{first}-{last}{_SUFFIX}")

    def make(self, num_proc, interrupted):
        """Makes what is missing. `interrupted()` is asked a few times a second; raises KeyboardInterrupt when it says so."""
        total = sum(len(source) for source in self.sources)
        missing, found = [], 0
        for name in self.names():
            if token_file.is_whole(name[3]):
                found += name[2] - name[1]
            else:
                missing.append(name)
        if found:
            print(f"{found:,} of {total:,} samples were prepared before: going on from there", file=sys.stderr, flush=True)
        context = multiprocessing.get_context("fork")
        counters = context.Array("q", 2)    # samples, tokens
        progress = Progress(total, found)
        workers = min(num_proc, os.cpu_count() or 1, len(missing))
        try:
            if workers > 1 and sum(last - first for _, first, last, _ in missing) >= WORTH_PROCESSES:
                self._make_with_processes(context, workers, missing, counters, interrupted, progress)
            else:
                for name in missing:
                    for _ in _made(self.encode, counters, *name):
                        if interrupted():
                            raise KeyboardInterrupt
                        progress.show(*counters)
        finally:
            self._clear()
        progress.show(*counters, last=True)

    def _make_with_processes(self, context, workers, missing, counters, interrupted, progress):
        # Forked, so that rows and tokenizer are shared; the tokenizer's own threads must not have started.
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        executor = ProcessPoolExecutor(workers, mp_context=context, initializer=_start, initargs=(self.encode, counters, os.getpid()))
        waiting, done = deque(), False
        try:
            for name in [*missing, *[None] * 2 * workers]:
                if name is not None:
                    waiting.append(executor.submit(_make_in_worker, name))
                while waiting and (name is None or len(waiting) > 2 * workers):
                    # In order, so that of several bad samples it is the first that is named.
                    if wait([waiting[0]], timeout=0.2).done:
                        waiting.popleft().result()
                    if interrupted():
                        raise KeyboardInterrupt
                    progress.show(*counters)
            done = True
        except BrokenProcessPool as error:
            raise UserError(
                "data.num_proc: a process that tokenizes was ended from outside, as by a machine out of memory: "
                "lower num_proc and start again; what is prepared is kept"
            ) from error
        finally:
            if not done:
                for child in multiprocessing.active_children():
                    child.terminate()
            executor.shutdown(wait=True, cancel_futures=True)

    def summary(self):
        """Sums over all parts: num_samples, longest, num_tokens, num_trained_tokens, num_skipped, num_empty, silent (samples without
        an answer), vocabulary, sources (samples of each); first_skipped and first_silent, the first such sample's sentence."""
        out = dict.fromkeys(("num_samples", "longest", "num_tokens", "num_trained_tokens", "num_skipped", "num_empty", "silent", "vocabulary"), 0)
        out.update(sources=[0] * len(self.sources), first_skipped=None, first_silent=None)
        for which, _, _, path in self.names():
            part, vocabulary = token_file.read_summary(path)
            for key in ("num_samples", "num_tokens", "num_trained_tokens", "num_skipped", "num_empty", "silent"):
                out[key] += part[key]
            out["longest"], out["vocabulary"] = max(out["longest"], part["longest"]), max(out["vocabulary"], vocabulary)
            out["sources"][which] += part["num_samples"]
            for key in ("first_skipped", "first_silent"):
                out[key] = out[key] or part[key]
        return out

    def join(self, path, summary, provenance):
        """Joins the parts to the token file `path`, which appears at once and whole, and removes them."""
        whole = os.path.join(self.folder, "whole")
        try:
            token_file.join([name[3] for name in self.names()], whole, summary["num_samples"], summary["num_tokens"], summary["vocabulary"], summary["sources"], provenance)
            os.replace(whole, path)
        except BaseException:
            # As for a full disk: the parts stay, what is half written does not.
            with contextlib.suppress(OSError):
                os.unlink(whole)
            raise
        token_file.sync_folder(os.path.dirname(path))
        self.remove()

    def remove(self):
        shutil.rmtree(self.folder, ignore_errors=True)

    def _clear(self):
        """Removes what is half written."""
        for path in glob.glob(os.path.join(glob.escape(self.folder), "*")):
            if not path.endswith(_SUFFIX):
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(path)


class Progress:
    """A line on stderr about every two seconds: samples, tokens, tokens/s and the time left."""

    def __init__(self, total, before=0):
        self.total, self.before, self.began, self.shown = total, before, time.monotonic(), time.monotonic()

    def show(self, samples, tokens, last=False):
        """`samples` and `tokens` since this began; `before` were there."""
        now = time.monotonic()
        if not last and now - self.shown < 2:
            return
        self.shown = now
        seconds, done = max(now - self.began, 1e-9), self.before + samples
        left = "" if last or samples == 0 else f", {(self.total - done) * seconds / samples:.0f} s left"
        print(f"tokenised {done:,} of {self.total:,} samples, {tokens:,} tokens, {tokens / seconds:,.0f} tokens/s{left}", file=sys.stderr, flush=True)


def _made(encode, counters, which, first, last, path):
    """Writes one part; yields now and then, for who watches."""
    source = encode.sources[which]
    num_skipped, num_empty, silent, first_skipped, first_silent, shown = 0, 0, 0, None, None, 0
    writer = token_file.TokenFileWriter(path)
    try:
        for i in range(first, last):
            try:
                encoded = encode(which, i)
            except UserError as error:
                if not encode.skip:
                    raise
                num_skipped, first_skipped = num_skipped + 1, first_skipped or str(error)
            else:
                if encoded is None:
                    num_empty += 1
                elif encoded[2]:
                    writer.append(*encoded[:2], (which, source.row_number(i)))
                else:
                    at = f"{source.where}: {source.name}, sample {source.row_number(i)}: expected an assistant turn, found none"
                    if encode.skip:
                        num_skipped, first_skipped = num_skipped + 1, first_skipped or at
                    else:
                        silent, first_silent = silent + 1, first_silent or at
            done = i + 1 - first
            if done % _STEP == 0 or i + 1 == last:
                with counters.get_lock():
                    counters[0] += done % _STEP or _STEP
                    counters[1] += writer.num_tokens - shown
                shown = writer.num_tokens
                yield
        writer.finish({}, num_skipped=num_skipped, num_empty=num_empty, silent=silent, first_skipped=first_skipped, first_silent=first_silent)
    finally:
        writer.discard()


def _start(encode, counters, parent):
    global _encode, _counters
    # The process that waits for the results ends this one; where it is killed the kernel does.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)    # PR_SET_PDEATHSIG
    if os.getppid() != parent:
        os._exit(1)
    _encode, _counters = encode, counters


def _make_in_worker(name):
    for _ in _made(_encode, _counters, *name):
        pass
