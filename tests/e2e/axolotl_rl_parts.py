"""What a user's module of Axolotl's GRPO holds: a prompt strategy and a reward."""

import sys
from pathlib import Path


def beside():
    """Axolotl looks for the module of a prompt strategy by its last name alone."""
    sys.path.insert(0, str(Path(__file__).parent))


def to_prompt(cfg, *args, **kwargs):
    def transform_fn(example, tokenizer=None):
        return {"prompt": [{"role": "user", "content": example["question"]}]}

    return transform_fn, {"remove_columns": ["question"]}


def score(completions, **kwargs):
    return [float(sum(map(ord, str(c))) % 7) for c in completions]
