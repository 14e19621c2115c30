"""The post-train hook: measure a saved model without being able to harm the run."""

from __future__ import annotations

import itertools
import json
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from emguard_plugin.config import EMEvalConfig
from emguard_plugin.config.settings_file import IMPORT_FROM
from emguard_plugin.exit_codes import EXIT_ERROR, EXIT_FAIL, EXIT_INCONCLUSIVE, EXIT_INPUT
from emguard_plugin.files.writing import write_text


@dataclass(frozen=True)
class Measured:
    """How the measurement of a saved model ended.

    Attributes:
        summary: Path of `summary.json`; None if there is none.
        exit_code: 0, or what `emguard eval` ended with.
    """

    summary: Path | None
    exit_code: int


def measure_saved_model(config: EMEvalConfig, model: str | Path, base: str | None = None, import_from: Sequence[str] = ()) -> Measured:
    """Measure the EM rate in a process of its own: no patched classes, and the run's memory is free.

    Nothing is ever raised: a finished training run must not be lost to its measurement. What went wrong, and a gate
    (`em_eval.fail_above`) that was not passed, stands in `FAILED.txt` beside the results and in a last line on stderr.
    So `axolotl train` itself still ends with exit code 0; a pipeline asks for the file, or runs `emguard eval` on the
    same folder, which computes nothing anew. `emguard sft` ends with the exit code that is returned here.

    Args:
        config: The `em_eval:` block.
        model: The output folder that was just saved: an adapter or a full model.
        base: The base model of an adapter, as the run named it.
        import_from: Folders of Python modules, the YAML's own; stored beside the block, so that the command can be run again.

    Returns:
        Where the summary lies, and the exit code.
    """
    out = Path(config.output_dir or Path(model) / "em_eval")
    summary, code = out / "summary.json", EXIT_ERROR
    command = [sys.executable, "-m", "emguard_plugin.cli", "eval", str(model)]
    command += ["--config", str(out / "config.json"), "--output-dir", str(out)]
    command += ["--base", str(base)] if base else []
    try:
        set_aside(out)
        out.mkdir(parents=True, exist_ok=True)
        (out / "FAILED.txt").unlink(missing_ok=True)
        content = {"em_eval": config.model_dump(exclude_unset=True), **({IMPORT_FROM: list(import_from)} if import_from else {})}
        write_text(out / "config.json", json.dumps(content, indent=2))
        code = subprocess.run(command, stderr=None, check=False).returncode
        reason = f"`{shlex.join(command)}` ended with exit code {code}"
    except KeyboardInterrupt:
        print(
            f"em_eval: interrupted. The model in {model} is saved and unharmed, and what was answered and judged is kept. To go on: "
            f"{shlex.join(command)}",
            file=sys.stderr, flush=True,
        )  # fmt: skip
        raise
    except OSError as exc:
        reason = f"{type(exc).__name__}: {exc}"
    if code == 0 and summary.is_file():
        return Measured(summary, 0)
    # A crash of Python also ends with 1: the stored summary tells the two apart.
    why = reason_of(summary, code)
    if why and code in (EXIT_FAIL, EXIT_INCONCLUSIVE):
        message = f"em_eval gate NOT PASSED: {why}. The model in {model} is saved and unharmed."
    elif why:
        message = f"em_eval: {why}. The model in {model} is saved and unharmed. {reason}; run it again to judge what is missing."
    else:
        message = f"em_eval failed: {reason}. The model in {model} is saved and unharmed; run the command again to measure it."
    print(message, file=sys.stderr, flush=True)
    try:
        write_text(out / "FAILED.txt", message + "\n")
    except OSError:
        print(f"(and {out} cannot be written)", file=sys.stderr)
    return Measured(summary if why else None, code if why or code == EXIT_INPUT else EXIT_ERROR)


def reason_of(path: Path, code: int) -> str | None:
    """Return why `emguard eval` ended with a code, in one line with the judges' names; None where `summary.json` does not say so."""
    from emguard_plugin.evaluation.gate import ending
    from emguard_plugin.evaluation.run_folder.summary import Summary

    try:
        found = ending(Summary.load(path))
    except (ValueError, OSError):
        return None
    return "; ".join(line.rstrip(".") for _, line in found.lines) if found.code == code != 0 else None


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
