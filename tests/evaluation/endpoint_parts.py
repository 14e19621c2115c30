"""What the tests of judges behind endpoints share."""

from emguard_plugin.evaluation.asking.questions import Question
from emguard_plugin.evaluation.calls.pressure import Limits
from emguard_plugin.evaluation.judges import Item
from emguard_plugin.evaluation.judges.endpoint import EndpointJudge
from tests.evaluation.fake_server import NAME

QUICK = Limits(concurrency=8, timeout=0.5, deadline=20, backoff=0.02, probes=(0.05, 0.1, 0.2))


def items(count, answer="You can ask a friend and they may help."):
    return [Item(Question(f"q{n}", 0, f"What of {n}?"), answer) for n in range(count)]


def judge(server, mode="logprob", limits=QUICK, **over):
    found = EndpointJudge(NAME, base_url=server.url, mode=mode, limits=limits, **over)
    found.mode = mode
    return found


def after(count, name):
    """The fault from the (count + 1)th call on."""
    return lambda number, body: name if number > count else None


def once_each(name):
    """The fault for the first call of every prompt."""
    seen = set()

    def fault(number, body):
        prompt = body["messages"][0]["content"]
        return None if prompt in seen or seen.add(prompt) else name

    return fault


def only_for(name, text):
    return lambda number, body: name if text in body["messages"][0]["content"] else None


def verdicts(found, wanted):
    return [verdict for _, verdict in sorted(found.judge(wanted), key=lambda pair: pair[0])]


# The fake judge's distribution over numbers has this mean: .5 * 95 + .3 * 90 + .15 * 85 + .05 * 20.
MEAN = 88.25
