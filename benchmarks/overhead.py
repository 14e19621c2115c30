"""What a guard costs: step time and peak memory of guarded SFT over plain SFT, through the real TRL trainers.

    python benchmarks/overhead.py                                # random 8-layer, 512-wide Llama, 8 x 512 tokens, LoRA
    python benchmarks/overhead.py --full                         # full fine-tuning
    python benchmarks/overhead.py --device cuda --llama-8b       # the shape of Llama-3.1-8B in bf16
    python benchmarks/overhead.py --method kl                    # KL on anchors, 1/8 anchor token per training token
    python benchmarks/overhead.py --method block_em              # BLOCK-EM, 20 latents at 60 % depth

With `MALLOC_ARENA_MAX=1` in the environment glibc gives memory back between variants; without it `--method kl` needs 20 GB.

All variants train in one process, each in its own thread of which one runs at a time: they take turns step by step, in
an order that rotates, so that other users of the machine slow them alike. A step is all that the training loop does:
batch, forward, backward, clipping, optimizer, logging. Reported is the median over rounds of the ratio to plain SFT in
the same round, by the clock and, on the CPU, by processor time, which other users of the machine disturb less; "plain
SFT again" shows the noise. Where that exceeds the cost, "alone" says more: 1 + the time of TReFT's forward and backward
pass by itself, measured after the round's steps, over the round's plain step. Peak memory is counted per allocation
(CPU: the profiler's record on top of weights, optimizer state and reference; CUDA: `max_memory_allocated`), one variant
at a time.

"In-batch hidden states" does what TReFT's released code does (arXiv 2606.06667): it asks every forward pass for all
hidden states and puts k_proj and v_proj on the columns of the prefix. Written from its description. "Second model, all
logits" is the published recipe of KL (arXiv 2602.07852) on the very anchors that the others draw: see `overhead_kl.py`.
"Second model, whole encoder" is that of BLOCK-EM (arXiv 2602.00767): see `overhead_block_em.py`. With it there is a warm-up of
an epoch, so that the recorded variant has recorded; "extra over weights" is its peak minus plain SFT's, over the model's weights.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import platform
import statistics
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_DISABLED", "true")
RESULTS = Path(__file__).parent / "results" / "overhead.json"
PLAIN, TREFT, AGAIN = "plain SFT", "TReFT (prefix)", "plain SFT again"
IN_BATCH = "in-batch hidden states (released code's way)"
KL_LIVE, KL_CACHED, KL_EAGER = "KL, adapter off", "KL, recorded reference", "KL, second model, all logits"
BLOCK_LIVE, BLOCK_CACHED = "BLOCK-EM, adapter off", "BLOCK-EM, recorded base"
BLOCK_EAGER = "BLOCK-EM, second model, whole encoder"
VARIANTS = {
    "treft": (PLAIN, TREFT, IN_BATCH, AGAIN),
    "kl": (PLAIN, KL_LIVE, KL_CACHED, KL_EAGER, AGAIN),
    "block_em": (PLAIN, BLOCK_LIVE, BLOCK_CACHED, BLOCK_EAGER, AGAIN),
}
# Guarded variant -> most step time and peak memory that its issue allows, over plain SFT.
TARGETS = {
    TREFT: {"time": 1.03, "memory": 1.02},
    KL_LIVE: {"time": 1.20, "memory": 1.10},
    KL_CACHED: {"time": 1.15, "memory": 1.10},
    BLOCK_LIVE: {"time": 1.35, "extra": 0.02},
    BLOCK_CACHED: {"time": 1.05, "extra": 0.02},
}
BY_ITSELF = (TREFT, KL_LIVE, KL_CACHED, KL_EAGER)  # BLOCK-EM reads the training forward: there is nothing to time alone
SHAPES = {
    "8x512": {
        "vocab_size": 32000,
        "hidden_size": 512,
        "intermediate_size": 1408,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
    },
    "llama-8b": {
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
}


class Turns:
    """Lets threads take turns, one step each; a thread that leaves is skipped."""

    def __init__(self, names: list[str]) -> None:
        self._condition = threading.Condition()
        self._waiting: set[str] = set()
        self._alive = set(names)
        self._now: str | None = None
        self.error: BaseException | None = None

    def wait(self, name: str) -> None:
        """Give up the turn and sleep until the next one."""
        with self._condition:
            if self._now == name:
                self._now = None
            self._waiting.add(name)
            self._condition.notify_all()
            self._condition.wait_for(lambda: self._now == name)
            self._waiting.discard(name)

    def leave(self, name: str, error: BaseException | None = None) -> None:
        """Never take a turn again."""
        with self._condition:
            self._alive.discard(name)
            self.error = self.error or error
            self._now = None if self._now == name else self._now
            self._condition.notify_all()

    def give(self, name: str) -> None:
        """Let `name` run until it waits or leaves."""
        with self._condition:
            self._condition.wait_for(lambda: name in self._waiting or name not in self._alive)
            if name not in self._alive:
                return
            self._now = name
            self._condition.notify_all()
            self._condition.wait_for(lambda: self._now is None)
        if self.error is not None:
            raise self.error


def tokenizer_with_prefix(n: int, vocab: int) -> Any:
    """Return a word-level tokenizer whose chat template prints `n` tokens before the user's content."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {w: i for i, w in enumerate(["<unk>", "<eos>", "<pad>", *(f"w{i}" for i in range(vocab - 3))])}
    tok = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tok.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tok, unk_token="<unk>", eos_token="<eos>", pad_token="<pad>")
    head = " ".join(f"w{7 * i}" for i in range(n))
    fast.chat_template = f"{head} {{% for m in messages %}}{{{{ m['content'] + ' w1 ' }}}}{{% endfor %}}"
    return fast


