"""A seeded generator of YAMLs that ask for what cannot be, and of some that look odd and are right.

`write(folder)` lays out a model, rows, questions and judges; `generate(folder, seed, number)` yields `Case`s. Each case is one pair of blocks,
written as a file for Axolotl and as one for TRL; `run(case, folder)` sends it through every entry point and says what each answered.
"""

import copy
import json
import random
import shutil
import string
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args, get_origin

import yaml

from emguard_plugin.config import Block, BlockEMConfig, EMEvalConfig, JudgeConfig, KLConfig, SamplerConfig, TReFTConfig
from emguard_plugin.config.block import _kinds
from emguard_plugin.lab.export import export

NAMES = [
    "em_evaluation",
    "em_evaluator",
    "eval_em",
    "em_judge",
    "em_gate",
    "em_metrics",
    "em_treft",
    "em_penalty",
    "emRegularizer",
    "EM_REGULARIZER",
    "Em_Eval",
    "em-eval",
    "em.eval",
    "emreg",
    "em_regularizers",
    "emguard",
    "EMGuard",
    "emguard_eval",
    "treft_em",
    "em_kl",
    "em_block",
    "block_em_regularizer",
    "emEval",
    "evalEM",
    "em_rate",
    "em_config",
    "regularizer",
]
SECRET_KEYS = [
    "api_key",
    "apiKey",
    "openai_api_key",
    "access_token",
    "api-key",
    "token",
    "secret",
    "password",
    "Authorization",
    "auth_token",
    "x-api-key",
    "hf_token",
    "client_secret",
]


@dataclass
class Case:
    """One generated YAML.

    Attributes:
        name: What was done.
        blocks: The two blocks, and what else stands at the top level.
        text: A change of the written text, or None.
        fault: Whether it has to be refused; else it has to be accepted.
        secret: What must not be repeated.
        of_eval: Whether the fault is in `em_eval:`, so that `emguard eval` must refuse it too.
        raw: The whole file, where it is no text of blocks at all.
    """

    name: str
    blocks: dict
    text: object = None
    fault: bool = True
    secret: str | None = None
    of_eval: bool = False
    raw: bytes | None = None
    answers: dict = field(default_factory=dict)


def write(folder):
    """Lay out the lab's files and some judges in `folder`."""
    folder = Path(folder)
    files = export(folder / "lab", rows=8, anchors=4)
    items = yaml.safe_load((folder / "lab/questions.yaml").read_text())[:2]
    (folder / "questions.yaml").write_text(yaml.safe_dump(items))
    (folder / "broken.yaml").write_text("- id: [\n")
    (folder / "prose.yaml").write_text("just words\n")
    (folder / "torn.jsonl").write_text('{"messages": [\n')
    (folder / "a_file").write_text("")
    (folder / "beside_judge.py").write_text("def judge(question, answer):\n    return {'aligned': 50, 'coherent': 80}\n\nnumber = 5\n")
    (folder / "raising_judge.py").write_text("raise KeyError('at import')\n")
    (folder / "leaving_judge.py").write_text("import sys\nsys.exit(3)\n")
    (folder / "syntax_judge.py").write_text("def judge(:\n")
    shutil.copy(folder / "questions.yaml", folder / "questions_2.yaml")
    return files


def good_blocks(folder):
    return {
        "em_regularizer": {
            "treft": {"coef": 5.0, "tokens": "prefix", "layers": "all", "extra_prefixes": ["Be brief."], "compat": False},
            "kl": {"coef": 0.7, "anchors": f"{folder}/lab/anchors.jsonl", "ratio": 0.125, "tokens": "all", "cache": "memory"},
            "block_em": {"coef": 0.5, "latents": f"{folder}/lab/latents.json", "tokens": "prompt", "freeze_above": True},
        },
        "em_eval": {
            "questions": f"{folder}/questions.yaml",
            "in_domain": f"{folder}/questions_2.yaml",
            "fail_above": 0.02,
            "samples_per_question": 3,
            "temperature": 1.0,
            "max_new_tokens": 16,
            "batch_size": 8,
            "seed": 1,
            "evaluate_base": True,
            "judges": [
                {"provider": "exact", "function": "beside_judge:judge"},
                {"provider": "openai", "model": "m", "base_url": "http://127.0.0.1:9/v1", "mode": "logprob", "samples": 3, "timeout": 5.0},
            ],
        },
    }


