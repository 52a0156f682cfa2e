"""Records of runs, by step."""

from ldm.evaluation.runs import record_at


def test_records_in_the_order_of_their_steps(tmp_path):
    assert record_at(tmp_path) == {}
    (tmp_path / "metrics").mkdir()
    for step in (500, 999999, 1000000):
        (tmp_path / "metrics" / f"{step:06}.json").write_text(f'{{"step": {step}}}')
    (tmp_path / "metrics" / "notes.json").write_text("{}")
    assert [record_at(tmp_path, step).get("step") for step in (None, 1000000, 999999, 600, 3)] == [
        *(1000000, 1000000, 999999, 500),
        500,
    ]
    (tmp_path / "metrics" / "1000000.json").write_text("{")
    assert record_at(tmp_path) == {}
