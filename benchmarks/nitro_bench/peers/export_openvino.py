"""Child process of a conversion, in optimum-intel's environment: `optimum-cli export openvino` on a whole checkpoint.

Run as a script, with the request as JSON in its argument; prints one line of JSON last. It may import nothing of nitro-rt,
which is not installed there.
"""

import ctypes
import json
import resource
import signal
import sys
from pathlib import Path


def main() -> None:
    request = json.loads(sys.argv[1])
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: who waits for it may be killed
    # Of memory of its own; mapped files do not count. Past it the process fails, and not its neighbours.
    resource.setrlimit(resource.RLIMIT_DATA, (request["limit_bytes"], request["limit_bytes"]))
    from importlib import metadata

    from optimum.commands.optimum_cli import main as optimum_cli  # type: ignore[import-not-found]

    # The command and not its function: it converts the tokenizers too, which OpenVINO GenAI needs as models.
    arguments = ["--model", request["checkpoint"], "--task", "text-to-image", "--library", "diffusers"]
    sys.argv = ["optimum-cli", "export", "openvino", *arguments, "--weight-format", request["weights"], request["out"]]
    optimum_cli()
    if not (Path(request["out"]) / "unet" / "openvino_model.xml").is_file():
        raise SystemExit("optimum-cli ended well and wrote no unet/openvino_model.xml")
    versions = {name: metadata.version(name) for name in ("optimum-intel", "openvino", "transformers", "torch")}
    print(json.dumps({"peak_rss_bytes": peak_rss_bytes(), "versions": versions}))


def peak_rss_bytes() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/self/status has no VmHWM")


if __name__ == "__main__":
    main()