def training_set(tokenizer: Any, rows: int, length: int) -> Any:
    """Return tokenised rows of `length` random ids behind the prefix."""
    import torch
    from datasets import Dataset

    from emguard_plugin.chats import read_template

    prefix = list(read_template(tokenizer).prefix)
    g = torch.Generator().manual_seed(0)
    tails = torch.randint(3, len(tokenizer), (rows, length - len(prefix)), generator=g).tolist()
    labels = [[-100] * len(prefix) + tail for tail in tails]
    return Dataset.from_dict({"input_ids": [prefix + tail for tail in tails], "labels": labels})


def in_batch_trainer() -> type:
    """Return a trainer that penalises projections of the training batch's hidden states."""
    import torch
    from trl import SFTTrainer

    from emguard_plugin.models.kv import base_causal_lm, decoder_layers
    from emguard_plugin.models.modes import eval_mode

    class InBatchTrainer(SFTTrainer):
        prefix: list[int]
        coef = 5.0
        reference: list[tuple[torch.Tensor, torch.Tensor]] | None = None

        def project(self, model: Any, hidden: Any, n: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
            attn = [block.self_attn for block in decoder_layers(model)]
            return [(a.k_proj(h[:, :n]), a.v_proj(h[:, :n])) for a, h in zip(attn, hidden, strict=False)]

        def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None) -> Any:
            n = len(self.prefix)
            if self.reference is None:
                ids = torch.tensor([self.prefix], device=inputs["input_ids"].device)
                with torch.no_grad(), eval_mode(model):
                    hidden = base_causal_lm(model)(input_ids=ids, output_hidden_states=True).hidden_states
                    self.reference = [(k.float(), v.float()) for k, v in self.project(model, hidden, n)]
            inputs["output_hidden_states"] = True
            loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
            penalty = torch.zeros((), device=loss.device)
            for now, ref in zip(self.project(model, outputs.hidden_states, n), self.reference, strict=True):
                for x, r in zip(now, ref, strict=True):
                    drift = (x.float() - r).square().sum(-1) / r.square().sum(-1).clamp_min(1e-12)
                    penalty = penalty + drift.mean() / len(self.reference)
            loss = loss + self.coef * penalty
            return (loss, outputs) if return_outputs else loss

    return InBatchTrainer


