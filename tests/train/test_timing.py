"""The stopwatch, with a clock that a test turns."""

from effjax.train import timing


class Clock:
  """Seconds that pass when told."""

  def __init__(self):
    self.now = 100.0

  def __call__(self):
    return self.now

  def tick(self, chrono, step, secs, tokens=10.0):
    self.now += secs
    chrono.tick(step, tokens)


def test_warm_up_and_pauses_are_left_out():
  clock = Clock()
  chrono = timing.Chrono(num_steps=10, clock=clock)
  clock.tick(chrono, 1, 50)
  clock.tick(chrono, 2, 5)
  assert chrono.take_rate() is None and chrono.eta_secs() is None
  clock.tick(chrono, 3, 2)
  clock.now += 1
  with chrono.paused():
    clock.now += 1000
  clock.tick(chrono, 4, 1)
  assert chrono.take_rate() == 20 / 4
  assert chrono.take_rate() is None
  assert chrono.eta_secs() == 6 * 2
  assert chrono.wall_secs == 50 + 5 + 4 + 1000


def test_totals_outlive_a_restart():
  clock = Clock()
  chrono = timing.Chrono(num_steps=10, clock=clock)
  for step in range(1, 5):
    clock.tick(chrono, step, 3)
  saved = chrono.state()
  again = timing.Chrono(num_steps=10, step=4, clock=clock)
  again.restore(saved)
  assert again.wall_secs == 12 and again.eta_secs() == 18
  # Compilation after the restart counts as time, not as speed.
  clock.tick(again, 5, 60)
  clock.tick(again, 6, 3)
  assert again.wall_secs == 75 and again.eta_secs() == 12
