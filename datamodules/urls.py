"""What is at a URL: http, https and file by the standard library, others by fsspec.

Asked for again where the connection breaks off or the server is busy.
"""

import contextlib
import re
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from http.client import HTTPException, InvalidURL
from typing import Any, Protocol, TypeVar, runtime_checkable
from urllib.parse import quote

import fsspec

TRIES = 4
PAUSE = 1.0  # seconds before the second try; twice as many before each further one
TIMEOUT = 60.0  # seconds that a server may be silent
T = TypeVar("T")


@runtime_checkable
class Readable(Protocol):
    """What comes from a URL."""

    def read(self, count: int = -1, /) -> bytes: ...


def is_url(root: str) -> bool:
    return "://" in root


def quoted(url: str) -> str:
    """A URL as a server is asked for it: what may not stand in its path is quoted.

    What is quoted already stays, and "#" belongs to a name: nobody asks for a place in a page.
    """
    scheme, _, rest = url.partition("://")
    host, slash, path = rest.partition("/")
    path = re.sub("%(?![0-9A-Fa-f]{2})", "%25", path)
    return f"{scheme}://{host}{slash}" + quote(path, safe="/%?&=:;,@!$'()*+")


@contextlib.contextmanager
def opening_url(url: str) -> Iterator[Readable]:
    """What is at a URL.

    Raises:
        ValueError: no URL, or one of a kind that no installed package knows.
    """
    if url.startswith(("http://", "https://", "file://")):
        try:
            answer = urllib.request.urlopen(quoted(url), timeout=TIMEOUT)
        except (InvalidURL, ValueError) as error:
            raise ValueError(
                f"{url} is no address ({error}); expected such as https://host/directory"
            ) from error
        with answer:
            yield answer
        return
    try:
        opened: Any = fsspec.open(url, "rb")
    except (ImportError, ValueError) as error:
        raise ValueError(
            f"{url} cannot be read ({error}); install the package that knows it, such as s3fs, "
            f"gcsfs or huggingface_hub, or use an https:// address"
        ) from error
    try:
        with opened as file:
            yield file
    except (OSError, EOFError, ValueError):
        raise
    except Exception as error:  # each of those packages has errors of its own
        raise OSError(f"{type(error).__name__}: {error}") from error


def is_hopeless(error: Exception) -> bool:
    """Whether another try would only fail alike: not there, not allowed, nobody to ask."""
    if isinstance(error, urllib.error.HTTPError):
        return 300 <= error.code < 500 and error.code not in (408, 425, 429)
    reason = getattr(error, "reason", error)
    return isinstance(reason, FileNotFoundError | PermissionError | str)


def insist(url: str, read: Callable[[Readable], T]) -> T:
    """`read` of what is at a URL; again after a pause where the connection broke off.

    Raises:
        ValueError: it does not come, or is not what was expected.
    """
    for attempt in range(TRIES):
        if attempt:
            time.sleep(PAUSE * 2 ** (attempt - 1))
        try:
            with opening_url(url) as source:
                return read(source)
        except (OSError, EOFError, HTTPException) as error:
            last = error
            if is_hopeless(error):
                break
    times = "once" if attempt == 0 else f"{attempt + 1} times"
    # Packages raise it with a name only.
    why = f"there is no file {last}" if isinstance(last, FileNotFoundError) else last
    raise ValueError(
        f"{url} could not be fetched, tried {times}: {why}; check that it is there, whole "
        f"and readable from this machine; `patchlight fit --resume RUN` goes on with a run"
    ) from last
