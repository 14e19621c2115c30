"""What we need from the installed Axolotl, and what it does with our plugin. Everything runs in forks of one server."""

import importlib
import inspect
import sys

import pytest
import yaml

from emguard_plugin.axolotl_plugin.hosts import axolotl_version, finds_plugins, skips_missing_plugins
from emguard_plugin.check import check_config
from tests.e2e.axolotl_runs import Failed, read_log, train, validate
from tests.e2e.tiny_run import PLUGIN, column, penalties, tiny_yaml, treft

LONG = "emguard_plugin.axolotl_plugin.plugin.EMGuardPlugin"
NEUTRAL = "axolotl.integrations.base.BasePlugin"


@pytest.fixture
def check(tiny, tmp_path):
    """Return the problems that `emguard check` finds."""

    def go(**over):
        path = tmp_path / "check.yaml"
        path.write_text(yaml.safe_dump(tiny_yaml(tiny, **over)))
        return " | ".join(check_config(path).problems)

    return go


def refused(axolotl, tiny, tmp_path, match, **over):
    with pytest.raises(Failed, match=match):
        axolotl.call(validate, tmp_path / "run", tiny_yaml(tiny, **over))


# The API


def hooks():
    from axolotl.integrations.base import BasePlugin

    from emguard_plugin import EMGuardPlugin

    def parameters(cls, name):
        return [(p.name, p.default is p.empty) for p in inspect.signature(getattr(cls, name)).parameters.values()]

    ours = [n for n, v in vars(EMGuardPlugin).items() if inspect.isfunction(v) and not n.startswith("_")]
    return {n: [parameters(EMGuardPlugin, n), parameters(BasePlugin, n) if hasattr(BasePlugin, n) else None] for n in ours}


def test_every_hook_exists_with_our_parameters(axolotl, tmp_path):
    found = axolotl.call(hooks, tmp_path)
    assert {"get_input_args", "register", "load_datasets", "get_trainer_cls", "post_train_unload"} <= set(found)
    for name, (ours, theirs) in found.items():
        assert ours == theirs, name


def dispatched():
    """Call the manager's side of every hook we override, and name those that never reach a plugin."""
    from axolotl.integrations.base import BasePlugin, PluginManager

    from emguard_plugin import EMGuardPlugin

    seen = set()
    names = [n for n, v in vars(EMGuardPlugin).items() if inspect.isfunction(v) and not n.startswith("_")]
    spy = type("Spy", (BasePlugin,), {n: lambda self, *a, _n=n: seen.add(_n) for n in names})
    manager = PluginManager.get_instance()
    manager.plugins.clear()
    manager.plugins["spy"] = spy()
    for name in names:
        if name != "register":  # called by `prepare_plugins`
            method = getattr(manager, name)
            method(*[None] * len(inspect.signature(method).parameters))
    return sorted(set(names) - seen - {"register"})


def test_the_manager_dispatches_every_hook(axolotl, tmp_path):
    assert axolotl.call(dispatched, tmp_path) == []


def trainer_surface():
    from axolotl.core.trainers.base import AxolotlTrainer

    from emguard_plugin.axolotl_plugin.trainer import AxolotlEMGuardTrainer
    from emguard_plugin.training.mixin import EMRegularizerMixin

    names = {n: list(inspect.signature(getattr(AxolotlTrainer, n)).parameters) for n in ("compute_loss", "log", "train")}
    order = [c.__name__ for c in AxolotlEMGuardTrainer.__mro__]
    ours = {n for n, v in vars(EMRegularizerMixin).items() if not n.startswith("__")}
    return {
        **names,
        "mro": order[:3],
        "clash": sorted(n for n in ours if n.startswith("_") and hasattr(AxolotlTrainer, n)),
    }


def test_the_trainer_has_what_the_mixin_overrides(axolotl, tmp_path):
    found = axolotl.call(trainer_surface, tmp_path)
    assert found["compute_loss"] == ["self", "model", "inputs", "return_outputs", "num_items_in_batch"]
    assert found["log"] == ["self", "logs", "start_time"]
    assert found["train"][:2] == ["self", "resume_from_checkpoint"]
    assert found["mro"] == ["AxolotlEMGuardTrainer", "EMRegularizerMixin", "AxolotlTrainer"]
    assert found["clash"] == [], "the mixin's private names are its own"