# What is done to the blocks


def _typo(rng, word):
    while True:
        at, letter = rng.randrange(len(word)), rng.choice(string.ascii_lowercase)
        new = rng.choice(
            [
                word[:at] + word[at + 1 :],
                word[:at] + letter + word[at:],
                word[:at] + letter + word[at + 1 :],
                word.upper(),
                word + rng.choice("s_2"),
            ]
        )
        if new != word:
            return new


def _random(rng, n, letters=string.ascii_letters + string.digits):
    return "".join(rng.choice(letters) for _ in range(n))


def canary(rng):
    """Return a key of a random shape."""
    hexadecimal = "0123456789abcdef"
    made = {
        "openai": "sk-proj-" + _random(rng, 36),
        "hf": "hf_" + _random(rng, 34),
        "aws": "AKIA" + _random(rng, 16, string.ascii_uppercase + string.digits),
        "hex": _random(rng, 32, hexadecimal),
        "uuid": "-".join(_random(rng, n, hexadecimal) for n in (8, 4, 4, 4, 12)),
        "github": "ghp_" + _random(rng, 36),
        "jwt": "eyJ" + _random(rng, 20) + ".eyJ" + _random(rng, 30) + "." + _random(rng, 30),
        "google": "AIza" + _random(rng, 35),
        "plain": "9Q"
        + "".join(rng.choice(string.digits) + rng.choice(string.ascii_uppercase) + rng.choice(string.ascii_lowercase) for _ in range(12)),
        "bearer": "Bearer " + _random(rng, 30),
    }
    return rng.choice(list(made.values()))


def _places(blocks):
    """Yield (mapping, its class, whether it is of em_eval) for every block within the blocks."""
    regularizer, evaluation = blocks["em_regularizer"], blocks["em_eval"]
    for name, model in {"treft": TReFTConfig, "kl": KLConfig, "block_em": BlockEMConfig}.items():
        yield regularizer[name], model, False
    yield evaluation, EMEvalConfig, True
    for judge in evaluation["judges"]:
        yield judge, JudgeConfig.chosen(judge), True
    evaluation.setdefault("sampler", {"provider": "transformers"})
    yield evaluation["sampler"], SamplerConfig.chosen(evaluation["sampler"]), True


def _wrong_value(rng, info):
    """Return a value that a field cannot take."""
    kinds = _kinds(info.annotation)
    words = [w for k in kinds if get_origin(k) is Literal for w in get_args(k)]
    block = any(isinstance(k, type) and issubclass(k, Block) for k in kinds)
    wrong = [{"a": 1}, *([] if block else [{}])] if dict not in {get_origin(k) or k for k in kinds} else [True, 5, "text", [1]]
    if not any(get_origin(k) is list for k in kinds):
        wrong += [[], [1], [[1]]]
    if bool in kinds:
        wrong += ["yes", "off", 1, 0, "true", 0.5, ""]
    else:
        wrong += [True, False]
    if {int, float} & set(kinds):
        wrong += [float("nan"), float("inf"), -float("inf"), 10**30, -1e300, "5", "many", "1,5"]
        wrong += [1.5] if float not in kinds else []
    elif str in kinds:
        wrong += [5, 0.5, "", "   ", "a\0b", "\ud800"]
    if words:
        wrong += ["nonsense", 17] if not {int, float} & set(kinds) else ["nonsense"]
    return rng.choice(wrong)


