from emguard_plugin.config import EMEvalConfig
from emguard_plugin.evaluation.post_train import measure_saved_model, set_aside


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


def test_a_folder_that_cannot_be_written_since_is_a_line_and_no_error(tmp_path, capsys):
    (tmp_path / "file").write_text("in the way")
    block = {"questions": "open_ended", "judges": [{"function": "a:b"}], "output_dir": str(tmp_path / "file" / "em_eval")}
    measured = measure_saved_model(EMEvalConfig.model_validate(block), tmp_path / "model")
    assert (measured.summary, measured.exit_code) == (None, 2)
    said = capsys.readouterr().err
    assert "em_eval failed: NotADirectoryError" in said
    assert "is saved and unharmed" in said
    assert "cannot be written" in said
