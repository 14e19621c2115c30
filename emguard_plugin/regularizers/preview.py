"""What can be said of a method before a run: asked by `emguard check` and by the hosts, which know no method by name.

Importing this needs no torch; a preview imports what it needs where the settings make it necessary.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

from emguard_plugin.config import METHODS, EMRegularizerConfig, MethodBlock
from emguard_plugin.regularizers import load

if TYPE_CHECKING:
    from emguard_plugin.chats import Template

NOT_MEASURED = " (measures only, the run is unchanged)"


@dataclass
class Findings:
    """What `emguard check` prints.

    Attributes:
        active: What will be held or measured.
        notes: What could not be checked here.
        problems: What must change before the run does what it says.
    """

    active: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def note(self, line: str) -> None:
        """Add a note, once."""
        if line not in self.notes:
            self.notes.append(line)


class Facts(Protocol):
    """What the YAML shows of the run without loading weights. What it cannot show becomes a finding.

    Attributes:
        cfg: The YAML.
        findings: Where a preview says what it finds.
        has_adapter: Whether an adapter is trained.
    """

    cfg: Mapping[str, Any]
    findings: Findings
    has_adapter: bool

    def tokenizer(self) -> Any:
        """Return the run's tokenizer with its template, or None."""

    def template_kwargs(self) -> dict[str, Any]:
        """Return the variables that the YAML hands the chat template."""

    def template(self, tokenizer: Any) -> Template:
        """Return its chat template taken apart."""

    def shows_tokens(self, tokenizer: Any) -> bool:
        """Return whether a tokenizer is the run's own, so that its tokens mean something."""

    def number_of_layers(self) -> int | None:
        """Return how many decoder layers the model has; None where its configuration is not here."""

    def check_layers(self, key: str, wanted: Literal["all"] | Sequence[int]) -> None:
        """Find layers that the model does not have, or that keep no keys and values."""

    def skeleton(self) -> Any:
        """Return the model without weights; None where its configuration is not here."""


class Preview:
    """Answers for one method before a run. A method overrides what concerns it."""

    def preview(self, block: Any, facts: Facts) -> None:
        """Find what the method would hold, and what it lacks."""

    def conflicts(self, block: Mapping[str, Any], cfg: Mapping[str, Any]) -> list[str]:
        """Return what in a raw YAML cannot work with the method, each with the change to make.

        Args:
            block: The method's own block, not validated yet.
            cfg: The whole YAML.
        """
        return []

    def check_inputs(self, block: Any) -> None:
        """Read the files that the method names, by the code that will use them.

        Raises:
            ValueError: naming the key and the path.
        """

    def needs_chats(self, block: Any) -> str | None:
        """Return the method in the words of the YAML where it finds tokens by the chat template's turns, else None."""
        return None

    def reads_rows(self, block: Any) -> bool:
        """Return whether it reads tokenised training rows before the first step."""
        return False


def preview_of(name: str) -> Preview:
    """Return what answers for a method of the table."""
    found: Preview = load(METHODS[name].preview)()
    return found


def asked(config: EMRegularizerConfig) -> Iterator[tuple[Preview, MethodBlock]]:
    """Yield what answers for each method that a block asks for, with the method's block."""
    for name, block in config.methods().items():
        yield preview_of(name), block


def check_inputs(config: EMRegularizerConfig) -> None:
    """Raise when a file of a method is missing or is not what the method needs, before a model is loaded.

    Raises:
        ValueError: naming the key and the path.
    """
    for preview, block in asked(config):
        preview.check_inputs(block)