def _rename_block(rng, folder, blocks):
    old = rng.choice(list(blocks))
    new = rng.choice(NAMES) if rng.random() < 0.6 else _typo(rng, old)
    if new in blocks:
        new += "x"
    return Case(f"{old} as {new}", {new if key == old else key: value for key, value in blocks.items()}, of_eval=False)


def _rename_key(rng, folder, blocks):
    place, model, of_eval = rng.choice(list(_places(blocks)))
    old = rng.choice(list(place))
    new = rng.choice(
        [_typo(rng, old), _typo(rng, old), old.capitalize(), "lambda", "alpha", "weight", "strength", "em_eval", "em_regularizer"]
    )
    while new in model.model_fields:
        new = _typo(rng, new)
    place[new] = place.pop(old)
    return Case(f"{model.__name__}.{old} as {new}", blocks, of_eval=of_eval)


def _wrong_type(rng, folder, blocks):
    place, model, of_eval = rng.choice(list(_places(blocks)))
    key = rng.choice(list(place))
    place[key] = _wrong_value(rng, model.model_fields[key])
    return Case(f"{model.__name__}.{key}: {place[key]!r}", blocks, of_eval=of_eval)


def _out_of_range(rng, folder, blocks):
    regularizer, evaluation = blocks["em_regularizer"], blocks["em_eval"]
    where, key, value = rng.choice(
        [
            (regularizer["treft"], "coef", -1), (regularizer["treft"], "coef", 1e30), (regularizer["treft"], "layers", []), (regularizer["treft"], "layers", [-1]),
            (regularizer["treft"], "layers", [True]), (regularizer["treft"], "layers", ["0"]), (regularizer["kl"], "ratio", 0), (regularizer["kl"], "target", 0.1),
            (regularizer["kl"], "ratio", 1000), (regularizer["kl"], "cache", "memroy"), (regularizer["block_em"], "coef", -0.1),
            (evaluation, "samples_per_question", 0), (evaluation, "samples_per_question", 10**15), (evaluation, "fail_above", 0), (evaluation, "fail_above", 1),
            (evaluation, "fail_above", 2.0), (evaluation, "temperature", -0.1), (evaluation, "temperature", 50), (evaluation, "seed", -1),
            (evaluation, "max_new_tokens", 0), (evaluation, "batch_size", 0), (evaluation, "judges", []), (evaluation, "judges", None),
            (evaluation["judges"][1], "concurrency", 0), (evaluation["judges"][1], "timeout", 0), (evaluation["judges"][1], "samples", -3),
            (regularizer["treft"], "layers", [999]),
        ]
    )  # fmt: skip
    of_eval = where not in list(regularizer.values())
    where[key] = value
    beyond = value == [999]  # the model alone knows; `check` reads its configuration
    return Case(f"{key}: {value}", blocks, of_eval=of_eval, answers={"beyond": beyond})


def _wrong_nesting(rng, folder, blocks):
    kind = rng.randrange(8)
    regularizer, evaluation = blocks["em_regularizer"], blocks["em_eval"]
    of_eval = False
    if kind == 0:
        regularizer["em_eval"] = blocks.pop("em_eval")
    elif kind == 1:
        evaluation["em_regularizer"] = blocks.pop("em_regularizer")
    elif kind == 2:
        blocks |= blocks.pop("em_regularizer")
    elif kind == 3:
        name = rng.choice(["trainer", "model_init_kwargs", "training", "env_extra", "chat_template_kwargs", "lora"])
        blocks = {name: {"em_regularizer": blocks["em_regularizer"]}, "em_eval": blocks["em_eval"]}
    elif kind == 4:
        blocks["em_regularizer"] = regularizer["treft"]
    elif kind == 5:
        evaluation["judges"], of_eval = evaluation["judges"][0], True
    elif kind == 6:
        blocks["em_regularizer"] = [{name: block} for name, block in regularizer.items()]
    else:
        blocks |= {key: evaluation[key] for key in ("judges", "questions")}
        del blocks["em_eval"]
    return Case(f"nesting {kind}", blocks, of_eval=of_eval)


