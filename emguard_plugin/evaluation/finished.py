"""Whether a run's answers are all there, found out from files alone: then neither model nor tokenizer is loaded."""

from __future__ import annotations

import hashlib
from pathlib import Path

from emguard_plugin.config import EMEvalConfig
from emguard_plugin.evaluation.asking import asking
from emguard_plugin.evaluation.asking.as_trained import saved_template
from emguard_plugin.evaluation.asking.questions import load_questions
from emguard_plugin.evaluation.asking.sources import ModelSource, holds_weights
from emguard_plugin.evaluation.plan import SAMPLERS, identity_of, requests, source_of
from emguard_plugin.evaluation.run_folder.records import read_answers
from emguard_plugin.evaluation.run_folder.stored_run import stored_run
from emguard_plugin.files import result_folder as store


def all_answered(config: EMEvalConfig, model: str | Path, output_dir: str | Path, base: str | Path | None = None) -> bool:
    """Return whether a folder holds every answer that a block asks for, of these very models, asked by this very template.

    Anything that files alone do not tell, and anything wrong, is left to the planning with the model at hand.

    Args:
        config: As in `run_em_eval`.
        model: As in `run_em_eval`.
        output_dir: As in `run_em_eval`.
        base: As in `run_em_eval`.
    """
    folder = Path(output_dir)
    if not (folder / store.PROTOCOL).is_file():
        return False
    try:
        source, stored = source_of(config, model, base), stored_run(folder)
        if not isinstance(source, ModelSource) or not holds_weights(source.path) or (source.base and not holds_weights(source.base)):
            return False
        if stored["protocol"]["decoding"].get("sampler") != SAMPLERS[config.sampler.provider]:
            return False
        roles = ("base", "tuned") if config.evaluate_base else ("tuned",)
        if roles[0] == "base" and source.base is None:
            return False
        if not _same_template(config, source, stored["protocol"].get("chat_template_sha256")):
            return False
        suites = {name: load_questions(given) for name, given in config.suites().items()}
        asked = {request.key for request in requests(config, suites, asking.stored(stored["protocol"]).not_asked)}
        answers, left_out = read_answers(folder, stored.get("run"))
        if left_out or not all((role, key) in answers for role in roles for key in asked):
            return False
        return {role: identity_of(source, role) for role in roles} == stored["models"]
    except (ValueError, OSError):
        return False


def _same_template(config: EMEvalConfig, source: ModelSource, known: str | None) -> bool:
    own = (source.path / "tokenizer_config.json").is_file()
    place = source.path if own or not source.base else source.base
    template = asking.read_template(config.chat_template) or saved_template(place)
    return template is not None and hashlib.sha256(template.encode()).hexdigest() == known
