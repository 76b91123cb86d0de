"""Child process of `export` in optimum's own environment: its exporter on a whole checkpoint.

Run as a script, with the request as JSON in its argument; prints one line of JSON. It may import nothing of nitro-rt, which is
not installed there.
"""

import ctypes
import json
import resource
import signal
import sys
import time
from pathlib import Path


def main() -> None:
    request = json.loads(sys.argv[1])
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: who waits for it may be killed
    if request["limit_bytes"]:
        # Of memory of its own; mapped files do not count. Past it the process fails, and not its neighbours.
        resource.setrlimit(resource.RLIMIT_DATA, (request["limit_bytes"], request["limit_bytes"]))
    started_s, started_at = time.perf_counter(), time.time()
    from importlib import metadata

    from optimum.exporters.onnx import main_export  # type: ignore[import-not-found]

    import_s = time.perf_counter() - started_s
    out = Path(request["out"])
    main_export(
        request["checkpoint"],
        out,
        task="text-to-image",
        library_name="diffusers",
        dtype=request["dtype"],
        device="cpu",
        do_validation=False,  # it would draw with both; only the export is measured
    )
    seconds = time.perf_counter() - started_s
    files = [path for path in out.rglob("*") if path.is_file()]
    # Parts are exported one after the other, so each one's graph says when it was done.
    done_at = {path.parent.name: path.stat().st_mtime - started_at for path in files if path.name == "model.onnx"}
    print(
        json.dumps(
            {
                "seconds": round(seconds, 3),
                "import_seconds": round(import_s, 3),
                "cpu_seconds": round(time.process_time(), 3),
                "peak_rss_bytes": peak_rss_bytes(),
                "part_done_after_s": {name: round(at, 1) for name, at in sorted(done_at.items(), key=lambda item: item[1])},
                "num_bytes": sum(path.stat().st_size for path in files),
                "versions": {name: metadata.version(name) for name in ("optimum", "optimum-onnx", "transformers", "torch")},
            }
        )
    )


def peak_rss_bytes() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/self/status has no VmHWM")


if __name__ == "__main__":
    main()
