"""``mp-rerank``, the command.

    mp-rerank rank QUERY [FILE]     rank the documents of FILE, or of standard input
    mp-rerank run --queries Q --corpus C --run R --output O
                                    rerank a whole run of a first stage, from files to a file
    mp-rerank serve                 serve models over HTTP
    mp-rerank top [URL]             watch a server
    mp-rerank plan                  which workers a pool would start here, and why
    mp-rerank tune                  measure which are fastest here, and keep the answer for later pools
    mp-rerank race                  whether threads with a CrossEncoder go wrong here
    mp-rerank explain WORDS         what an error or a line of the log means, and what to do

Exit codes:
    0    done
    1    the work failed, or its result could not be written
    2    a mistake in the call or in the input
    3    ``run``: done, but some documents could not be scored; ``race``: threads with a CrossEncoder go wrong here
    130  Ctrl-C
    143  SIGTERM; ``serve`` ends with 0 then, when it has answered what it had taken

Each command has a module of its own. These are for all of them: ``options`` (what several commands take), ``documents``
(reading documents) and ``streams`` (standard input and output, in whatever state they are).
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import signal
import sys
import threading
from collections.abc import Iterator, Sequence

import mp_rerank
from mp_rerank._text import one_line, printable
from mp_rerank.cli import explain, plan, race, rank, run, serve, streams, top, tune
from mp_rerank.cli.options import PROGRAM
from mp_rerank.cli.streams import InputError, OutputError
from mp_rerank.errors import RerankError

__all__ = ["main"]

COMMANDS = {
    "rank": rank,
    "serve": serve,
    "top": top,
    "plan": plan,
    "tune": tune,
    "run": run,
    "race": race,
    "explain": explain,
}
FAILED, MISTAKE, INTERRUPTED, TERMINATED = 1, 2, 130, 143


class Terminated(KeyboardInterrupt):
    """SIGTERM came."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command on ``argv``, or on the process's own arguments; returns the exit code."""
    streams.prepare()
    try:
        code = _run(sys.argv[1:] if argv is None else list(argv))
        streams.flush()
        return code
    except RerankError as error:
        return _failed(f"{error} [{PROGRAM} explain {type(error).__name__}]", FAILED)
    except (InputError, TypeError, ValueError) as error:
        return _failed(error, MISTAKE)
    except BrokenPipeError:  # the reader, such as head, has seen enough
        streams.discard_output()
        return 0
    except OutputError as error:
        streams.discard_output()
        return _failed(error, FAILED)
    except OSError as error:
        return _failed(f"{error.filename}: {error.strerror}" if error.filename else error, FAILED)
    except Terminated:
        return TERMINATED
    except KeyboardInterrupt:
        return INTERRUPTED


def _run(argv: list[str]) -> int:
    try:
        arguments = _parse(argv)
    except SystemExit as done:  # after --help, --version or a mistake
        return done.code if isinstance(done.code, int) else MISTAKE
    _log(verbose=arguments.verbose)
    ending = contextlib.nullcontext() if arguments.call is serve.call else _tidy_end()  # the server has its own
    with ending:
        code: int = arguments.call(arguments)
    return code


@contextlib.contextmanager
def _tidy_end() -> Iterator[None]:
    """SIGTERM ends the command as Ctrl-C does. By itself it would leave the pool's semaphores to multiprocessing's
    resource tracker, which removes them, and prints a warning that nobody asked for.
    """
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, _terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _terminate(number: int, frame: object) -> None:
    raise Terminated


def _parse(argv: list[str]) -> argparse.Namespace:
    """The arguments of a command, its options before, between and after the others."""
    parser = argparse.ArgumentParser(
        prog=PROGRAM, description="Rerank documents with a cross-encoder, in a pool of worker processes."
    )
    parser.add_argument("--version", action="version", version=f"{PROGRAM} {mp_rerank.__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for name, command in COMMANDS.items():
        of_command = commands.add_parser(name, help=command.HELP, description=command.DESCRIPTION)
        command.add_arguments(of_command)
        of_command.set_defaults(call=command.call)
        if argv[:1] == [name]:  # subparsers by themselves take options and arguments in one order only
            return of_command.parse_intermixed_args(argv[1:])
    return parser.parse_args(argv)


class _Formatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))


def _log(*, verbose: bool) -> None:
    handler = logging.StreamHandler()
    handler.setFormatter(_Formatter(f"{PROGRAM}: %(message)s"))
    logging.basicConfig(handlers=[handler], level=logging.INFO if verbose else logging.WARNING)


def _failed(error: object, code: int) -> int:
    print(f"{PROGRAM}: error: {one_line(error)}", file=sys.stderr)
    return code