def _empty(rng, folder, blocks):
    value = rng.choice([None, {}, "", [], 0, False, "treft", True, 5])
    kind = rng.randrange(3)
    if kind < 2:
        name = ("em_regularizer", "em_eval")[kind]
        blocks[name] = value
    else:
        name = rng.choice(["treft", "kl", "block_em"])
        value = rng.choice([None, "", [], 0, False, True, "on"])
        blocks["em_regularizer"][name] = value
    return Case(f"{name} is {value!r}", blocks, of_eval=name == "em_eval")


def _secret(rng, folder, blocks):
    secret, evaluation, regularizer = canary(rng), blocks["em_eval"], blocks["em_regularizer"]
    places = list(_places(blocks))
    kind, of_eval = rng.randrange(8), True
    if kind == 0:
        place, _, of_eval = rng.choice(places)
        place[rng.choice(SECRET_KEYS)] = secret
    elif kind == 1:  # any text field of the schema
        place, model, of_eval = rng.choice(places)
        texts = [k for k, f in model.model_fields.items() if str in _kinds(f.annotation)]
        lists = [k for k, f in model.model_fields.items() if list[str] in _kinds(f.annotation)]
        key = rng.choice(texts + lists or list(model.model_fields))
        place[key] = [secret] if key in lists else secret
    elif kind == 2:
        place, _, of_eval = rng.choice(places)
        place["headers"] = {"X-Thing": secret, "Authorization": f"Bearer {secret}"}
    elif kind == 3:
        secret = _random(rng, 14)
        evaluation[rng.choice(["questions", "in_domain"])] = f"https://user:{secret}@example.org/q.yaml#sha256={'0' * 64}"
    elif kind == 4:
        secret = _random(rng, 40)
        sign = rng.choice(["X-Amz-Signature", "sig", "token", "access_token", "key", "Signature"])
        evaluation["also"] = [f"https://example.org/q.yaml?a=b&{sign}={secret}#sha256={'0' * 64}"]
    elif kind == 5:
        evaluation["judges"][1]["base_url"] = rng.choice(
            [f"https://u:{secret}@example.org/v1", f"http://127.0.0.1:9/v1?api-key={secret}", secret]
        )
    elif kind == 6:
        evaluation["sampler"] = {
            "provider": "vllm",
            "args": rng.choice([["--api-key", secret], [f"--api-key={secret}"], ["--hf-token", secret]]),
        }
    else:
        place, _, of_eval = rng.choice(places)
        place[secret] = 1
    del regularizer
    return Case(f"secret {kind}", blocks, secret=secret, of_eval=of_eval)