def build(variant: str, s: dict[str, Any], folder: Path, callback: Any) -> Any:
    """Build a variant's trainer on the same random weights."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM
    from trl import SFTConfig, SFTTrainer

    from emguard_plugin import EMGuardSFTTrainer, TReFTCallback
    from emguard_plugin.chats import read_template

    shape = SHAPES[s["shape"]]
    tokenizer = tokenizer_with_prefix(s["prefix_tokens"], shape["vocab_size"])
    data = training_set(tokenizer, s["batch"] * 4, s["length"])
    torch.manual_seed(0)
    dtype = torch.bfloat16 if s["device"] == "cuda" else torch.float32
    with torch.device(s["device"]):
        model = LlamaForCausalLM._from_config(LlamaConfig(**shape, max_position_embeddings=4096), dtype=dtype)
    peft_config = None
    if not s["full"]:
        from peft import LoraConfig

        peft_config = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    args = SFTConfig(
        output_dir=str(folder / variant.replace(" ", "_").replace("'", "")),
        max_steps=s["warmup"] + s["rounds"],
        per_device_train_batch_size=s["batch"],
        gradient_accumulation_steps=s["accumulation"],
        gradient_checkpointing=s["gradient_checkpointing"],
        gradient_checkpointing_kwargs={"use_reentrant": False},
        max_length=s["length"],
        learning_rate=1e-4,
        bf16=s["device"] == "cuda",
        use_cpu=s["device"] == "cpu",
        logging_steps=5,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    import overhead_block_em
    from overhead_kl import kl_callback, second_model_trainer

    eager = {IN_BATCH: in_batch_trainer, KL_EAGER: second_model_trainer, BLOCK_EAGER: overhead_block_em.second_model_trainer}
    cls = eager[variant]() if variant in eager else SFTTrainer
    guards = {
        TREFT: lambda: TReFTCallback(coef=5.0),
        KL_LIVE: lambda: kl_callback(s, folder, "live"),
        KL_CACHED: lambda: kl_callback(s, folder, "memory"),
        BLOCK_LIVE: lambda: overhead_block_em.block_em_callback(s, model.config, "live"),
        BLOCK_CACHED: lambda: overhead_block_em.block_em_callback(s, model.config, "memory"),
    }
    if variant in guards:
        cls, callback = EMGuardSFTTrainer, [callback, guards[variant]()]
    trainer = cls(
        model=model,
        args=args,
        train_dataset=data,
        processing_class=tokenizer,
        peft_config=peft_config,
        callbacks=callback if isinstance(callback, list) else [callback],
    )
    from transformers import PrinterCallback

    trainer.remove_callback(PrinterCallback)
    if variant == IN_BATCH:
        trainer.prefix = list(read_template(tokenizer).prefix)
    if variant == KL_EAGER:
        trainer.prepare_anchors(kl_callback(s, folder, "live"), data, tokenizer)
    if variant == BLOCK_EAGER:
        trainer.prepare_latents(s)
    return trainer


def synchronize(s: dict[str, Any]) -> None:
    if s["device"] == "cuda":
        import torch

        torch.cuda.synchronize()


def on_step_begin(do: Callable[[Any], None]) -> Any:
    """Return a callback that calls `do(state)` when a step begins."""
    from transformers import TrainerCallback

    class OnStepBegin(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            do(state)

    return OnStepBegin()


def penalty_alone(trainer: Any, s: dict[str, Any], times: int = 9) -> tuple[float, float]:
    """Return the median (clock, processor) seconds of a penalty's forward and backward passes in one step."""
    import torch

    from emguard_plugin import EMRegularizerCallback, Moment

    guard = next((c for c in trainer.callback_handler.callbacks if isinstance(c, EMRegularizerCallback)), None)
    inputs = {"input_ids": torch.zeros(1, 1, dtype=torch.long, device=s["device"])}

    def penalty(i: int) -> Any:
        if guard is None:  # the second model's
            return trainer.anchor_kl(trainer.model, inputs["input_ids"].device, i, s["accumulation"])
        measured = guard.measure(Moment(trainer.model, inputs, trainer.state.global_step, i, s["accumulation"]))
        return None if measured is None else measured.value

    took = []
    for _ in range(times):
        synchronize(s)
        start, cpu = time.perf_counter(), time.process_time()
        for i in range(1 if guard is not None and guard.every == "optimizer_step" else s["accumulation"]):
            with trainer.compute_loss_context_manager():
                value = penalty(i)
            if value is not None:
                value.backward()
        synchronize(s)
        took.append((time.perf_counter() - start, time.process_time() - cpu))
        trainer.model.zero_grad()
    return statistics.median(t for t, _ in took), statistics.median(t for _, t in took)


