"""What a YAML shows of its run, worked out once for all methods."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

from emguard_plugin.check import model
from emguard_plugin.check.host import has_adapter
from emguard_plugin.regularizers.preview import Findings

if TYPE_CHECKING:
    from emguard_plugin.chats import Template


class YamlFacts:
    """The `Facts` of a YAML; see there.

    Args:
        cfg: The YAML.
        findings: Where previews say what they find.
    """

    def __init__(self, cfg: Mapping[str, Any], findings: Findings) -> None:
        self.cfg, self.findings = cfg, findings
        self.has_adapter = has_adapter(cfg)

    @cached_property
    def _tokenizer(self) -> Any:
        return model.load_tokenizer(self.cfg, self.findings)

    def tokenizer(self) -> Any:
        """Return the run's tokenizer, loaded once."""
        return self._tokenizer

    def template_kwargs(self) -> dict[str, Any]:
        """Return `chat_template_kwargs`.

        Raises:
            ValueError: when it is no mapping.
        """
        kwargs = self.cfg.get("chat_template_kwargs") or {}
        if not isinstance(kwargs, Mapping):
            raise ValueError("`chat_template_kwargs` must be a mapping.")
        return {str(key): value for key, value in kwargs.items()}

    def template(self, tokenizer: Any) -> Template:
        """Return the chat template taken apart.

        Raises:
            ValueError: as `read_template`.
        """
        from emguard_plugin.chats import read_template

        return read_template(tokenizer, **self.template_kwargs())

    def shows_tokens(self, tokenizer: Any) -> bool:
        """Return whether a tokenizer is not the stand-in of single letters."""
        return not model.is_stand_in(tokenizer)

    @cached_property
    def _layers(self) -> model.Layers | None:
        return model.read_layers(self.cfg)

    def number_of_layers(self) -> int | None:
        """Return how many decoder layers the model has, if its configuration is here."""
        return model.count_layers(self.cfg)

    def check_layers(self, key: str, wanted: Literal["all"] | Sequence[int]) -> None:
        """Find layers that the model does not have, or that keep no keys and values."""
        model.check_layers(key, wanted, self._layers, self.findings)

    @cached_property
    def _skeleton(self) -> Any:
        return model.skeleton(self.cfg)

    def skeleton(self) -> Any:
        """Return the model without weights, built once."""
        return self._skeleton
