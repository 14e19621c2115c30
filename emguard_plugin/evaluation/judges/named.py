"""One judge, as `--judge` of the command line names it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from emguard_plugin.config import JudgeConfig, read_block
from emguard_plugin.config.judges import ExactJudgeConfig
from emguard_plugin.config.settings_file import search_beside
from emguard_plugin.evaluation.judges import build_judge
from emguard_plugin.files import read_yaml

if TYPE_CHECKING:
    from emguard_plugin.evaluation.judges import Judge


def read_judge(source: str) -> Judge:
    """Return the judge that `--judge` names.

    Args:
        source: `package.module:function`, or a YAML or JSON file that holds one entry of `em_eval.judges`, an `em_eval` block
            or a file with one. A block must list a single judge.

    Raises:
        ValueError: If it is none of these, or cannot work.
    """
    if not Path(source).is_file():
        module, mark, function = source.partition(":")
        if not mark or "/" in source or not function.isidentifier() or not module:
            raise ValueError(
                f"`--judge {source}` is neither a file nor `package.module:function`. Give a YAML with one entry of `em_eval.judges`, "
                "such as `provider: openai` and `model: ...`."
            )
        return build_judge(ExactJudgeConfig(function=source))
    search_beside(Path(source).parent)
    entry = _entry(source)
    return build_judge(read_block(JudgeConfig.chosen(entry), entry, f"--judge {source}"))


def _entry(source: str) -> dict[str, Any]:
    try:
        content = read_yaml(source)
    except ValueError as error:
        raise ValueError(f"`--judge {source}` cannot be read: {error}") from None
    if isinstance(content, dict):
        content = content.get("em_eval", content)
    if isinstance(content, dict) and "judges" in content:
        content = content["judges"]
    if isinstance(content, list):
        if len(content) != 1:
            raise ValueError(f"`--judge {source}` lists {len(content)} judges, and one is asked. Give a file with that one.")
        content = content[0]
    if not isinstance(content, dict):
        raise ValueError(f"`--judge {source}` holds no judge. Write `provider:` and what it needs.")
    return content
