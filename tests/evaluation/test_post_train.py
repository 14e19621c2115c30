from emguard_plugin.evaluation.post_train import set_aside


def test_results_of_an_earlier_run_are_set_aside(tmp_path):
    out = tmp_path / "em_eval"
    assert set_aside(out) is None
    for n in (1, 2):
        out.mkdir()
        assert set_aside(out) is None, "nothing in it yet"
        (out / "protocol.json").write_text(str(n))
        assert set_aside(out) == tmp_path / f"em_eval.{n}"
        assert not out.exists()
    assert (tmp_path / "em_eval.1" / "protocol.json").read_text() == "1"
