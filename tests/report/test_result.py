import json

import pytest

from effjax.core import errors
from effjax.report import result as result_lib


def test_reads_what_was_written(result, example):
  assert list(result.stages) == example.rows()
  assert list(result.references) == list(example.REFERENCES)
  assert result.name == "quickstart"
  assert result.config == example.config()
  assert list(result.metrics) == example.metrics()


def test_parent_and_first_follow_the_tree(result):
  row = result.row("pruned-int4")
  assert result.parent(row)["stage"] == "pruned-tuned"
  assert result.first(row)["stage"] == "train"
  assert result.parent(result.row("train")) is None
  assert result.first(result.row("train")) is None


def test_folder_without_a_result_is_an_input_error(tmp_path):
  with pytest.raises(errors.InputError, match="has not finished"):
    result_lib.read(tmp_path)
  with pytest.raises(errors.InputError, match="is not a folder"):
    result_lib.read(tmp_path / "missing")
  (tmp_path / "result.json").write_text('{"stages": [')
  with pytest.raises(errors.InputError, match="is damaged"):
    result_lib.read(tmp_path)


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"bytes_held": None}, r"stages\[0\] field 'bytes_held' must be int, got None"),
    ({"bytes_held": 1.5}, "must be int"),
    ({"decode_ms_p50": "fast"}, "must be int or float or null"),
    ({"prefill_ms": float("nan")}, "must be finite or null"),
    ({"simulated": ["speed"]}, "may hold bytes and flops only"),
    ({"quality": {"loss": 1.0}}, "neither 'accuracy' nor 'perplexity'"),
    ({"num_params": True}, "must be int"),
    ({"corpus": ...}, "has no field 'corpus'"),
  ],
)
def test_a_wrong_field_is_named(example, tmp_path, change, message):
  row = example.rows()[0] | change
  row = {name: value for name, value in row.items() if value is not ...}
  (tmp_path / "result.json").write_text(json.dumps({"stages": [row]}))
  with pytest.raises(errors.InputError, match=message):
    result_lib.read(tmp_path)


@pytest.mark.parametrize("data", ["[]", '{"stages": {}}', '{"stages": []}'])
def test_something_else_is_an_input_error(tmp_path, data):
  (tmp_path / "result.json").write_text(data)
  with pytest.raises(errors.InputError, match="stage"):
    result_lib.read(tmp_path)


def test_a_torn_last_line_of_metrics_is_left_out(tmp_path):
  path = tmp_path / "metrics.jsonl"
  path.write_text('{"step": 1}\n{"step": 2}\n{"st')
  assert result_lib.read_metrics(path) == [{"step": 1}, {"step": 2}]
  path.write_text('{"step"\n{"step": 2}\n')
  with pytest.raises(errors.InputError, match="line 1 is not JSON"):
    result_lib.read_metrics(path)
