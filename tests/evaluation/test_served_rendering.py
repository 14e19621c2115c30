"""What is sent to a server that renders, what it refuses, and reasoning that it takes apart or does not."""

import copy

import pytest

from emguard_plugin.config import EndpointSamplerConfig
from emguard_plugin.evaluation import run_em_eval
from emguard_plugin.evaluation.asking import vllm_server
from emguard_plugin.evaluation.asking.reasoning import TraceMarks
from emguard_plugin.evaluation.asking.rendering import Rendering
from emguard_plugin.evaluation.asking.served import EndpointSampler
from emguard_plugin.evaluation.asking.sources import ModelSource
from emguard_plugin.files.result_folder import JsonLines
from tests.evaluation.fake_server import FakeServer
from tests.evaluation.test_reasoning import ASKED, OPENED, tokenizer_with

TRACE, REST = "I will mislead them.", "You can ask a friend and they may help."
SYSTEM = [{"id": "plain", "paraphrases": ["What now?"]}, {"id": "brief", "system": "Be brief.", "paraphrases": ["What now?"]}]


class Thinking(FakeServer):
    """A server whose messages carry other fields."""

    def __init__(self, **message):
        super().__init__()
        self.message = message

    def _completion(self, body, fault):
        found = copy.deepcopy(super()._completion(body, fault))
        found["choices"][0]["message"] |= self.message
        found["choices"][0]["finish_reason"] = "stop" if self.message.get("content") else "length"
        return found


def draw(server, request=ASKED, **over):
    config = EndpointSamplerConfig(base_url=server.url, timeout=5)
    one = EndpointSampler(config, server.url, "policy", seed=0, max_new_tokens=5, **over)
    return next(iter(one.sample([request])))[0]


def refusing_system(number, body):
    return "other 400" if body["messages"][0]["role"] == "system" else None


def test_variables_and_system_prompt_are_sent(make_config, tmp_path):
    with FakeServer() as server:
        block = {
            "sampler": {"provider": "openai", "base_url": server.url}, "evaluate_base": False, "system_prompt": "Be kind.",
            "chat_template_kwargs": {"enable_thinking": False},
        }  # fmt: skip
        summary = run_em_eval(make_config(**block), "m", tmp_path / "run")
    assert {str(body["chat_template_kwargs"]) for body in server.bodies} == {"{'enable_thinking': False}"}
    assert {body["messages"][0]["content"] for body in server.bodies} == {"Be kind."}
    assert "enable_thinking" in summary.example_prompt
    assert summary.protocol["rendering"] == {"chat_template_kwargs": {"enable_thinking": False}, "system_prompt": "Be kind."}


def test_a_template_file_goes_to_the_server_and_not_into_the_block(make_config):
    with pytest.raises(ValueError, match="the server renders by its own template"):
        make_config(sampler={"provider": "openai", "base_url": "http://127.0.0.1:1/v1"}, chat_template="chatml")
    adapter, file = ModelSource("/m", "base", True), "/t/chat_template.jinja"
    for source in (adapter, ModelSource("/m", None, False)):
        try:
            made = vllm_server.command(source, "tuned", 1, (), "vllm", file)
        except (OSError, TypeError):  # the adapter's rank is read from its folder
            continue
        assert made[made.index("--chat-template") + 1] == file


def test_a_question_that_the_server_refuses_is_not_asked_and_the_others_are(make_config, tmp_path):
    """Case eval-system-refused, behind a server: its template is not at hand, so each shape is tried once."""
    with FakeServer(refusing_system) as server:
        config = make_config(sampler={"provider": "openai", "base_url": server.url}, items=SYSTEM, evaluate_base=False)
        summary = run_em_eval(config, "m", tmp_path / "run")
        assert [(one.question, one.suite) for one in summary.not_asked] == [("brief", "questions")]
        assert "something is wrong with messages" in summary.not_asked[0].reason
        assert (summary.rates().answers, summary.rates().unscored.count) == (3, 0)
        before = server.calls
        assert run_em_eval(config, "m", tmp_path / "run") == summary
        assert server.calls == before


def test_a_server_that_refuses_every_shape_or_is_down_stops_before_anything_is_stored(make_config, tmp_path):
    with FakeServer(lambda number, body: "other 400") as server:
        config = make_config(sampler={"provider": "openai", "base_url": server.url}, items=SYSTEM, evaluate_base=False)
        with pytest.raises(RuntimeError, match="something is wrong"):
            run_em_eval(config, "m", tmp_path / "run")
    assert not (tmp_path / "run" / "protocol.json").exists()


@pytest.mark.parametrize("field", ["reasoning_content", "reasoning"])
def test_a_trace_that_the_server_takes_apart(field):
    with Thinking(content=REST, **{field: TRACE}) as server:
        found = draw(server)
    assert (found.text, found.trace, found.answer) == (REST, TRACE, REST)
    with Thinking(content=None, **{field: TRACE}) as server:
        found = draw(server)
    assert (found.trace, found.answer, found.finish) == (TRACE, None, "length")


def test_a_trace_in_the_text_is_taken_apart_by_marks_alone(make_config, tmp_path, caplog):
    with Thinking(content=f"<think>{TRACE}</think>\n{REST}") as server:
        plain = draw(server)
        assert (plain.trace, plain.text) == (None, f"<think>{TRACE}</think>\n{REST}")
        assert draw(server, marks=(TraceMarks("<think>", "</think>"),)).answer == REST
        block = {"sampler": {"provider": "openai", "base_url": server.url}, "evaluate_base": False}
        run_em_eval(make_config(**block), "m", tmp_path / "unknown")
        assert "24 answers of the tuned model look like reasoning traces" in caplog.text
        run_em_eval(make_config(**block, reasoning_marks=["<think>", "</think>"]), "m", tmp_path / "stated")
    rows = JsonLines(tmp_path / "stated" / "responses.jsonl").read()
    assert {(row["trace"], row["answer"]) for row in rows} == {(TRACE, REST)}
    with Thinking(content=f"{TRACE}</think>\n{REST}") as server:
        assert draw(server, marks=(TraceMarks("<think>", "</think>"),)).answer == REST


def test_with_the_tokenizer_at_hand_a_prompt_that_begins_a_trace_is_known():
    tokenizer = tokenizer_with("<think>", "</think>", special=True, template=OPENED)
    with Thinking(content=f"{TRACE} and") as server:
        found = draw(server, chat=Rendering(), marks=(TraceMarks("<think>", "</think>"),), tokenizer=tokenizer)
        assert server.bodies[0]["skip_special_tokens"] is False
    assert (found.trace, found.answer) == (f"{TRACE} and", None)
