"""The judge phase as a whole: a policy on this machine, a judge behind a real server, files, keys and crashes."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest

from emguard_plugin.config import EMEvalConfig
from emguard_plugin.evaluation import Summary, judging, run_em_eval
from emguard_plugin.evaluation.judges import self_test
from emguard_plugin.files import seal_of
from emguard_plugin.files.result_folder import JsonLines
from tests.evaluation.fake_server import FakeServer
from tests.evaluation.judging_parts import (
    ANSWERS,
    CALLS,
    PROBE,
    SELF_TEST,
    endpoint,
    graded,
    judging_judges,
    resealed,
    rows,
)


def test_a_judge_behind_a_server_is_probed_tested_and_stored_with_its_mode(evaluate, answered):
    with FakeServer(reply=graded) as server:
        summary = evaluate(endpoint(server))
        assert server.calls == PROBE + SELF_TEST + CALLS
    assert summary.judges[0].stopped is None
    assert summary.rates().unscored.value == 0
    assert summary.protocol["judges"][0]["found"]["mode"] == "logprob"
    known = json.loads((answered / judging.JUDGES).read_text())["fake-judge"]
    assert known["served"] == {"models": ["fake-judge"], "system_fingerprints": ["fp_1"]}
    assert known["self_test"]["wrong"] == []
    assert len(rows(answered)) == ANSWERS


def test_another_mode_is_another_fingerprint(evaluate, answered):
    prints = set()
    for tokens in ("numbers", "digits"):
        with FakeServer(reply=graded, tokens=tokens, port=0) as server:
            found = evaluate(endpoint(server, name="j"))
        prints.add(json.dumps([judge.get("found") for judge in found.protocol["judges"]]))
        (answered / "judgments.jsonl").unlink()
        (answered / judging.JUDGES).unlink()
    assert len(prints) == 2


def test_a_finished_run_makes_no_call_and_takes_no_time(evaluate, answered):
    with FakeServer(reply=graded) as server:
        first = evaluate(endpoint(server))
        before, begun = server.calls, time.perf_counter()
        assert evaluate(endpoint(server)) == first
        assert time.perf_counter() - begun < 2
        assert server.calls == before


def test_a_judge_that_dies_leaves_the_rest_unjudged_and_the_next_run_judges_only_that(evaluate, answered, caplog):
    with FakeServer(reply=graded) as server:
        whole = evaluate(endpoint(server))
    (answered / "judgments.jsonl").unlink()
    with FakeServer(lambda number, body: "404" if number > 40 else None, reply=graded, port=server.port) as dying:
        torn = evaluate(endpoint(dying))
    kept = rows(answered)
    assert 10 < len(kept) <= 20
    assert "HTTP 404" in torn.judges[0].stopped
    assert torn.rates().unscored.count > 0
    assert any(reason.startswith("not judged: ") for reason in torn.rates().unscored_reasons)
    assert "Run the same command again" in caplog.text
    with FakeServer(reply=graded, port=server.port) as back:
        again = evaluate(endpoint(back))
        # Neither probed nor tested anew, and nothing judged twice.
        assert back.calls == CALLS - 2 * len(kept)
    assert again.model_dump() == whole.model_dump()
    assert rows(answered)[: len(kept)] == kept


def test_a_process_killed_while_it_judges_loses_only_what_was_not_written(evaluate, answered, make_config, checkpoints):
    with FakeServer(reply=graded, latency=0.2) as server:
        config = make_config(judges=[endpoint(server, concurrency=2)])
        known = {"identity": judging_judges(config)[0].identity()}
        known |= {"found": {"mode": "logprob", "dialect": {"top_logprobs": 20, "reasoning": False, "dropped": []}}}
        known["self_test"] = {"items_sha256": self_test.sha256(), "wrong": [], "said": {}}
        (answered / judging.JUDGES).write_text(json.dumps({"fake-judge": known}))
        code = (
            "import sys, json\nfrom emguard_plugin.config import EMEvalConfig\n"
            "from emguard_plugin.evaluation import run_em_eval\n"
            "from emguard_plugin.evaluation import judging\njudging.SECONDS = 0.3\n"
            "run_em_eval(EMEvalConfig(**json.loads(sys.argv[1])), sys.argv[2], sys.argv[3], phases=('judge',))"
        )
        arguments = [json.dumps(config.model_dump(exclude_unset=True)), str(checkpoints / "adapter"), str(answered)]
        process = subprocess.Popen([sys.executable, "-c", code, *arguments], stderr=subprocess.DEVNULL)
        while process.poll() is None and not (answered / "judgments.jsonl").exists():
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        kept = len(rows(answered))
        assert 0 < kept < ANSWERS
        server.latency, before = 0.0, server.calls
        summary = run_em_eval(config, checkpoints / "adapter", answered)
        assert server.calls - before == CALLS - 2 * kept
    assert summary.rates().unscored.value == 0


def test_a_judge_that_fails_the_self_test_judges_nothing_and_gives_no_rate(evaluate, answered):
    with FakeServer(reply=lambda prompt: {"73": 1.0} if "73" in prompt else {"7": 1.0}) as server:
        summary = evaluate(endpoint(server, mode="sampled", samples=1))
    assert "failed the self-test" in summary.judges[0].stopped
    assert not (answered / "judgments.jsonl").exists()
    assert summary.metrics() == {"eval_em_unscored_rate": 1.0}
    assert "There is no EM rate" in (answered / "report.html").read_text()


def test_no_answer_is_drawn_when_no_judge_works(evaluate, answered):
    (answered / "responses.jsonl").unlink()
    with FakeServer(lambda number, body: "401") as dead, FakeServer(reply=graded) as server:
        with pytest.raises(RuntimeError, match="no answer was drawn"):
            evaluate(endpoint(dead))
        assert not (answered / "responses.jsonl").exists()
        assert evaluate(endpoint(dead, name="dead"), endpoint(server, name="alive")).rates(judge="alive").em_all.n > 0


def test_one_judge_that_stops_does_not_stop_the_other(evaluate):
    with FakeServer(lambda number, body: "401") as dead, FakeServer(reply=graded) as server:
        summary = evaluate(endpoint(dead, name="dead"), endpoint(server, name="alive"))
    assert [bool(result.stopped) for result in summary.judges] == [True, False]
    assert summary.rates(judge="alive").unscored.value == 0


@pytest.mark.parametrize(("fault", "again"), [("filter", 0), ("500", ANSWERS)])
def test_what_the_judge_refused_stays_and_what_failed_on_the_way_is_tried_again(evaluate, answered, fault, again, monkeypatch):
    with FakeServer(reply=graded) as server:
        evaluate(endpoint(server, mode="logprob"))
    status = {"filter": "judge_refused", "500": "unscored"}[fault]
    lost = [{**row, "status": status, "aligned": None, "coherent": None, "detail": "x"} for row in rows(answered)]
    (answered / "judgments.jsonl").unlink()
    JsonLines(answered / "judgments.jsonl").append(resealed(answered, lost))
    with FakeServer(reply=graded, port=server.port) as second:
        summary = evaluate(endpoint(second, mode="logprob"))
        assert second.calls == 2 * again
    assert summary.rates().unscored.value == (0 if again else 1)


def test_a_mock_is_marked_everywhere_and_yields_no_metric_and_no_pass(evaluate, answered):
    summary = evaluate({"provider": "mock"}, fail_above=0.99)
    assert summary.metrics() == {}
    assert summary.judges[0].measured is False
    assert summary.judges[0].verdict.outcome == "inconclusive"
    assert "MOCK, NOT A MEASUREMENT" in (answered / "report.html").read_text()
    assert summary.protocol["judges"][0]["not_a_measurement"] is True


def test_a_replay_gives_the_rates_of_the_judge_it_repeats_without_a_call(evaluate, answered, tmp_path):
    with FakeServer(reply=graded) as server:
        first = evaluate(endpoint(server))
    file = shutil.move(answered / "judgments.jsonl", tmp_path / "old.jsonl")
    again = evaluate({"provider": "replay", "file": str(file)})
    assert again.judges[0].name == "replay of fake-judge"
    assert again.judges[0].rates == first.judges[0].rates
    mock = tmp_path / "mock.jsonl"
    renamed = [{**row, "judge": "MOCK, NOT A MEASUREMENT"} for row in JsonLines(file).read()]
    JsonLines(mock).append(renamed)
    with pytest.raises(ValueError, match="48 judgments were changed since they were written"):
        evaluate({"provider": "replay", "file": str(mock)})
    mock.unlink()
    JsonLines(mock).append({**row, "seal": seal_of(row)} for row in renamed)
    (answered / "judgments.jsonl").unlink()
    assert evaluate({"provider": "replay", "file": str(mock)}).metrics() == {}


def test_a_replay_without_judgments_or_of_several_judges_is_refused(tmp_path):
    def config(**over):
        return EMEvalConfig(questions="q.yaml", judges=[{"provider": "replay", "file": str(tmp_path / "j.jsonl"), **over}])

    with pytest.raises(ValueError, match="does not exist"):
        judging_judges(config())
    row = {"status": "scored", "item_sha256": "x", "aligned": 1, "coherent": 1, "detail": ""}
    JsonLines(tmp_path / "j.jsonl").append([{**row, "judge": "a"}, {**row, "judge": "b"}])
    with pytest.raises(ValueError, match=r"judgments of a, b.*`judge:`"):
        judging_judges(config())
    with pytest.raises(ValueError, match="no judgment of c"):
        judging_judges(config(judge="c"))
    assert judging_judges(config(judge="a"))[0].name == "replay of a"


def test_a_full_disk_is_a_clear_error_and_loses_nothing_that_was_written(evaluate, answered, make_config, checkpoints):
    code = (
        "import json, resource, signal, sys\n"
        "from emguard_plugin.config import EMEvalConfig\nfrom emguard_plugin.evaluation import judging, run_em_eval\n"
        "judging.RECORDS = 8\n"
        "import tqdm.auto\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (8000, resource.RLIM_INFINITY))\n"
        "run_em_eval(EMEvalConfig(**json.loads(sys.argv[1])), sys.argv[2], sys.argv[3], phases=('judge',))"
    )
    config = make_config()
    arguments = [json.dumps(config.model_dump(exclude_unset=True)), str(checkpoints / "adapter"), str(answered)]
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, env=environment)
    assert done.returncode == 1
    assert "File too large" in done.stderr
    kept = rows(answered)
    assert 8 <= len(kept) < ANSWERS
    summary = run_em_eval(config, checkpoints / "adapter", answered)
    assert rows(answered)[: len(kept)] == kept
    assert summary.rates().unscored.value == 0


def test_a_summary_with_a_stopped_judge_is_read_back(evaluate, answered):
    with FakeServer(lambda number, body: "404") as server:
        summary = evaluate(endpoint(server))
    assert Summary.load(answered).judges[0].stopped == summary.judges[0].stopped