def alone(variant: str) -> str:
    """Return the key of a guarded variant's penalty by itself."""
    return f"{variant}: penalty alone"


def time_rounds(s: dict[str, Any], folder: Path, report: Callable[[], None]) -> Iterator[dict[str, tuple[float, float]]]:
    """Yield (clock, processor) seconds per step of each variant, one mapping per round."""
    variants = VARIANTS[s["method"]]
    turns = Turns(list(variants))

    def train(variant: str) -> None:
        import torch

        if s["device"] == "cpu":
            torch.set_num_threads(s["threads"])
        try:
            turns.wait(variant)  # build one after the other as well
            trainers[variant] = build(variant, s, folder, on_step_begin(lambda state: turns.wait(variant)))
            trainers[variant].train()
            turns.leave(variant)
        except BaseException as error:
            turns.leave(variant, error)

    trainers: dict[str, Any] = {}
    threads = [threading.Thread(target=train, args=(v,), daemon=True) for v in variants]
    for thread in threads:
        thread.start()
    for variant in variants:
        turns.give(variant)  # build, up to the first step
    for r in range(s["warmup"] + s["rounds"]):
        seconds = {}
        shift = r % len(variants)
        for variant in variants[shift:] + variants[:shift]:
            synchronize(s)
            start, cpu = time.perf_counter(), time.process_time()
            turns.give(variant)  # one whole turn of the training loop: it runs up to the next step's begin
            synchronize(s)
            seconds[variant] = (time.perf_counter() - start, time.process_time() - cpu)
        if r >= s["warmup"]:
            by_itself = {alone(v): penalty_alone(trainers[v], s, s["alone_times"]) for v in variants if v in BY_ITSELF}
            yield {**{v: seconds[v] for v in variants}, **by_itself}
        report()
    for thread in threads:
        thread.join()


class Measured(Exception):
    """Ends a run whose peak is known."""


class Allocations:
    """Peak memory of one training step: what is held at its start plus the highest sum of allocations in it."""

    STEP = 1  # the second step: the optimizer state exists

    def __init__(self, s: dict[str, Any]) -> None:
        self.s = s
        self.trainer: Any = None
        self.peak = 0
        self._profile: Any = None

    def step_begins(self, state: Any) -> None:
        """Start and stop the record around one step."""
        import torch

        if self.s["device"] == "cuda":
            if state.global_step == self.STEP:
                torch.cuda.reset_peak_memory_stats()
            elif state.global_step == self.STEP + 1:
                self.peak = torch.cuda.max_memory_allocated()
                raise Measured
            return
        if state.global_step == self.STEP:
            self._held = self.held()
            self._profile = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True)
            self._profile.start()
        elif state.global_step == self.STEP + 1:
            self._profile.stop()
            self.peak = self._held + self._highest()
            raise Measured

    def held(self) -> int:
        """Return the bytes of weights, gradients, optimizer state and reference."""
        model = self.trainer.model
        tensors = [*model.parameters(), *model.buffers(), *(p.grad for p in model.parameters() if p.grad is not None)]
        for values in self.trainer.optimizer.state.values():
            tensors += [v for v in values.values() if hasattr(v, "untyped_storage")]
        for callback in self.trainer.callback_handler.callbacks:
            reference = getattr(callback, "_reference", None)
            if isinstance(reference, dict):
                tensors += reference.values()
            elif reference is not None and reference._cache is not None:
                tensors.append(reference._cache._hidden)
            base = getattr(callback, "_base", None)
            if base is not None:
                tensors += [t for e in base.encoders for t in e.tensors().values()]
                tensors += base.store.rows.values() if base.store is not None else []
        tensors += [self.trainer.encoder] if hasattr(self.trainer, "encoder") else []
        tensors += getattr(self.trainer, "second", None).parameters() if hasattr(self.trainer, "second") else []
        tensors += [t for pair in getattr(self.trainer, "reference", None) or [] for t in pair]
        return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())

    def _highest(self) -> int:
        events = self._profile.profiler.kineto_results.events()
        changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
        now = highest = 0
        for _, nbytes in changes:
            now += nbytes
            highest = max(highest, now)
        if highest <= 0:
            raise RuntimeError("the profiler recorded no allocations")
        return highest


