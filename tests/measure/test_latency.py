import pytest

from effjax.core import errors
from effjax.measure import config as config_lib
from effjax.measure import latency


def test_percentiles_and_rate():
  steps = [1_000_000 * ms for ms in (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 55)]
  found = latency.summarize([3_000_000, 9_000_000, 4_000_000], steps, batch=2)
  assert found.prefill_ms == 4
  assert found.decode_ms_p50 == 6
  assert found.decode_ms_p90 == 10
  assert found.tokens_per_sec == pytest.approx(2 * 11 / 0.110)


def _config(warmup):
  # Always 15 tokens, so that prefill and step are compiled once.
  return config_lib.MeasureConfig(
    prompt_tokens=8, decode_tokens=7 - warmup, warmup_tokens=warmup, prefill_repeats=3
  )


@pytest.mark.parametrize("warmup", [0, 2])
def test_only_the_steps_after_warm_up_are_counted(model, params, monkeypatch, warmup):
  config = _config(warmup)
  seen = []
  summarize = latency.summarize
  monkeypatch.setattr(
    latency, "summarize", lambda *args: (seen.append(args), summarize(*args))[1]
  )
  found = latency.measure(model, params, config)
  ((prefill_ns, decode_ns, batch),) = seen
  assert (len(prefill_ns), len(decode_ns), batch) == (3, 7 - warmup, 1)
  assert 0 < found.decode_ms_p50 <= found.decode_ms_p90
  assert found.prefill_ms > 0 and found.tokens_per_sec > 0


def test_the_state_holds_prompt_and_steps(model, params, monkeypatch):
  config = _config(2)
  lengths = []
  step = latency.engine.Decoding.step

  def watched(self, token_B, state):
    logits, state = step(self, token_B, state)
    lengths.append(int(state["length_B"][0]))
    return logits, state

  monkeypatch.setattr(latency.engine.Decoding, "step", watched)
  latency.measure(model, params, config)
  assert lengths == list(range(9, 16))


def test_longer_than_the_model_is_an_input_error(model, params):
  with pytest.raises(errors.InputError, match="200 tokens"):
    latency.measure(model, params, config_lib.MeasureConfig())


def test_config_checks_its_ranges():
  with pytest.raises(errors.InputError, match="decode_tokens must be at least 1"):
    config_lib.MeasureConfig(decode_tokens=0)
  with pytest.raises(errors.InputError, match="xz_preset"):
    config_lib.MeasureConfig(xz_preset=11)
  with pytest.raises(errors.InputError, match="warmup_tokens"):
    config_lib.MeasureConfig(warmup_tokens=-1)
