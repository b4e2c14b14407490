"""``mp-rerank serve``: one pool for every process and language, over HTTP."""

from __future__ import annotations

import argparse
import dataclasses
import logging
import re

from mp_rerank._planning.machine import read_machine
from mp_rerank.cli.options import PROGRAM, add_network, add_workers
from mp_rerank.cli.streams import InputError
from mp_rerank.config import BUILTIN, ModelSpec

__all__ = ["DESCRIPTION", "HELP", "add_arguments", "call"]

HELP = "serve models over HTTP"
DESCRIPTION = (
    "Serve models over HTTP, in the dialects of text-embeddings-inference, Jina, vLLM, Infinity and Cohere. "
    "SIGTERM: finish what is there and leave; a second one: leave at once; SIGHUP: read the API keys again; "
    "SIGUSR1: load the models anew, as their files are now."
)

# The part of the machine's memory that workers may take.
MEMORY_SHARE = 0.8

# Options that are fields of `Limits`.
LIMITS = {
    "body_bytes": "bytes of a body",
    "documents": "documents of a request",
    "characters": "characters of a text",
    "requests": "requests at a time",
    "requests_per_caller": "requests at a time, of one caller",
    "connections": "connections at a time",
    "pending_pairs": "pairs waiting or being scored, of one model",
    "pending_pairs_per_caller": "the same of one caller",
    "timeout": "seconds a request may take",
    "read_timeout": "seconds for headers, and again for a body, to come",
    "write_timeout": "seconds an answer may wait for its reader",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what the command takes."""
    parser.add_argument(
        "--model",
        action="append",
        metavar="M",
        help="a hub name or a local folder; may be given several times (default: the built-in model)",
    )
    parser.add_argument(
        "--alias", action="append", default=[], metavar="NAME=MODEL", help="another name for a model that is served"
    )
    parser.add_argument(
        "--memory", metavar="SIZE", help="bound on all workers' memory (default: 80%% of the machine's)"
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at (default: 127.0.0.1)")
    parser.add_argument("--port", type=int, default=8080, help="port to listen at; 0: any (default: 8080)")
    parser.add_argument("--uds", metavar="PATH", help="listen at a Unix socket instead")
    parser.add_argument(
        "--uds-mode", default="660", metavar="MODE", help="permissions of that socket, in octal (default: 660)"
    )
    parser.add_argument(
        "--api-key-file",
        metavar="F",
        help="who may ask: a key a line, or a name and a key (default: MP_RERANK_API_KEYS, else everybody)",
    )
    parser.add_argument(
        "--caller-header",
        default="x-caller",
        metavar="NAME",
        help="names the caller, without a key (default: x-caller)",
    )
    parser.add_argument(
        "--allow-host",
        action="append",
        default=[],
        metavar="NAME",
        help="accept this name in the header Host; '*': any (default: any, but on loopback without keys: loopback's)",
    )
    parser.add_argument(
        "--cors-allow-origin", action="append", default=[], metavar="ORIGIN", help="pages of this origin may ask"
    )
    parser.add_argument("--access-log", action="store_true", help="log each request")
    parser.add_argument(
        "--devices", default=["auto"], type=lambda names: names.split(","), metavar="DEVICE[,DEVICE...]"
    )
    add_workers(parser)
    add_network(parser)
    parser.add_argument("-v", "--verbose", action="store_true", help="log what the pool and its workers do")
    bounds = parser.add_argument_group("limits")
    for name, about in LIMITS.items():
        bounds.add_argument(f"--max-{name.replace('_', '-')}", type=int, metavar="N", dest=f"max_{name}", help=about)


def call(arguments: argparse.Namespace) -> int:
    """Run the command; its exit code."""
    try:
        from mp_rerank.server.config import LOOPBACK, ServerConfig
        from mp_rerank.server.keys import Keys
        from mp_rerank.server.limits import Limits
        from mp_rerank.server.models import served_name
        from mp_rerank.server.run import serve
    except ModuleNotFoundError as error:
        raise InputError(f"serving needs the extra: pip install 'mp-rerank[serve]' ({error})") from error

    def keys() -> Keys:
        return Keys.read(arguments.api_key_file)

    known = keys()
    network = {"dtype": arguments.dtype, "max_length": arguments.max_length, "backend": arguments.backend}
    specs = [ModelSpec(model, **network) for model in arguments.model or [BUILTIN]]
    models = {served_name(spec): spec for spec in specs}
    if len(models) < len(specs):
        raise InputError("--model: two of these would be served under one name")
    for spec in specs:
        spec.check_exists()
    hosts = frozenset(name.lower() for name in arguments.allow_host)
    alone = arguments.uds is None and arguments.host in LOOPBACK and not known
    if alone and "*" not in hosts:
        hosts |= {*LOOPBACK, arguments.host}
    logging.getLogger("mp_rerank.access").setLevel(logging.INFO if arguments.access_log else logging.CRITICAL)
    config = ServerConfig(
        models=models,
        aliases=dict(_alias(text) for text in arguments.alias),
        memory=arguments.memory or int(read_machine().memory_total * MEMORY_SHARE) or "8GiB",
        pool={
            "devices": arguments.devices,
            "workers": arguments.workers,
            "threads_per_worker": arguments.threads,
            "start_method": arguments.start_method,
        },
        host=arguments.host,
        port=arguments.port,
        uds=arguments.uds,
        uds_mode=_mode(arguments.uds_mode),
        keys=known,
        caller_header=arguments.caller_header,
        hosts=hosts if hosts and "*" not in hosts else None,
        origins=tuple(arguments.cors_allow_origin),
        limits=Limits(**_limits(arguments, Limits())),
        access_log=arguments.access_log,
    )
    if not known and not (arguments.uds or arguments.host in LOOPBACK):
        logging.getLogger(PROGRAM).warning(
            "everybody who reaches %s may ask: there is no API key [mp-rerank explain no-api-key]", arguments.host
        )
    serve(config, keys=keys)
    return 0


def _limits(arguments: argparse.Namespace, defaults: object) -> dict[str, int]:
    given = {name: getattr(arguments, f"max_{name}") for name in LIMITS}
    return {
        **dataclasses.asdict(defaults),  # type: ignore[call-overload]
        **{name: value for name, value in given.items() if value is not None},
    }


def _alias(text: str) -> tuple[str, str]:
    alias, equals, name = text.partition("=")
    if not (alias and equals and name):
        raise InputError(f"--alias: NAME=MODEL is needed, not {text!r}")
    return alias, name


def _mode(text: str) -> int:
    if not re.fullmatch(r"[0-7]{3,4}", text):
        raise InputError(f"--uds-mode: an octal number such as 660 is needed, not {text!r}")
    return int(text, 8)
