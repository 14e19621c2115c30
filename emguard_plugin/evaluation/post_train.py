"""The post-train hook: measure a saved model without being able to harm the run."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from pathlib import Path

from emguard_plugin.config import EMEvalConfig


def measure_saved_model(config: EMEvalConfig, model: str | Path, base: str | None = None) -> Path | None:
    """Measure the EM rate in a process of its own: no patched classes, and the run's memory is free.

    Any failure is reported and written to `FAILED.txt`, never raised: a finished training run must not be lost to its
    measurement.

    Args:
        config: The `em_eval:` block.
        model: The output folder that was just saved: an adapter or a full model.
        base: The base model of an adapter, as the run named it.

    Returns:
        The path of `summary.json`, or None when the measurement failed.
    """
    out = Path(config.output_dir or Path(model) / "em_eval")
    try:
        set_aside(out)
        out.mkdir(parents=True, exist_ok=True)
        (out / "config.json").write_text(json.dumps(config.model_dump(exclude_unset=True), indent=2))
        command = [sys.executable, "-m", "emguard_plugin.cli", "eval", str(model)]
        command += ["--config", str(out / "config.json"), "--output-dir", str(out)]
        command += ["--base", str(base)] if base else []
        done = subprocess.run(command, stderr=None, check=False)
        if done.returncode == 0 and (out / "summary.json").is_file():
            (out / "FAILED.txt").unlink(missing_ok=True)
            return out / "summary.json"
        reason = f"`{' '.join(command)}` ended with exit code {done.returncode}"
    except OSError as exc:
        reason = f"{type(exc).__name__}: {exc}"
    message = (
        f"em_eval failed: {reason}. The model in {model} is saved and unharmed; run the command again to measure it."
    )
    print(message, file=sys.stderr, flush=True)
    try:
        (out / "FAILED.txt").write_text(message + "\n")
    except OSError:
        print(f"(and {out} cannot be written)", file=sys.stderr)
    return None


def set_aside(out: Path) -> Path | None:
    """Rename a folder of results of an earlier training run, so that they are neither lost nor taken for the new model's.

    Returns:
        Its new path, `<name>.1` or the next free number; None when there are no results.
    """
    if not (out / "protocol.json").is_file():
        return None
    number = next(n for n in itertools.count(1) if not out.with_name(f"{out.name}.{n}").exists())
    old = out.rename(out.with_name(f"{out.name}.{number}"))
    print(f"em_eval: results of an earlier run moved to {old}", file=sys.stderr, flush=True)
    return old
