"""A server of files, and what goes wrong with one."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any


class Server(SimpleHTTPRequestHandler):
    """Serves a directory; does to its first answers what `faults` say of their paths.

    A fault is a status, such as "503"; another path to ask for; or "broken off", "short", "silent".
    """

    faults: dict[str, list[str]]
    asked: list[str]

    def __init__(self, *arguments: Any, faults: Any, asked: Any, **options: Any) -> None:
        self.faults, self.asked = faults, asked
        super().__init__(*arguments, **options)

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        self.asked.append(self.path)
        waiting = self.faults.get(self.path, [])
        fault = waiting.pop(0) if waiting else ""
        if fault.isdigit():
            self.send_error(int(fault))
            return
        if fault.startswith("/"):
            self.send_response(302)
            self.send_header("Location", fault)
            self.end_headers()
            return
        if fault == "silent":
            time.sleep(1.0)
            return
        if not fault:
            super().do_GET()
            return
        content = Path(self.translate_path(self.path)).read_bytes()
        self.send_response(200)
        length = len(content) if fault == "broken off" else len(content) // 2
        self.send_header("Content-Length", str(length))
        self.end_headers()
        self.wfile.write(content[: len(content) // 2])  # and then the connection ends


@contextmanager
def served(
    directory: Path, faults: dict[str, list[str]] | None = None
) -> Iterator[tuple[str, list[str]]]:
    """A URL of a directory, and what is asked of it; `faults` are by path."""
    asked: list[str] = []
    by_path = {path: list(what) for path, what in (faults or {}).items()}
    handler = partial(Server, directory=str(directory), faults=by_path, asked=asked)
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
