"""An SSH server that runs commands, for Dask's ``SSHCluster``: `python ssh_server.py CLIENT_KEY.pub`.

It prints the port of 127.0.0.1 where it listens, and ends with its standard input.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from contextlib import suppress

import asyncssh


async def run(ssh: asyncssh.SSHServerProcess[bytes]) -> None:
    """Run the command in a session of its own, which ends with the connection."""
    child = await asyncio.create_subprocess_shell(
        ssh.command or "exit 2",
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        start_new_session=True,
    )
    try:
        await ssh.redirect(stdout=child.stdout, stderr=child.stderr)
        gone = asyncio.ensure_future(ssh.channel.wait_closed())
        await asyncio.wait([gone, asyncio.ensure_future(child.wait())], return_when=asyncio.FIRST_COMPLETED)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGTERM)
    ssh.exit(await child.wait() & 0xFF)


async def main(key: str) -> None:
    server = await asyncssh.listen(
        "127.0.0.1",
        server_host_keys=[asyncssh.generate_private_key("ssh-ed25519")],
        authorized_client_keys=key,
        process_factory=run,
        encoding=None,
    )
    print(server.get_port(), flush=True)
    await asyncio.to_thread(sys.stdin.read)


asyncio.run(main(sys.argv[1]))