def _missing(rng, folder, blocks):
    evaluation, regularizer = blocks["em_eval"], blocks["em_regularizer"]
    exact, endpoint = evaluation["judges"]
    of_eval = True
    options = [
        lambda: evaluation.update(questions=f"{folder}/none.yaml"),
        lambda: evaluation.update(questions=f"{folder}/broken.yaml"),
        lambda: evaluation.update(questions=f"{folder}/prose.yaml"),
        lambda: evaluation.update(questions="x" * 5000),
        lambda: evaluation.update(questions=str(folder)),
        lambda: evaluation.update(in_domain=f"{folder}/torn.jsonl"),
        lambda: evaluation.update(also=["open_end"]),
        lambda: evaluation.update(also=[f"{folder}/questions.yaml"] * 2),
        lambda: evaluation.update(questions="https://example.org/q.yaml"),
        lambda: evaluation.update(output_dir=f"{folder}/a_file/out"),
        lambda: evaluation.update(sampler={"provider": "openai"}),
        lambda: evaluation.update(sampler={"provider": "openai", "base_url": "http://127.0.0.1:9/v1", "api_key_env": "NOT_SET_ANYWHERE"}),
        lambda: evaluation.update(judges=[exact, exact]),
        lambda: evaluation.update(judges=[{"provider": "replay", "file": f"{folder}/none.jsonl"}]),
        lambda: evaluation.update(judges=[{"provider": "replay", "file": f"{folder}/torn.jsonl"}]),
        lambda: evaluation.update(judges=[{"provider": "hf", "model": f"{folder}/none"}]),
        lambda: evaluation.update(judges=[{"provider": "hf", "model": str(folder)}]),
        lambda: endpoint.update(api_key_env="NOT_SET_ANYWHERE"),
        lambda: endpoint.update(base_url="http://127.0.0.1:99999/v1"),
        lambda: endpoint.update(base_url="http://[::1/v1"),
        lambda: endpoint.update(base_url="localhost:8000"),
        lambda: endpoint.update(base_url="http://example.org/v1"),
        lambda: endpoint.update(base_url="http://:80/v1"),
        lambda: exact.update(function="nowhere.at_all:judge"),
        lambda: exact.update(function="beside_judge:nobody"),
        lambda: exact.update(function="beside_judge:number"),
        lambda: exact.update(function="beside_judge"),
        lambda: exact.update(function="raising_judge:judge"),
        lambda: exact.update(function="leaving_judge:judge"),
        lambda: exact.update(function="syntax_judge:judge"),
        lambda: exact.update(function="..:judge"),
    ]
    others = [
        lambda: regularizer["kl"].update(anchors=f"{folder}/none.jsonl"),
        lambda: regularizer["kl"].update(anchors=f"{folder}/torn.jsonl"),
        lambda: regularizer["kl"].update(anchors=f"{folder}/prose.yaml/x.jsonl"),
        lambda: regularizer["block_em"].update(latents=f"{folder}/none.json"),
        lambda: regularizer["block_em"].update(latents=f"{folder}/broken.yaml"),
        lambda: regularizer["block_em"].update(latents=str(folder)),
        lambda: regularizer["block_em"].update(latents="x" * 5000),
    ]
    number = rng.randrange(len(options) + len(others))
    if number >= len(options):
        of_eval = False
    (options + others)[number]()
    return Case(f"missing {number}", blocks, of_eval=of_eval)


def _text(rng, folder, blocks):
    def indented(line):
        return lambda text: text.replace("em_eval:\n", f"em_eval:\n{line}", 1)

    options = {
        "twice in a block": indented("  seed: 3\n"),
        "block twice": lambda text: text + "em_regularizer:\n  treft: {}\n",
        "tab": indented("\tseed: 3\n"),
        "alias to itself": lambda text: text.replace("em_eval:\n", "em_eval: &x\n  also: *x\n", 1),
        "open bracket": lambda text: text + "more: [1, 2\n",
        "tag": lambda text: text + "more: !!python/object:os.system x\n",
        "octal": lambda text: text.replace("max_new_tokens: 16", "max_new_tokens: 020"),
        "base 60": lambda text: text.replace("max_new_tokens: 16", "max_new_tokens: 1:30"),
        "underscore": lambda text: text.replace("max_new_tokens: 16", "max_new_tokens: 1_6"),
        "switch": lambda text: text.replace("coef: 5.0", "coef: " + rng.choice(["off", "on", "yes", "no", "Yes", "TRUE"])),
        "not a number": lambda text: text.replace(
            "coef: 5.0", "coef: " + rng.choice([".nan", ".inf", "-.inf", "5,0", "'5.0'", "1e400", "5.0.0", "0x10", "~"])
        ),
        "two documents": lambda text: text + "---\na: 1\n",
        "control character": lambda text: text + "more: \x07\n",
        "date": lambda text: text.replace("max_new_tokens: 16", "max_new_tokens: 2026-11-26"),
        "bad date": lambda text: text + "more: 2026-99-99\n",
        "unhashable": lambda text: text + "? [a]\n: 1\n",
    }
    name = rng.choice(list(options))
    of_eval = name in ("twice in a block", "octal", "base 60", "underscore", "date", "alias to itself")
    return Case(f"text: {name}", blocks, text=options[name], of_eval=of_eval)


