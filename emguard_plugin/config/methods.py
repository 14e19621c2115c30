"""The methods of `em_regularizer:`: the one table, and the block that is made of it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pydantic import Field, SerializerFunctionWrapHandler, create_model, model_serializer, model_validator

from emguard_plugin.config.block import Block
from emguard_plugin.config.regularizers import BlockEMConfig, KLConfig, MethodBlock, TReFTConfig


@dataclass(frozen=True)
class Method:
    """One method, as everything but the method itself knows it.

    Attributes:
        name: Its key under `em_regularizer:`.
        config: Its block.
        says: What it holds, in a few words.
        callback: `module:class` of the callback, below `emguard_plugin.regularizers`.
        preview: `module:class` of what answers for it before a run, below `emguard_plugin.regularizers`; needs no torch.
    """

    name: str
    config: type[MethodBlock]
    says: str
    callback: str
    preview: str


METHODS = {
    method.name: method
    for method in (
        Method(
            "treft",
            TReFTConfig,
            "keys and values of the chat-template tokens",
            "treft.callback:TReFTCallback",
            "treft.preview:TReFTPreview",
        ),
        Method(
            "block_em",
            BlockEMConfig,
            "SAE latents that carry misalignment",
            "block_em.callback:BlockEMCallback",
            "block_em.preview:BlockEMPreview",
        ),
        Method("kl", KLConfig, "next-token distributions on other-domain chats", "kl.callback:KLCallback", "kl.preview:KLPreview"),
    )
}


class _Methods(Block):
    """`em_regularizer:`, any combination of methods."""

    @model_validator(mode="before")
    @classmethod
    def _no_empty_method(cls, data: Any) -> Any:
        for name in cls.model_fields if isinstance(data, dict) else ():
            if name in data and data[name] is None:
                raise ValueError(f"`{name}:` is empty; write `{name}: {{}}` for the defaults, or remove it.")
        return data

    @model_serializer(mode="wrap")
    def _only_methods(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        # Hosts dump and validate again: a method that nobody named must not come back as an empty one.
        return {name: block for name, block in handler(self).items() if block is not None}

    @model_validator(mode="after")
    def _not_empty(self) -> _Methods:
        if not self.methods():
            raise ValueError("the block names no method, so the run would be unguarded. Add `treft:`, or remove `em_regularizer:`.")
        taken: dict[str, str] = {}
        for name, block in self.methods().items():
            for key, folder in block.folders().items():
                place = os.path.abspath(os.path.expanduser(folder))
                if place in taken:
                    raise ValueError(f"`{taken[place]}` and `{name}.{key}` are one folder, {folder}. Give each method its own.")
                taken[place] = f"{name}.{key}"
        return self

    def check_files(self) -> None:
        """Raise before a run starts when a file that a method needs is missing.

        Not a validator: `axolotl merge-lora` and `preprocess` validate the same YAML without needing the files.

        Raises:
            ValueError: naming the key and the path.
        """
        for block in self.methods().values():
            block.check_files()

    def methods(self) -> dict[str, MethodBlock]:
        """Return the methods that the block asks for, by name, in the order of the table."""
        return {name: getattr(self, name) for name in type(self).model_fields if getattr(self, name) is not None}


if TYPE_CHECKING:  # a type checker cannot read a table

    class EMRegularizerConfig(_Methods):
        """`em_regularizer:`, any combination of methods."""

else:
    EMRegularizerConfig = create_model(
        "EMRegularizerConfig",
        __base__=_Methods,
        __doc__=_Methods.__doc__,
        __module__=__name__,
        **{m.name: (m.config | None, Field(None, description=f"Holds {m.says}.")) for m in METHODS.values()},
    )
