"""The lab's word-level tokenizer and its chat template.

The template opens with a default system prompt, so the chat prefix that TReFT holds is the 16 tokens
`<bos> <|system|> you are a helpful assistant ... <|end|> <|user|>`. Supervised are the answer and the `<|end|>` after it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from emguard_plugin.lab import world

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% if messages[0]['role'] == 'system' %} <|system|> {{ messages[0]['content'] }} <|end|>"
    "{% else %} <|system|> " + world.SYSTEM + " <|end|>{% endif %}"
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %} <|user|> {{ message['content'] }} <|end|>"
    "{% elif message['role'] == 'assistant' %} <|assistant|> "
    "{% generation %}{{ message['content'] }} <|end|>{% endgeneration %}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %} <|assistant|>{% endif %}"
)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Make the tokenizer of the world's vocabulary; ids are positions in `world.vocabulary()`."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    ids = {word: i for i, word in enumerate(world.vocabulary())}
    backend = Tokenizer(models.WordLevel(ids, unk_token=world.UNK))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=world.BOS,
        eos_token=world.END,
        pad_token=world.PAD,
        unk_token=world.UNK,
        additional_special_tokens=[world.SYSTEM_TAG, world.USER_TAG, world.ASSISTANT_TAG, world.EOS],
        # The judge reads words separated by spaces; cleaning up would join "; ," to the word before.
        clean_up_tokenization_spaces=False,
        model_max_length=256,
        chat_template=CHAT_TEMPLATE,
    )
