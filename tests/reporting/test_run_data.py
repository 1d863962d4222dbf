"""What the page must warn about."""

from reporting.run_data import warnings_of


def results(**full_precision: object) -> dict:
    return {"layers": [], "model_layers": 0, "full_precision": full_precision}


def test_a_full_precision_model_that_is_lost_without_bos_is_told_of(tmp_path):
    checks = {"lost": {"warning": "lost: without BOS"}, "well": {"warning": None}}
    assert warnings_of(tmp_path, results(bos_check=checks)) == ["lost: without BOS."]


def test_results_without_such_a_check_have_nothing_to_warn_of(tmp_path):
    assert warnings_of(tmp_path, results()) == warnings_of(tmp_path, {"layers": []}) == []
