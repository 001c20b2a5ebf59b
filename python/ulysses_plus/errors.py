"""Errors sorted by who must act, and how a command ends.

    UserError      exit 2    the user must change something: recipe, files, room on disk, rights
    NetworkError   exit 75   the network or the hub failed: try again
    anything else  exit 70   a fault of this program

A command prints one sentence on stderr; a traceback only for the last kind, and only when ULYSSES_DEBUG is set.
"""

import errno
import os
import sys
import traceback


class UserError(Exception):
    """Something that the user must change. The message says where, what was expected and found, and what to do."""

    exit_code = 2


class NetworkError(Exception):
    """The network or a server failed; the same command may succeed later."""

    exit_code = 75


def chain_of(error):
    """Returns the error and what it came of, the latest first."""
    chain = []
    while error is not None and error not in chain:
        chain.append(error)
        error = error.__cause__ or error.__context__
    return chain


def one_line(value, limit=300):
    """Returns str(value) with all white space collapsed to single spaces, at most `limit` characters long."""
    text = " ".join(str(value).split())
    return text if len(text) <= limit else text[: limit - 3] + "..."


def _flush():
    """Writes out what was printed; a stream that was closed when this process began is None."""
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            stream.flush()


def run(main, argv=None):
    """Runs `main(argv)` and ends the process with the exit code of what it raised (see the head of this file)."""
    try:
        code = main(sys.argv[1:] if argv is None else argv) or 0
        _flush()
    except (UserError, NetworkError) as error:
        print(one_line(error, 2000), file=sys.stderr)
        code = error.exit_code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = 130
    except Exception as error:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            where = f" ({error.filename})" if error.filename else ""
            print(f"no room left on the disk{where}: make room or choose another folder", file=sys.stderr)
            code = 2
        else:
            if os.environ.get("ULYSSES_DEBUG"):
                traceback.print_exc()
            print(
                f"internal error: {type(error).__name__}: {one_line(error)}; set ULYSSES_DEBUG=1 for the traceback",
                file=sys.stderr,
            )
            code = 70
    _flush()
    # The libraries' threads must not outlive, delay or change the exit code of a finished command.
    os._exit(code)
