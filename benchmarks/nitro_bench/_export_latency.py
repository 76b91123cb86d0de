"""Child process of `export`: one stage on one side, compared with its reference and then timed.

Prints one line of JSON; the request is the JSON in its argument.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

from nitro_bench._export_meter import peak_rss_bytes
from nitro_bench._export_sides import load, reference_of, sqnr_db
from nitro_rt.errors import BuildError


def measure(request: dict[str, Any]) -> dict[str, Any]:
    """Raises: BuildError if the output is too far from the reference; nothing is then timed."""
    arrays, expected = reference_of(Path(request["reference"]), request["stage"], 0)
    start_s = time.perf_counter()
    run = load(request)
    load_s = time.perf_counter() - start_s
    start_s = time.perf_counter()
    found = run(arrays)
    first_s = time.perf_counter() - start_s
    sqnr = sqnr_db(found, expected)
    if not sqnr >= request["floor_db"]:
        raise BuildError(
            f"the output is {sqnr:.1f} dB from the reference, {request['floor_db']:g} are needed; nothing was timed"
        )
    wall_s, cpu_s = [], []
    for _ in range(request["num_calls"]):
        start_s, start_cpu_s = time.perf_counter(), time.process_time()
        run(arrays)
        wall_s.append(round(time.perf_counter() - start_s, 4))
        cpu_s.append(round(time.process_time() - start_cpu_s, 4))
    return {
        "load_s": round(load_s, 3),
        "first_s": round(first_s, 3),
        "wall_s": wall_s,
        "cpu_s": cpu_s,
        "sqnr_db": round(sqnr, 2),
        "peak_rss_bytes": peak_rss_bytes(),
    }


def main() -> None:
    print(json.dumps(measure(json.loads(sys.argv[1]))))


if __name__ == "__main__":
    main()
