"""The YAML keys that Axolotl's config model gains. Pydantic only: read before Axolotl's own checks."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

from emguard_plugin.axolotl_plugin.conflicts import find_conflicts
from emguard_plugin.config import EMEvalConfig, EMRegularizerConfig
from emguard_plugin.files.secrets import redact


class EMGuardArgs(BaseModel):
    """Mixed into Axolotl's config model, so names are prefixed."""

    # pydantic prints the beginning and the end of the whole configuration beside an error: keys stand there, too.
    model_config = ConfigDict(hide_input_in_errors=True)

    em_regularizer: EMRegularizerConfig | None = Field(
        default=None,
        json_schema_extra={"description": "Hold what a narrow fine-tune should not change. See emguard."},
    )
    em_eval: EMEvalConfig | None = Field(
        default=None, json_schema_extra={"description": "Measure the EM rate after the model is saved. See emguard."}
    )

    @model_validator(mode="before")
    @classmethod
    def emguard_refuse_conflicts(cls, data: Any) -> Any:
        """Refuse settings that cannot work, when a model is about to be trained."""
        if isinstance(data, dict) and not data.get("merge_lora") and not data.get("is_preprocess"):
            conflicts = find_conflicts(data)
            if conflicts:
                raise ValueError(redact("em_regularizer: " + " | ".join(conflicts)))  # they repeat settings of the host's
        return data
