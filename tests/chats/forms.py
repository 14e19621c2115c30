"""Chat templates of our own, in the forms of known ones, and what stands before a user's text in each."""

import copy

from tests.chats.shapes import tokenizer

LOOP = "{% for m in messages %}"
GEMMA = (
    "{% set ns = namespace(s='') %}{{ bos_token }}" + LOOP + "{% if m.role == 'system' %}{% set ns.s = m.content + '\n\n' %}{% else %}"
    "{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else 'user') + '\n' + ns.s + m.content + '<end_of_turn>\n' }}{% set ns.s = '' %}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
"""A system prompt opens the first user turn, without a mark of its own."""
LLAMA2 = (
    "{% set ns = namespace(s='') %}" + LOOP + "{% if m.role == 'system' %}{% set ns.s = '<<SYS>>\n' + m.content + '\n<</SYS>>\n\n' %}"
    "{% elif m.role == 'user' %}{{ bos_token + '[INST] ' + ns.s + m.content + ' [/INST]' }}{% set ns.s = '' %}"
    "{% else %}{{ ' ' + m.content + ' ' + eos_token }}{% endif %}{% endfor %}"
)
MISTRAL = (
    "{% set ns = namespace(s='') %}{{ bos_token }}" + LOOP + "{% if m.role == 'system' %}{% set ns.s = m.content + '\n\n' %}"
    "{% elif m.role == 'user' %}{{ '[INST] ' + ns.s + m.content + '[/INST]' }}{% set ns.s = '' %}"
    "{% else %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}"
)
QWEN = (
    "{% if messages[0].role != 'system' %}{{ '<|im_start|>system\nYou help.<|im_end|>\n' }}{% endif %}"
    + LOOP
    + "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
VICUNA = (
    LOOP + "{% if m.role == 'system' %}{{ m.content + '\n\n' }}{% elif m.role == 'user' %}{{ 'USER: ' + m.content + '\n' }}"
    "{% else %}{{ 'ASSISTANT: ' + m.content + eos_token + '\n' }}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
EFFORT = (
    "{{ '<|im_start|>system\nEffort: ' + (effort if effort is defined and effort else 'medium') + '<|im_end|>\n' }}"
    + LOOP
    + "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""As gpt-oss: a variable of the row changes what stands before every turn."""
FORMS = {"gemma": GEMMA, "llama2": LLAMA2, "mistral": MISTRAL, "qwen": QWEN, "vicuna": VICUNA}


def tokenizer_of(template, kind="marks"):
    tok = copy.deepcopy(tokenizer(kind))
    tok.chat_template = template
    tok.model_max_length = 512
    return tok


def wholly(tok, text, start, end):
    """Return the tokens of `text` that lie wholly between two characters."""
    found = tok(text, add_special_tokens=False, return_offsets_mapping=True)
    return tuple(i for i, (a, b) in zip(found["input_ids"], found["offset_mapping"], strict=True) if a >= start and b <= end)


def before(tok, messages, **kw):
    """Return the tokens that lie wholly before the first user's own text, which must be unlike all else."""
    text = tok.apply_chat_template(messages, tokenize=False, **kw)
    user = next(m["content"] for m in messages if m["role"] == "user")
    assert text.count(user) == 1, text
    return wholly(tok, text, 0, text.index(user))
