"""Runs the command in forks of a process that has imported everything already.

Importing torch and Lightning takes longer than most runs of the tests. A line of standard input is
a request (JSON), a line of standard output its exit code.
"""

import json
import os
import sys
from typing import Any

from experiments import cli
from tests.killed import doom


def become(request: dict[str, Any]) -> None:
    """Turn this fork into what a shell would have started."""
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["environment"])
    for descriptor, name in ((1, "stdout"), (2, "stderr")):
        file = os.open(request[name], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, descriptor)
    sys.argv = [str(cli.__file__), *request["arguments"]]
    sys.modules["__main__"] = cli  # what Lightning starts further processes of
    if request["doom"] is not None:
        doom(*request["doom"])


def serve() -> int | None:
    """The exit code in a fork that has run its command, None at the end of the requests."""
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            become(json.loads(line))
            return cli.main()
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)
    return None


if __name__ == "__main__":
    sys.exit(serve())