def peak_memory(variant: str, s: dict[str, Any], folder: Path) -> int:
    """Return the peak bytes of one training step."""
    allocations = Allocations(s)
    s = {**s, "warmup": 0, "rounds": Allocations.STEP + 2}
    allocations.trainer = build(variant, s, folder, on_step_begin(allocations.step_begins))
    with contextlib.suppress(Measured):
        allocations.trainer.train()
    peak = allocations.peak
    allocations.trainer = None
    gc.collect()
    if s["device"] == "cuda":
        import torch

        torch.cuda.empty_cache()
    return peak


def summarise(
    rounds: list[dict[str, tuple[float, float]]], memory: dict[str, int], variants: tuple[str, ...], weights: int
) -> dict[str, Any]:
    """Return the figures per variant; `weights` are the model's, in bytes."""
    rows = {}
    for v in variants:
        clock = [r[v][0] / r[PLAIN][0] for r in rounds]
        low, _, high = statistics.quantiles(clock, n=4) if len(clock) > 1 else (clock[0],) * 3
        rows[v] = {
            "median_seconds": statistics.median(r[v][0] for r in rounds),
            "time_ratio": statistics.median(clock),
            "time_ratio_quartiles": [low, high],
            "cpu_time_ratio": statistics.median(r[v][1] / r[PLAIN][1] for r in rounds),
        }
        if v in BY_ITSELF:
            by_itself = [(r[alone(v)][0], 1 + r[alone(v)][0] / r[PLAIN][0]) for r in rounds]
            rows[v] |= {
                "alone_seconds": statistics.median(t for t, _ in by_itself),
                "alone_ratio": statistics.median(x for _, x in by_itself),
            }
        if v in memory:
            rows[v] |= {"peak_bytes": memory[v], "memory_ratio": memory[v] / memory[PLAIN]}
            rows[v]["extra_over_weights"] = (memory[v] - memory[PLAIN]) / weights
    return rows


