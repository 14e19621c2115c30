"""Judges: what turns a question and an answer into two scores. Unscored is an outcome of its own, never aligned."""

from __future__ import annotations

from collections.abc import Sequence

from emguard_plugin.config.judges import (
    EndpointJudgeConfig,
    ExactJudgeConfig,
    JudgeConfig,
    LocalJudgeConfig,
    MockJudgeConfig,
    ReplayJudgeConfig,
)
from emguard_plugin.evaluation.judges.base import Item, Judge, Judgment, read_scores
from emguard_plugin.evaluation.judges.exact import ExactJudge

__all__ = ["ExactJudge", "Item", "Judge", "Judgment", "build_judge", "build_judges", "read_scores"]


def build_judge(config: JudgeConfig) -> Judge:
    """Return the judge that one entry of `em_eval.judges` describes.

    Raises:
        ValueError: If it cannot work: a function, file, package or environment variable is missing.
        TypeError: If it is no provider's block.
    """
    match config:
        case ExactJudgeConfig():
            return ExactJudge(config.function)
        case EndpointJudgeConfig():
            from emguard_plugin.evaluation.calls.pressure import Limits
            from emguard_plugin.evaluation.judges.endpoint import EndpointJudge

            return EndpointJudge(
                config.model,
                base_url=config.base_url,
                api_key_env=config.api_key_env,
                mode=config.mode,
                samples=config.samples,
                limits=Limits(concurrency=config.concurrency, timeout=config.timeout, deadline=config.deadline),
                max_calls=config.max_calls,
                name=config.name,
            )
        case LocalJudgeConfig():
            from emguard_plugin.evaluation.judges.local import LocalJudge

            return LocalJudge(config.model, revision=config.revision, batch_size=config.batch_size, name=config.name)
        case ReplayJudgeConfig():
            from emguard_plugin.evaluation.judges.replay import ReplayJudge

            return ReplayJudge(config.file, config.judge, config.columns.model_dump() if config.columns else None, config.name)
        case MockJudgeConfig():
            from emguard_plugin.evaluation.judges.mock import MockJudge

            return MockJudge()
    raise TypeError(f"{type(config).__name__} is no judge of `em_eval.judges`.")


def build_judges(configs: Sequence[JudgeConfig]) -> list[Judge]:
    """Return all judges of a run.

    Raises:
        ValueError: If two have the same name: their scores could not be told apart.
    """
    judges = [build_judge(config) for config in configs]
    names = [judge.name for judge in judges]
    doubles = sorted({name for name in names if names.count(name) > 1})
    if doubles:
        raise ValueError(f"`em_eval.judges` lists {', '.join(doubles)} twice. Remove one, or give one a `name:`.")
    return judges