def watch_compute_loss():
    import json
    from pathlib import Path

    from axolotl.core.trainers.base import AxolotlTrainer

    real = AxolotlTrainer.compute_loss

    def watched(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        row = {
            "accumulated": self.current_gradient_accumulation_steps,
            "last": self.accelerator.sync_gradients,
            "divides": not (self.compute_loss_func is not None or (self.model_accepts_loss_kwargs and num_items_in_batch is not None)),
            "ours": self._host_divides(num_items_in_batch),
            "callbacks": sum(type(c).__name__ == "TReFTCallback" for c in self.callback_handler.callbacks),
            "tokenizer": hasattr(self.processing_class, "chat_template"),
            "step": self.state.global_step,
        }
        with Path("seen.jsonl").open("a") as f:
            f.write(json.dumps(row) + "\n")
        return real(self, model, inputs, return_outputs=return_outputs, num_items_in_batch=num_items_in_batch)

    AxolotlTrainer.compute_loss = watched


def test_what_the_trainer_is_like_inside_compute_loss(axolotl, tiny, tmp_path):
    """24 rows in micro-batches of 5 by 2: the last optimizer step of an epoch accumulates one micro-batch only."""
    config = tiny_yaml(tiny, micro_batch_size=5, gradient_accumulation_steps=2, max_steps=4, **treft())
    axolotl.call(train, tmp_path, config, prelude=f"{__name__}:watch_compute_loss")
    rows = [yaml.safe_load(line) for line in (tmp_path / "seen.jsonl").read_text().splitlines()]
    assert [r["accumulated"] for r in rows] == [2, 2, 2, 2, 1, 2, 2]
    assert [r["last"] for r in rows] == [False, True, False, True, True, False, True]
    assert [r["step"] for r in rows] == [0, 0, 1, 1, 2, 3, 3]
    assert all(r["divides"] == r["ours"] and r["callbacks"] == 1 and r["tokenizer"] for r in rows)
    assert {r["divides"] for r in rows} == {axolotl_version() < (0, 21)}, "since 0.21 a Llama's loss is normalised by the step's tokens"


# Loading


@pytest.mark.parametrize("name", [PLUGIN, LONG])
def test_the_real_plugin_manager_loads_us_and_merges_our_keys(axolotl, tiny, tmp_path, name):
    found = axolotl.call(validate, tmp_path, tiny_yaml(tiny, plugins=[name], **treft(2.5)))
    assert found["em_regularizer"]["treft"]["coef"] == 2.5
    assert found["em_regularizer"]["treft"]["tokens"] == "prefix", "defaults are filled in"


@pytest.mark.parametrize(
    ("block", "match"),
    [
        ({"treft": {"coeff": 5}}, r"em_regularizer\.treft[\s\S]*unknown key 'coeff'. Did you mean 'coef'\?"),
        ({"trefft": {"coef": 5}}, r"em_regularizer[\s\S]*unknown key 'trefft'. Did you mean 'treft'\?"),
        ({"treft": {"coef": -1}}, r"em_regularizer\.treft\.coef"),
        ({"treft": {"tokens": "suffix"}}, r"em_regularizer\.treft\.tokens"),
        ({"treft": {"layers": []}}, r"`layers: \[\]` holds nothing"),
        ({}, "the block names no method"),
        ({"treft": None}, "`treft:` is empty; write `treft: {}` for the defaults"),
    ],
)
def test_a_faulty_block_stops_with_the_key(axolotl, tiny, tmp_path, check, block, match):
    refused(axolotl, tiny, tmp_path, match, em_regularizer=block)
    assert check(em_regularizer=block).startswith("em_regularizer")


@pytest.mark.parametrize("key", ["em_regularisers", "em_regulariser", "EM_Regularizer", "em-regularizer", "emguard", "em_evl"])
def test_a_misspelt_block_stops_the_run(axolotl, tiny, tmp_path, check, key):
    block = {key: {"treft": {"coef": 5}}}
    meant = "em_eval" if key == "em_evl" else "em_regularizer"
    refused(axolotl, tiny, tmp_path, f"unknown key `{key}:`. Did you mean `{meant}:`", **block)
    assert f"Did you mean `{meant}:`" in check(**block)


@pytest.mark.parametrize("key", ["em_regularizer", "em_eval"])
def test_an_empty_block_stops_the_run(axolotl, tiny, tmp_path, check, key):
    with pytest.raises(Failed, match=f"`{key}:` is empty"):
        axolotl.call(validate_text, tmp_path, yaml.safe_dump(tiny_yaml(tiny)) + f"{key}:\n")
    (tmp_path / "empty.yaml").write_text(yaml.safe_dump(tiny_yaml(tiny)) + f"{key}:\n")
    assert check_config(tmp_path / "empty.yaml").problems


def validate_text(text):
    with open("config.yaml", "w") as f:
        f.write(text)
    return validate("config.yaml")


def test_axolotl_itself_would_drop_a_misspelt_block(axolotl, tiny, tmp_path):
    """The reason for `register`; when this fails, Axolotl has become strict."""
    found = axolotl.call(without_us, tmp_path, tiny_yaml(tiny, plugins=[NEUTRAL], em_regulariser={"treft": {}}))
    assert "em_regulariser" not in found


def without_us(config):
    """Validate as if emguard were not installed."""
    import axolotl.integrations.base as host

    if finds_plugins():
        host._plugin_entry_points, host._plugin_entry_points_source = (), host.entry_points
    host.PluginManager.get_instance().plugins.clear()
    return validate(config)


def with_broken(module, config):
    from axolotl.integrations.base import PluginManager

    """Train while `module` cannot be imported, as with a half-installed package."""
    for name in [n for n in sys.modules if n.split(".")[0] == "emguard_plugin"]:
        del sys.modules[name]
    sys.modules[module] = None
    PluginManager.get_instance().plugins.clear()
    validate(config)
    train(config)


@pytest.mark.parametrize("name", [PLUGIN, LONG])
@pytest.mark.parametrize(
    "module",
    [
        "emguard_plugin.config",
        "emguard_plugin.axolotl_plugin.args",
        "emguard_plugin.training.mixin",
        "emguard_plugin.reference.stored",
    ],
)
def test_a_broken_import_is_loud(axolotl, tiny, tmp_path, name, module):
    """Axolotl catches `ImportError` while it loads a plugin, and trains on."""
    with pytest.raises(Failed, match=f"(?i)(cannot be loaded|import of|No module named).*{module.split('.')[1]}") as failed:
        axolotl.call(with_broken, tmp_path, module, tiny_yaml(tiny, plugins=[name], **treft()))
    assert "Starting trainer" not in str(failed.value)


def test_an_unimportable_plugin_module_is_loud_under_its_public_name(axolotl, tiny, tmp_path):
    module = "emguard_plugin.axolotl_plugin.plugin"
    with pytest.raises(Failed, match=r"RuntimeError: emguard_plugin\.EMGuardPlugin cannot be loaded"):
        axolotl.call(with_broken, tmp_path, module, tiny_yaml(tiny, **treft()))


def without_axolotl():
    sys.modules["axolotl.integrations.base"] = None
    for name in [n for n in sys.modules if n.split(".")[0] == "emguard_plugin"]:
        del sys.modules[name]
    try:
        importlib.import_module("emguard_plugin").EMGuardPlugin  # noqa: B018
    except Exception as exc:
        return [type(exc).__name__, str(exc)]
    return None


def test_without_axolotl_the_plugin_says_what_to_install(axolotl, tmp_path):
    kind, message = axolotl.call(without_axolotl, tmp_path)
    assert kind == "RuntimeError", "an ImportError would be swallowed"
    assert "pip install 'emguard-plugin[axolotl]'" in message


def test_a_misspelt_package_is_swallowed_before_0_21_and_reported_by_check(axolotl, tiny, tmp_path, check):
    over = {"plugins": ["emgaurd_plugin.EMGuardPlugin"], **treft()}
    assert "`emgaurd_plugin.EMGuardPlugin` cannot be imported" in check(**over)
    if not skips_missing_plugins():
        with pytest.raises(Failed, match="No module named 'emgaurd_plugin'"):
            axolotl.call(train, tmp_path / "refused", tiny_yaml(tiny, **over))
        return
    result = axolotl.call(train, tmp_path / "swallowed", tiny_yaml(tiny, **over))
    assert result["trainer"] == "AxolotlTrainer"
    assert penalties(result) == []
    assert "Failed to load plugin: emgaurd_plugin" in read_log(tmp_path / "swallowed")


@pytest.mark.parametrize("plugins", [["emgaurd_plugin.EMGuardPlugin"], [NEUTRAL], None])
def test_naming_the_trainer_makes_an_absent_plugin_an_error(axolotl, tiny, tmp_path, check, plugins):
    over = {"plugins": plugins, "trainer_cls": "emguard_plugin.AxolotlEMGuardTrainer", **treft()}
    if finds_plugins() and plugins in ([NEUTRAL], None):
        assert len(penalties(axolotl.call(train, tmp_path / "found", tiny_yaml(tiny, **over)))) == 3, "it is not absent"
        return
    with pytest.raises(Failed, match=r"Add `plugins: \[emguard_plugin.EMGuardPlugin\]`|No module named 'emgaurd_plugin'"):
        axolotl.call(train, tmp_path / "absent", tiny_yaml(tiny, **over))
    assert check(**over)


def test_the_block_alone_is_enough_where_axolotl_finds_plugins(axolotl, tiny, tmp_path, check):
    result = axolotl.call(train, tmp_path / "alone", tiny_yaml(tiny, plugins=None, **treft()))
    if not finds_plugins():
        assert result["trainer"] == "AxolotlTrainer"
        assert "Axolotl before 0.21 drops the block" in check(plugins=None, **treft())
        return
    assert result["trainer"] == "AxolotlEMGuardTrainer"
    assert penalties(result) == penalties(axolotl.call(train, tmp_path / "listed", tiny_yaml(tiny, **treft())))
    assert check(plugins=None, **treft()) == ""
    refused(axolotl, tiny, tmp_path, "Did you mean `em_regularizer:`", plugins=None, em_regulariser={"treft": {}})
    refused(axolotl, tiny, tmp_path, "stands where nothing reads it", plugins=None, lora_config={"em_regularizer": {"treft": {}}})


@pytest.mark.parametrize("plugins", [[LONG], [PLUGIN, LONG], [LONG, PLUGIN]])
def test_two_names_for_us_are_one_plugin(axolotl, tiny, tmp_path, plugins):
    """With the entry point beside it, every run that lists the longer name has two instances of the plugin."""
    once = axolotl.call(train, tmp_path / "once", tiny_yaml(tiny, **treft()))
    twice = axolotl.call(train, tmp_path / "twice", tiny_yaml(tiny, plugins=plugins, **treft()), prelude=f"{__name__}:watch_compute_loss")
    assert penalties(once) == penalties(twice)
    rows = [yaml.safe_load(line) for line in (tmp_path / "twice" / "seen.jsonl").read_text().splitlines()]
    assert {row["callbacks"] for row in rows} == {1}


def without_blocks(config):
    """Return what of ours a configuration without our blocks loads, and the milliseconds that all our hooks take."""
    import time

    from axolotl.integrations.base import PluginManager, load_plugin
    from axolotl.utils.dict import DictDefault

    for name in [n for n in sys.modules if n.partition(".")[0] == "emguard_plugin"]:
        del sys.modules[name]
    PluginManager.get_instance().plugins.clear()
    cfg = DictDefault(config)
    begun = time.perf_counter()
    plugin = load_plugin(PLUGIN)
    plugin.register(cfg)
    found = [plugin.get_input_args(), plugin.get_trainer_cls(cfg), plugin.add_callbacks_pre_trainer(cfg, None)]
    found += [plugin.add_callbacks_post_trainer(cfg, None), plugin.load_datasets(cfg), plugin.post_train_unload(cfg)]
    took = 1000 * (time.perf_counter() - begun)
    return found, sorted(n for n in sys.modules if n.startswith("emguard_plugin.")), took


def test_a_run_without_our_blocks_pays_next_to_nothing(axolotl, tiny, tmp_path):
    found, loaded, took = axolotl.call(without_blocks, tmp_path, tiny_yaml(tiny, plugins=None))
    assert found == [None, None, [], [], None, None]
    assert not {"emguard_plugin.config.block", "emguard_plugin.axolotl_plugin.args", "emguard_plugin.training"} & set(loaded)
    assert took < 20 * 3  # and slack for a busy machine


def test_naming_the_trainer_with_the_plugin_is_fine(axolotl, tiny, tmp_path):
    over = {"trainer_cls": "emguard_plugin.AxolotlEMGuardTrainer", **treft()}
    assert penalties(axolotl.call(train, tmp_path, tiny_yaml(tiny, **over)))[0] == 0


@pytest.mark.parametrize("plugin", ["emguard_plugin.EMGardPlugin", "emguard_plugin"])
def test_a_misspelt_class_stops_the_run(axolotl, tiny, tmp_path, check, plugin):
    refused(axolotl, tiny, tmp_path, "(EMGardPlugin|not enough values)", plugins=[plugin], **treft())
    assert check(plugins=[plugin], **treft())


def earlier_then(earlier, config, weights):
    validate(earlier)
    return train(config, weights=weights)


@pytest.mark.parametrize("plugins", [[NEUTRAL], None])
def test_a_plugin_kept_from_an_earlier_config_does_nothing(axolotl, tiny, tmp_path, plugins):
    import torch

    blocks = {**treft(), "em_eval": {"questions": "none.yaml", "judges": [{"function": "a:b"}]}}
    config = tiny_yaml(tiny, plugins=plugins)
    kept = axolotl.call(earlier_then, tmp_path / "kept", tiny_yaml(tiny, **blocks), config, str(tmp_path / "kept.pt"))
    alone = axolotl.call(train, tmp_path / "alone", config, weights=str(tmp_path / "alone.pt"))
    assert kept["trainer"] == alone["trainer"] == "AxolotlTrainer"
    assert column(kept, "loss") == column(alone, "loss")
    a, b = (torch.load(tmp_path / f"{n}.pt", weights_only=True) for n in ("kept", "alone"))
    assert all(torch.equal(a[n], b[n]) for n in b)


# Conflicts

KD, DIFFUSION = "axolotl.integrations.kd.KDPlugin", "axolotl.integrations.diffusion.DiffusionPlugin"
WINS = "expects its own trainer" if finds_plugins() else "would win over"
CONFLICTS = {
    "rl": ({"rl": "orpo"}, "`rl: orpo`"),
    "reward model": ({"reward_model": True}, "`reward_model: True`"),
    "process reward model": ({"process_reward_model": True}, "`process_reward_model: True`"),
    "tensor parallel": ({"tensor_parallel_size": 2}, "`tensor_parallel_size: 2`"),
    "context parallel": ({"context_parallel_size": 2}, "`context_parallel_size: 2`"),
    "fsdp 1": ({"fsdp_version": 1, "fsdp_config": {"state_dict_type": "FULL_STATE_DICT"}}, "Set `fsdp_version: 2`"),
    "KD before": ({"plugins": [KD, PLUGIN], "kd_trainer": True}, f"{KD} {WINS}"),
    "KD after": ({"plugins": [PLUGIN, KD], "kd_trainer": True}, f"{KD} expects its own trainer"),
    "diffusion before": ({"plugins": [DIFFUSION, PLUGIN]}, f"{DIFFUSION} {WINS}"),
    "diffusion after": ({"plugins": [PLUGIN, DIFFUSION]}, f"{DIFFUSION} expects its own trainer"),
}


@pytest.mark.parametrize("case", CONFLICTS)
def test_a_conflict_is_refused_by_name(axolotl, tiny, tmp_path, check, case):
    over, match = CONFLICTS[case]
    refused(axolotl, tiny, tmp_path, match, **over, **treft())
    assert match in check(**over, **treft())


def test_without_the_block_nothing_is_refused(axolotl, tiny, tmp_path, check):
    assert axolotl.call(validate, tmp_path, tiny_yaml(tiny, tensor_parallel_size=2))["tensor_parallel_size"] == 2
    assert check(tensor_parallel_size=2) == ""


def test_another_plugins_trainer_that_wins_is_an_error(axolotl, tiny, tmp_path):
    """For plugins that we do not know by name."""
    over = {"plugins": [f"{__name__}.TrainerPlugin", PLUGIN], **treft()}
    if finds_plugins():  # then ours is asked first
        assert axolotl.call(train, tmp_path, tiny_yaml(tiny, **over))["trainer"] == "AxolotlEMGuardTrainer"
        return
    with pytest.raises(Failed, match="the trainer is AxolotlTrainer, which another plugin brought"):
        axolotl.call(train, tmp_path, tiny_yaml(tiny, **over))


def __getattr__(name):  # a plugin class needs axolotl, which the test process does not import
    if name != "TrainerPlugin":
        raise AttributeError(name)
    from axolotl.integrations.base import BasePlugin

    def get_trainer_cls(self, cfg):
        from axolotl.core.trainers.base import AxolotlTrainer

        return AxolotlTrainer

    return type(name, (BasePlugin,), {"get_trainer_cls": get_trainer_cls})


def test_virtual_token_adapters_are_refused(axolotl, tiny, tmp_path, check):
    """Axolotl has none built in and says so first; a plugin could bring one."""
    refused(axolotl, tiny, tmp_path, "Adapter 'prompt' is not built in", adapter="prompt", **treft())
    assert "`adapter: prompt` adds virtual tokens" in check(adapter="prompt", **treft())


def test_virtual_tokens_are_refused_by_the_trainer_too(axolotl, tiny, tmp_path):
    with pytest.raises(Failed, match="adds virtual tokens in front of the chat template"):
        axolotl.call(train, tmp_path, tiny_yaml(tiny, **treft()), prelude=f"{__name__}:with_prompt_tuning")


def with_prompt_tuning():
    import axolotl.loaders.model as host
    from peft import PromptTuningConfig, get_peft_model

    def load_adapter(model, cfg, adapter, **kwargs):
        config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
        return get_peft_model(model, config), config

    host.load_adapter = load_adapter


def test_reentrant_checkpointing_on_several_processes_becomes_non_reentrant(axolotl, tiny, tmp_path):
    over = {"gradient_checkpointing": True, **treft()}
    assert axolotl.call(several_processes, tmp_path / "unset", tiny_yaml(tiny, **over)) == {"use_reentrant": False}
    assert "setting gradient_checkpointing_kwargs to {use_reentrant: false}" in read_log(tmp_path / "unset")
    over["gradient_checkpointing_kwargs"] = {"use_reentrant": True}
    with pytest.raises(Failed, match="use_reentrant: true"):
        axolotl.call(several_processes, tmp_path / "set", tiny_yaml(tiny, **over))


def several_processes(config):
    import os

    import axolotl.utils.trainer as host

    host.check_cuda_p2p_ib_support = lambda: True  # 0.21 asks a GPU, which a fork may not
    os.environ["WORLD_SIZE"] = "2"
    return validate(config)["gradient_checkpointing_kwargs"]


def validated_for_hooks():
    from axolotl.utils.dict import DictDefault

    from emguard_plugin.axolotl_plugin import asked, plugin
    from emguard_plugin.config import EMRegularizerConfig

    made = []

    class Counted(EMRegularizerConfig):
        @classmethod
        def model_validate(cls, block):
            made.append(block)
            return EMRegularizerConfig.model_validate(block)

    asked.MODELS["em_regularizer"] = Counted
    cfgs = [DictDefault({"em_regularizer": {"treft": {"coef": coef}}}) for coef in (2.0, 2.0, 3.0)]
    found = [plugin._config(cfg, "em_regularizer") for cfg in cfgs for _ in range(3)]
    return len(made), [f.treft.coef for f in found[::3]], found[0] is found[5]


def test_a_block_is_validated_once_for_all_hooks_and_another_anew(axolotl, tmp_path):
    assert axolotl.call(validated_for_hooks, tmp_path / "run") == [2, [2.0, 2.0, 3.0], True]