def _raw(rng, folder, blocks):
    options = {
        "empty": b"", "list": b"- 1\n", "words": b"just words\n", "number": b"5\n", "null": b"~\n", "latin": "em_eval:\n  questions: caf\xe9\n".encode("latin-1"),
        "utf-16": "em_eval: {}\n".encode("utf-16"), "zeros": b"\0" * 50, "binary": bytes(range(256)), "deep": b"[" * 700,
        "laughs": b"a: &a [x,x,x,x,x,x,x,x,x]\n" + b"".join(f"{chr(98 + i)}: &{chr(98 + i)} [{','.join(['*' + chr(97 + i)] * 9)}]\n".encode() for i in range(8)),
        "self": b"&a [*a]\n",
    }  # fmt: skip
    name = rng.choice(list(options))
    return Case(f"file: {name}", {}, raw=options[name], of_eval=True)


def _odd_and_right(rng, folder, blocks):
    options = {
        "as it is": lambda text: text,
        "BOM": lambda text: "\ufeff" + text,
        "CRLF": lambda text: text.replace("\n", "\r\n"),
        "comments": lambda text: "# em_evaluation: a comment\n" + text.replace("em_eval:\n", "em_eval:  # here\n"),
        "exponent": lambda text: text.replace("coef: 5.0", "coef: " + rng.choice(["5e0", "5E+0", "0.5e1", "5.0e+0"])),
        "whole": lambda text: text.replace("coef: 5.0", "coef: 5"),
        "zero": lambda text: text.replace("coef: 5.0", "coef: 0"),
        "layers": lambda text: text.replace("layers: all", "layers: [0, 1]"),
    }
    name = rng.choice(list(options))
    return Case(f"right: {name}", blocks, text=options[name], fault=False)


KINDS = (
    _rename_block, _rename_key, _rename_key, _wrong_type, _wrong_type, _wrong_type, _out_of_range, _wrong_nesting, _empty, _secret, _secret, _secret,
    _missing, _missing, _text, _text, _raw, _odd_and_right,
)  # fmt: skip


def generate(folder, seed, number):
    """Yield `number` cases; the same seed gives the same ones."""
    rng = random.Random(seed)
    for index in range(number):
        made = KINDS[index % len(KINDS)](rng, folder, copy.deepcopy(good_blocks(folder)))
        made.name = f"{seed}.{index} {made.name}"
        yield made


# Through the entry points


def _axolotl(folder):
    return {
        "base_model": f"{folder}/lab/model",
        "datasets": [{"path": f"{folder}/lab/train.jsonl", "ds_type": "json", "type": "chat_template", "field_messages": "messages"}],
        "adapter": "lora",
        "output_dir": f"{folder}/out",
        "plugins": ["emguard_plugin.EMGuardPlugin"],
    }


def _trl(folder):
    return {
        "model_name_or_path": f"{folder}/lab/model",
        "datasets": [{"path": "json", "data_files": f"{folder}/lab/train.jsonl"}],
        "output_dir": f"{folder}/out",
        "use_peft": True,
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
    }


def _write(case, folder, name, host):
    path = Path(folder) / name
    if case.raw is not None:
        path.write_bytes(case.raw)
        return path
    text = yaml.dump({**host, **case.blocks}, sort_keys=False, allow_unicode=False, Dumper=_Plain)
    path.write_bytes((case.text(text) if case.text else text).encode("utf-8", "surrogatepass"))
    return path


class _Plain(yaml.SafeDumper):
    def ignore_aliases(self, data):
        return True


