"""Runs the command in forks of a process that has imported everything already.

Importing torch and Lightning takes longer than most runs of the tests. A line of standard input is
a request (JSON), a line of standard output its exit codes. The ranks of a run on several devices
are forks as well, where Lightning would start all but the first anew, and so are those of a sweep.
"""

import json
import os
import signal
import socket
import sys
import time
from collections.abc import Sequence
from typing import Any

from experiments import cli, sweep
from tests.killed import doom

GRACE = 20  # seconds


def train_in_a_fork(arguments: Sequence[str]) -> None:
    """In the place of the processes that a sweep starts."""
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child == 0:
        sys.argv[1:] = arguments
        code = 1
        try:
            code = cli.main()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    os.waitpid(child, 0)


def become(request: dict[str, Any]) -> None:
    """Turn this fork into what a shell would have started."""
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["environment"])
    for descriptor, name in ((1, "stdout"), (2, "stderr")):
        file = os.open(request[name], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, descriptor)
    sys.argv = [str(cli.__file__), *request["arguments"]]
    sweep.train = train_in_a_fork
    sys.modules["__main__"] = cli  # what Lightning starts further processes of
    if request["doom"] is not None:
        step, number, ranks = request["doom"]
        if int(os.environ.get("LOCAL_RANK", 0)) in ranks:
            doom(step, number)


def place(rank: int, ranks: int, port: int, apart: bool) -> dict[str, str]:
    """What a launcher would tell a rank, Lightning's or, `apart`, that of two machines."""
    if ranks == 1:
        return {}
    node, local = (rank, 0) if apart else (0, rank)
    given = {"LOCAL_RANK": local, "NODE_RANK": node, "WORLD_SIZE": ranks, "MASTER_PORT": port}
    return {"MASTER_ADDR": "127.0.0.1"} | {name: str(value) for name, value in given.items()}


def free_port() -> int:
    with socket.socket() as opened:
        opened.bind(("127.0.0.1", 0))
        return int(opened.getsockname()[1])


def wait_for(children: list[int]) -> list[int]:
    """Their exit codes; when one has failed, the others have some seconds left."""
    codes: dict[int, int] = {}
    deadline = float("inf")
    while len(codes) < len(children):
        for child in (child for child in children if child not in codes):
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                codes[child] = os.waitstatus_to_exitcode(status)
                if codes[child]:
                    deadline = min(deadline, time.monotonic() + GRACE)
            elif time.monotonic() > deadline:
                os.kill(child, signal.SIGKILL)
        time.sleep(0.02)
    return [codes[child] for child in children]


def serve() -> int | None:
    """The exit code in a fork that has run its command, None at the end of the requests."""
    for line in sys.stdin:
        request = json.loads(line)
        ranks, apart, port, children = request["ranks"], request["apart"], free_port(), []
        for rank in range(ranks):
            child = os.fork()
            if child == 0:
                request["environment"] |= place(rank, ranks, port, apart)
                become(request)
                return cli.main()
            children.append(child)
        print(json.dumps(wait_for(children)), flush=True)
    return None


if __name__ == "__main__":
    sys.exit(serve())
