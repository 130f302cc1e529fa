"""What was measured of a run after its training, kept in the run: `evaluations/PROTOCOL.json`."""

import json
import shlex
import sys
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, TypedDict

DIRECTORY = "evaluations"


class Evaluation(TypedDict):
    """One measurement.

    protocol:    "knn", "fewshot", ...
    values:      what was measured, such as {"top1 k=20": 0.872}; shares of one, not percent
    main:        the name among `values` that a table shows
    checkpoint:  the file
    network:     which network of it
    fingerprint: of the weights
    data:        the data in words
    command:     what made it
    date:        in UTC
    """

    protocol: str
    values: dict[str, float]
    main: str
    checkpoint: str
    network: str
    fingerprint: str
    data: str
    command: str
    date: str


def command_line() -> str:
    """The command that this process was started with."""
    return shlex.join(["patchlight", *sys.argv[1:]])


def record(
    run: Path,
    protocol: str,
    values: Mapping[str, float],
    main: str,
    *,
    checkpoint: str,
    network: str,
    fingerprint: str,
    data: str,
) -> Path:
    """Keep a measurement in its run, in the place of an earlier one; returns the file.

    `protocol` alone stands for the run's own data; a suffix (`knn.1a2b3c4d`) for something else.
    """
    assert main in values
    found = Evaluation(
        protocol=protocol,
        values={name: float(value) for name, value in values.items()},
        main=main,
        checkpoint=checkpoint,
        network=network,
        fingerprint=fingerprint,
        data=data,
        command=command_line(),
        date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
    )
    path = run / DIRECTORY / f"{protocol}.json"
    path.parent.mkdir(exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    temporary.replace(path)
    return path


def evaluations(run: Path) -> dict[str, Evaluation]:
    """What was measured of a run, by protocol; files that are no measurement are left out."""
    found: dict[str, Any] = {}
    for path in sorted((run / DIRECTORY).glob("*.json")):
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            content["values"][content["main"]]
        except (ValueError, KeyError, TypeError):
            continue
        found[path.stem] = content
    return found