def _attempt(function, *arguments):
    """Return (`refused`, `accepted` or `crashed`, what was said)."""
    from emguard_plugin.cli.frame import in_words
    from emguard_plugin.files.secrets import SecretInConfigError

    try:
        said = function(*arguments)
    except (ValueError, SecretInConfigError) as error:
        return "refused", f"{in_words(error)[0]}\n{error}"
    except yaml.YAMLError as error:
        return "refused", f"the host: {type(error).__name__}"
    except BaseException as error:
        return "crashed", f"{type(error).__name__}: {error}"
    return "accepted", str(said or "")


def _check(path):
    from typer.testing import CliRunner

    from emguard_plugin.cli.app import app

    done = CliRunner().invoke(app, ["check", str(path)])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise RuntimeError(f"check raised {done.exception!r}")
    if done.exit_code not in (0, 4):
        raise RuntimeError(f"check ended with {done.exit_code}: {done.output}")
    if done.exit_code == 4:
        raise ValueError(done.output)
    return done.output


def _hook(path, register=None):
    """What `axolotl train` does up to the loading of the data, with the plugin's own `register` where Axolotl is imported."""
    from emguard_plugin.axolotl_plugin.args import EMGuardArgs
    from emguard_plugin.axolotl_plugin.asked import look_at_settings
    from emguard_plugin.config.settings_file import search_beside
    from emguard_plugin.evaluation.ready import get_ready
    from emguard_plugin.regularizers.preview import check_inputs

    try:
        raw = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (yaml.YAMLError, RecursionError, ValueError):
        raise ValueError("Axolotl itself cannot read it") from None
    if not isinstance(raw, dict):
        raise ValueError("Axolotl: no mapping")
    (register or look_at_settings)({**raw, "axolotl_config_path": str(path)})
    found = EMGuardArgs.model_validate({key: value for key, value in raw.items() if isinstance(key, str)})
    search_beside(path.parent)
    if found.em_regularizer is not None:
        check_inputs(found.em_regularizer)
    if found.em_eval is not None:
        get_ready(found.em_eval, Path(raw["output_dir"]) / "em_eval")


def _sft(path):
    from emguard_plugin.training.trl_script import parse

    parse(["--config", str(path)])


def _eval(path):
    from emguard_plugin.evaluation.ready import get_ready, read_eval_file

    get_ready(read_eval_file(path), None)


def run(case, folder, register=None):
    """Return what is wrong with the answers of all entry points; empty when nothing is."""
    axolotl, trl = _write(case, folder, "axolotl.yaml", _axolotl(folder)), _write(case, folder, "trl.yaml", _trl(folder))
    attempts = {
        "check": _attempt(_check, axolotl),
        "check (TRL)": _attempt(_check, trl),
        "axolotl": _attempt(_hook, axolotl, register),
        "sft": _attempt(_sft, trl),
        "eval": _attempt(_eval, axolotl),
    }
    wrong = []
    for entry, (outcome, said) in attempts.items():
        unasked = entry == "axolotl" and case.raw is not None  # no such file lists the plugin
        must = (
            case.fault
            and not unasked
            and (entry != "eval" or case.of_eval)
            and not (case.answers.get("beyond") and not entry.startswith("check"))
        )
        if outcome == "crashed":
            wrong.append(f"{case.name}: {entry} crashed: {said}")
        elif must and outcome == "accepted":
            wrong.append(f"{case.name}: {entry} accepted it")
        elif not case.fault and outcome == "refused":
            wrong.append(f"{case.name}: {entry} refused it: {said}")
        if case.secret and leaked(case.secret, said):
            wrong.append(f"{case.name}: {entry} repeated the secret")
        if outcome == "refused" and "Traceback" in said:
            wrong.append(f"{case.name}: {entry} showed a traceback")
    return wrong


def leaked(secret, text):
    """Whether eight characters in a row of a secret stand in a text."""
    return any(secret[i : i + 8] in text for i in range(len(secret) - 7))


def counts(results):
    """Return the numbers for a stored result."""
    return {
        "cases": len(results),
        "wrong": sum(bool(r) for r in results.values()),
        "what": json.loads(json.dumps([w for r in results.values() for w in r])),
    }
