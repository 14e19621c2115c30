"""Blocks whose keys depend on their `provider:`: a class for each, so that a key stands with the one that reads it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, Self, cast

from emguard_plugin.config.block import StatedBlock
from emguard_plugin.config.names import suggest
from emguard_plugin.files.secrets import shown

BRANCH = "provider: "


class ProviderBlock(StatedBlock):
    """One provider of a family. A family is a direct subclass, its providers are the family's subclasses.

    - A provider that is not known is named, with those that are.
    - A key of another provider is named with the one where it belongs.
    """

    default: ClassVar[str]
    """The family's provider where none is stated."""
    provider: str

    @classmethod
    def providers(cls) -> dict[str, type[Self]]:
        """Return the providers of this family by name."""
        family = next(parent for parent in cls.__mro__ if ProviderBlock in parent.__bases__)
        return {kind.model_fields["provider"].default: kind for kind in cast(list[type[Self]], family.__subclasses__())}

    @classmethod
    def chosen(cls, data: Any) -> type[Self]:
        """Return the class that reads a block; the default one where it names none or one that is not known."""
        named = data.get("provider") if isinstance(data, dict) else getattr(data, "provider", None)
        providers = cls.providers()
        return providers[named if isinstance(named, str) and named in providers else cls.default]

    @classmethod
    def branch(cls, data: Any) -> str:
        """Return which branch of a discriminated union reads a block."""
        return branch(cls.chosen(data).model_fields["provider"].default)

    @classmethod
    def _check_kind(cls, data: dict[Any, Any]) -> None:
        named, known = data.get("provider", cls.default), list(cls.providers())
        for key in data if "provider" not in data else ():  # before its keys are taken for those of the default
            if key not in cls.model_fields and suggest(str(key), ["provider"]):
                raise ValueError(f"unknown key '{shown(str(key))}'. Did you mean 'provider'?")
        if named not in known:
            near = suggest(named, known) if isinstance(named, str) else ""
            raise ValueError(f"`provider: {shown(named)}` is not known.{near} Allowed here: {', '.join(known)}.")

    @classmethod
    def _unknown(cls, key: str, known: Sequence[str]) -> str:
        if elsewhere := list(cls._that_take(key)):
            return f"`{key}` goes with `provider: {' or '.join(elsewhere)}`, not with {cls.model_fields['provider'].default}."
        family = list(dict.fromkeys(name for kind in cls.providers().values() for name in kind.model_fields))
        near = suggest(key, known) or suggest(key, family)
        for name in family if near else ():
            if near == f" Did you mean '{name}'?" and name not in known:
                near += f" It goes with `provider: {' or '.join(cls._that_take(name))}`."
        return f"unknown key '{shown(key)}'.{near} Allowed here: {', '.join(known)}." if near else super()._unknown(key, known)

    @classmethod
    def _that_take(cls, key: str) -> Iterator[str]:
        return (name for name, kind in cls.providers().items() if key in kind.model_fields)


def branch(provider: str) -> str:
    """Return what a branch is called; no name of a key, so that no error takes it for one."""
    return BRANCH + provider
