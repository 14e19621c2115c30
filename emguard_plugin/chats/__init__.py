"""Token spans of a chat template: prefix (before the first user content), postfix (between query and answer).

Rows of a data set, the spans of a batch and chat files lie beside them.
"""

from emguard_plugin.chats.book import Book, Chat, Known, known_row, read_book
from emguard_plugin.chats.ids_only import headers_of_row, prefix_of_row
from emguard_plugin.chats.prefixes import (
    MAX_PREFIXES,
    MIN_SHARE_FOUND,
    Prefix,
    headers_of,
    postfix_span,
    prefix_of,
    prefix_span,
    prompts_with_postfix,
    short_of_answers,
    shown,
    training_prefixes,
    warn_unmarked,
    with_extra,
)
from emguard_plugin.chats.rendering import Rendered, locate, render
from emguard_plugin.chats.template import Template, read_template, require_prefix, system_prefix
from emguard_plugin.chats.tokens import Encoded, Ids, decode, encode, inside, tokenize, touching

__all__ = [
    "MAX_PREFIXES",
    "MIN_SHARE_FOUND",
    "Book",
    "Chat",
    "Encoded",
    "Ids",
    "Known",
    "Prefix",
    "Rendered",
    "Template",
    "decode",
    "encode",
    "headers_of",
    "headers_of_row",
    "inside",
    "known_row",
    "locate",
    "postfix_span",
    "prefix_of",
    "prefix_of_row",
    "prefix_span",
    "prompts_with_postfix",
    "read_book",
    "read_template",
    "render",
    "require_prefix",
    "short_of_answers",
    "shown",
    "system_prefix",
    "tokenize",
    "touching",
    "training_prefixes",
    "warn_unmarked",
    "with_extra",
]
