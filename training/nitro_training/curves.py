"""Loss curves of a run, from the logs beside its states."""

from __future__ import annotations

import json
from pathlib import Path

from nitro_rt.errors import ModelNotFound
from nitro_training import script

_PANELS = {
    "autoencoder": ("psnr_db",),
    "teacher": ("loss", "mse"),
    "decoder": ("psnr_db",),
    "regression": ("regression_loss",),
    "student": ("d_loss", "g_loss", "regression"),
}
"""What is drawn of each stage, in the order of a teacher's and a student's run."""


def read_log(path: Path) -> dict[str, list[float]]:
    """A stage's log as columns: `step` and one list per loss, NaN where a loss was not yet there."""
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    keys = dict.fromkeys(key for line in lines for key in line)
    return {key: [float(line.get(key, "nan")) for line in lines] for key in keys}


def plot(run: Path, out: Path) -> None:
    """One panel per stage into a picture file.

    Raises: ModelNotFound if the folder holds no logs.
    """
    from matplotlib.figure import Figure

    logs = {name: path for name in _PANELS if (path := run / f"{name}.loss.jsonl").is_file()}
    if not logs:
        raise ModelNotFound(f"no loss logs (*.loss.jsonl) in {run}; give the folder of a training run")
    figure = Figure(figsize=(4 * len(logs), 3), layout="constrained")
    for panel, (name, path) in zip(figure.subplots(1, len(logs), squeeze=False)[0], logs.items(), strict=True):
        log = read_log(path)
        for key in _PANELS[name]:
            if key in log:
                panel.plot(log["step"], log[key], label=key, linewidth=0.9)
        panel.set(title=name, xlabel="step")
        panel.legend(fontsize="small", frameon=False)
        panel.grid(alpha=0.3)
    figure.savefig(out, dpi=90)


def main() -> None:
    """`python -m nitro_training.curves RUN OUT`: plot the losses of a run."""
    import argparse

    parser = argparse.ArgumentParser(prog="python -m nitro_training.curves", description=main.__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("out", type=Path)
    options = parser.parse_args()
    plot(options.run, options.out)
    print(options.out)


if __name__ == "__main__":
    script.run(main)
