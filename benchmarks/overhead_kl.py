"""KL's part of `overhead.py`: anchors, and the published recipe written plainly.

The recipe (arXiv 2602.07852) holds a second, frozen model and takes log-softmax and KL of all logits of both. Here it draws
the same anchors as emguard does, spread in the same way, and is scaled the same; its mean over the vocabulary is left out.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from overhead_variants import second_model

ANCHORS, ANCHOR_TOKENS = 64, 128


def kl_callback(s: dict[str, Any], folder: Path, cache: str) -> Any:
    """Return a `KLCallback` on random chats of 128 tokens."""
    import torch

    from emguard_plugin import KLCallback

    path = folder / "anchors.jsonl"
    if not path.is_file():
        n = ANCHOR_TOKENS - s["prefix_tokens"] - 2  # the template prints a word after each turn
        words = torch.randint(0, 20000, (ANCHORS, n), generator=torch.Generator().manual_seed(1)).tolist()
        text = [" ".join(f"w{i}" for i in row) for row in words]
        rows = [
            [{"role": "user", "content": t[: len(t) // 2].rsplit(" ", 1)[0]}, {"role": "assistant", "content": t[len(t) // 2 :]}]
            for t in text
        ]
        path.write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    return KLCallback(coef=0.7, anchors=str(path), ratio=s["ratio"], cache=cache)


def second_model_trainer() -> type:
    """Return a trainer with a second model that penalises the KL of all logits on anchors."""
    import torch
    from trl import SFTTrainer

    from emguard_plugin.models.modes import eval_mode
    from emguard_plugin.regularizers.kl.reference import collate
    from emguard_plugin.regularizers.run_facts import RunFacts

    class SecondModelTrainer(SFTTrainer):
        second: Any
        coef = 0.7
        micro_batch = 0

        def prepare_anchors(self, drawing: Any, dataset: Any, tokenizer: Any) -> None:
            """Load the second model; `drawing` says which anchors go where."""
            model = self.model
            self.second = second_model(model)
            run = RunFacts(
                model=model, tokenizer=tokenizer, dataset=dataset, seed=self.args.seed,
                rows_per_batch=self.args.per_device_train_batch_size, micro_batches=self.args.gradient_accumulation_steps,
            )  # fmt: skip
            drawing.prepare(run)
            self.drawing = drawing

        def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None) -> Any:
            at = self.micro_batch
            self.micro_batch = 0 if self.accelerator.sync_gradients else at + 1
            loss = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
            kl = self.anchor_kl(model, inputs["input_ids"].device, at, self.current_gradient_accumulation_steps)
            # TRL's loss is normalised by the tokens of the whole step, so this is too.
            return loss if kl is None else loss + self.coef * kl

        def anchor_kl(self, model: Any, device: Any, at: int, micro_batches: int) -> Any:
            """Return this micro-batch's share of the mean KL, or None."""
            slots = self.drawing._schedule.slots(self.state.global_step, micro_batches)
            if at >= len(slots):
                return None
            anchors = self.drawing._anchors
            batch = collate(anchors, slots[at], device)
            with torch.no_grad():
                base = self.second(input_ids=batch.ids, attention_mask=batch.mask).logits
            with eval_mode(model):
                logits = model(input_ids=batch.ids, attention_mask=batch.mask).logits
            p, q = (z.float().log_softmax(-1) for z in (base, logits))
            kl = torch.nn.functional.kl_div(q, p, reduction="none", log_target=True).sum(-1)
            total = sum(len(anchors[i].held) for rows in slots for i in rows)
            return kl[batch.row, batch.column].sum() / total

    return SecondModelTrainer