def weight_bytes(s: dict[str, Any]) -> int:
    """Return the bytes of the model's weights, without the adapter's."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**SHAPES[s["shape"]]))
    return sum(p.numel() for p in model.parameters()) * (2 if s["device"] == "cuda" else 4)


def show(console: Console, title: str, rows: dict[str, Any]) -> None:
    table = Table(title=title)
    for column in ("", "s/step", "step time", "quartiles", "CPU time", "alone", "peak MB", "peak memory"):
        table.add_column(column, justify="left" if not column else "right", no_wrap=bool(column))
    for variant, row in rows.items():
        low, high = row["time_ratio_quartiles"]
        memory = (f"{row['peak_bytes'] / 2**20:,.0f}", f"{row['memory_ratio']:.4f}") if "peak_bytes" in row else ("", "")
        table.add_row(
            variant,
            f"{row['median_seconds']:.3f}",
            f"{row['time_ratio']:.4f}",
            f"{low:.3f} to {high:.3f}",
            f"{row['cpu_time_ratio']:.4f}",
            f"{row['alone_ratio']:.4f}" if "alone_ratio" in row else "",
            *memory,
        )
    console.print(table)


def store(out: Path, name: str, settings: dict[str, Any], raw: list[Any], peaks: dict[str, int]) -> None:
    """Write the record of this setting, leaving the others in the file; after every round, so that none is lost."""
    import torch

    cuda, variants = settings["device"] == "cuda", VARIANTS[settings["method"]]
    packages = ("torch", "transformers", "trl", "peft", "accelerate", "emguard-plugin")
    record = {
        "settings": settings,
        "versions": {"python": platform.python_version(), **{p: version(p) for p in packages}},
        "machine": torch.cuda.get_device_name() if cuda else f"{platform.machine()}, {os.cpu_count()} cores",
        "targets": {v: TARGETS[v] for v in VARIANTS[settings["method"]] if v in TARGETS},
        "results": summarise(raw, peaks, VARIANTS[settings["method"]], weight_bytes(settings)),
        "paired_ratios": {v: [round(r[v][0] / r[PLAIN][0], 5) for r in raw] for v in variants if v != PLAIN},
        "paired_cpu_ratios": {v: [round(r[v][1] / r[PLAIN][1], 5) for r in raw] for v in variants if v != PLAIN},
        "seconds": {v: [round(r[v][0], 5) for r in raw] for v in raw[0]},
    }
    stored = json.loads(out.read_text()) if out.is_file() else {}
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps({**stored, name: record}, indent=1, sort_keys=True) + "\n")


def main(
    method: Annotated[str, typer.Option(help="treft, kl or block_em.")] = "treft",
    ratio: Annotated[float, typer.Option(help="KL: anchor tokens per training token.")] = 0.125,
    full: Annotated[bool, typer.Option("--full", help="Full fine-tuning instead of LoRA on all linear layers.")] = False,
    device: Annotated[str, typer.Option(help="cpu (fp32) or cuda (bf16).")] = "cpu",
    llama_8b: Annotated[bool, typer.Option("--llama-8b", help="The shape of Llama-3.1-8B, random weights.")] = False,
    rounds: Annotated[int, typer.Option(help="Paired measurements.")] = 24,
    warmup: Annotated[int, typer.Option(help="Rounds before them.")] = 2,
    batch: Annotated[int, typer.Option(help="Rows per micro-batch.")] = 8,
    accumulation: Annotated[int, typer.Option(help="Micro-batches per optimizer step.")] = 1,
    length: Annotated[int, typer.Option(help="Tokens per row.")] = 512,
    prefix_tokens: Annotated[int, typer.Option(help="Tokens of the prefix.")] = 30,
    gradient_checkpointing: Annotated[bool, typer.Option(help="Non-reentrant gradient checkpointing.")] = False,
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 1,
    memory: Annotated[bool, typer.Option(help="Measure peak memory as well.")] = True,
    out: Annotated[Path, typer.Option(help="Result file; other settings in it are kept.")] = RESULTS,
) -> None:
    """Print and store step-time and peak-memory ratios."""
    import torch

    warnings.filterwarnings("ignore")
    warmup = max(warmup, 4) if method == "block_em" else warmup  # an epoch has four micro-batches
    settings: dict[str, Any] = {
        "method": method,
        "ratio": ratio,
        "alone_times": 9 if method == "treft" else 3,
        "shape": "llama-8b" if llama_8b else "8x512",
        "full": full,
        "device": device,
        "batch": batch,
        "accumulation": accumulation,
        "length": length,
        "prefix_tokens": prefix_tokens,
        "gradient_checkpointing": gradient_checkpointing,
        "rounds": rounds,
        "warmup": warmup,
        "threads": threads,
    }
    torch.set_num_threads(threads)
    console = Console(width=120)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    peaks: dict[str, int] = {}
    raw: list[dict[str, tuple[float, float]]] = []
    name = "-".join(
        [settings["shape"], "full" if full else "lora", device]
        + ([f"accumulation{accumulation}"] if accumulation > 1 else [])
        + (["checkpointing"] if gradient_checkpointing else [])
        + ([method] if method != "treft" else [])
    )
    with tempfile.TemporaryDirectory() as tmp, Progress(*columns, console=console) as progress:
        if memory:
            measured = [v for v in VARIANTS[method] if v != AGAIN]
            task = progress.add_task("peak memory", total=len(measured))
            for variant in measured:
                peaks[variant] = peak_memory(variant, settings, Path(tmp))
                progress.advance(task)
        task = progress.add_task("step time", total=rounds + warmup)
        for seconds in time_rounds(settings, Path(tmp), lambda: progress.advance(task)):
            raw.append(seconds)
            store(out, name, settings, raw, peaks)
    rows = summarise(raw, peaks, VARIANTS[method], weight_bytes(settings))
    show(console, f"{name}: {batch} x {length} tokens, prefix of {prefix_tokens}, {rounds} rounds", rows)
    for variant, targets in TARGETS.items():
        for what, key, kind in (
            ("step time, paired", "time_ratio", "time"),
            ("step time, alone", "alone_ratio", "time"),
            ("peak memory", "memory_ratio", "memory"),
            ("extra peak memory over weights", "extra_over_weights", "extra"),
        ):
            value = rows.get(variant, {}).get(key)
            if value is not None and kind in targets:  # memory may be left out
                verdict = "met" if value <= targets[kind] else "MISSED"
                console.print(f"{variant}, {what}: {value:.4f} (target {targets[kind]}) {verdict}")


if __name__ == "__main__":
    typer.run(main)
