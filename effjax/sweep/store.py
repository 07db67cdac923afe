"""Which trial is whose: an Optuna study that any number of workers share.

Each point of a sweep has a number, which names its run folder, and a trial that is
WAITING until a worker claims it. While it runs, its worker sends heartbeats; when they
stop, the trial is failed and a new one of the same number waits in its place. So a
killed worker's run is taken over where it stood.

Optuna reads a trial's state before it writes it, and SQLite does not keep others out in
between. So every change of state happens under a file lock in the sweep's folder, which
workers share anyway: the run folders are in it.
"""

import contextlib
import dataclasses
import fcntl
import pathlib
import threading
import warnings
from collections.abc import Iterator, Mapping, Sequence

import optuna
import sqlalchemy
from optuna import exceptions as optuna_exceptions
from optuna import storages
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy import exc as sqlalchemy_exc

from effjax.core import config as core_config
from effjax.core import errors
from effjax.sweep import search as search_lib

HEARTBEAT_SECS = 30
# Heartbeats that may fail to come before a worker counts as dead.
_MISSED = 4
# Seconds SQLite waits for another process that writes.
_SQLITE_TIMEOUT = 60
DIVERGED = "diverged"
_BROKEN = (
  sqlalchemy_exc.SQLAlchemyError,
  optuna_exceptions.StorageInternalError,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trial:
  """A claimed point: its number, its values, and the trial's key in the storage."""

  number: int
  point: Mapping[str, str]
  key: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class State:
  """How far the points of this worker are.

  Attributes:
    numbers: those there are.
    open: those that wait or run.
    num_missing: how many more a search has yet to choose.
    failed: those that have no result, with the reason.
  """

  numbers: tuple[int, ...]
  open: tuple[int, ...]
  num_missing: int
  failed: Mapping[int, str]


class Store:
  """The study of one sweep, as one worker sees it.

  Args:
    root: the sweep's folder, made if it does not exist; names the study.
    url: of a database; `sqlite:///<root>/sweep.db` if None.
    heartbeat_secs: between two signs of life.

  Raises:
    InputError: the database cannot be reached.
  """

  def __init__(
    self,
    root: pathlib.Path,
    url: str | None = None,
    heartbeat_secs: int = HEARTBEAT_SECS,
  ):
    if url is not None:
      _try(url)
    root.mkdir(parents=True, exist_ok=True)
    self._root, self._heartbeat_secs = root.resolve(), heartbeat_secs
    self._points: list[Mapping[str, str]] = []
    self._search: search_lib.Search | None = None
    url = url or f"sqlite:///{self._root / 'sweep.db'}"
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    with self._locked(), _reaching(url), _quiet():
      self._storage = storages.RDBStorage(
        url,
        engine_kwargs=_engine_options(url),
        heartbeat_interval=heartbeat_secs,
        grace_period=_MISSED * heartbeat_secs,
        heartbeat_stale_trial_callback=_wait_again,
      )
      self._study = optuna.create_study(
        storage=self._storage, study_name=self._root.name, load_if_exists=True
      )
      self._id = self._storage.get_study_id_from_name(self._root.name)

  def join(
    self,
    about: Mapping[str, object],
    points: Sequence[Mapping[str, str]] = (),
    search: search_lib.Search | None = None,
  ) -> None:
    """Adds the points that are not there yet; those that crashed wait again.

    Args:
      about: what all points share, plain JSON, the same for every worker.
      points: what this worker runs.
      search: what chooses points, where they are not given; `claim` asks it.

    Raises:
      InputError: the study is one of something else.
    """
    with self._locked():
      old = self._study.user_attrs.get("about")
      differences = [] if old is None else core_config.differences(old, about, "sweep")
      if differences:
        raise errors.InputError(
          f"{self._root} is a sweep of something else: {'; '.join(differences)}; "
          "choose another --workdir"
        )
      self._study.set_user_attr("about", about)
      latest = self._latest()
      known = [trial.user_attrs["point"] for trial in latest.values()]
      missing = [dict(point) for point in points if dict(point) not in known]
      for number, point in enumerate(missing, start=len(known)):
        _add(self._study, {"number": number, "point": point})
      self._points = [dict(point) for point in points]
      self._search = search
      for trial in self._own():
        failed = trial.state == TrialState.FAIL
        if failed and trial.user_attrs["reason"] != DIVERGED:
          _wait_again(self._study, trial)

  def points(self) -> dict[int, Mapping[str, str]]:
    """Every point of the study, by number."""
    with self._locked():
      return {n: t.user_attrs["point"] for n, t in self._latest().items()}

  def claim(self) -> Trial | None:
    """A point to run, now this worker's; None if none waits."""
    with self._locked():
      with _quiet():
        storages.fail_stale_trials(self._study)
      waiting = [t for t in self._own() if t.state == TrialState.WAITING]
      if not waiting and self._num_missing():
        self._ask()
        waiting = [t for t in self._own() if t.state == TrialState.WAITING]
      if not waiting:
        return None
      trial = min(waiting, key=lambda t: t.user_attrs["number"])
      key = self._key(trial.number)
      # First the sign of life: a worker that dies in between leaves a waiting trial.
      self._storage.record_heartbeat(key)
      self._storage.set_trial_state_values(key, TrialState.RUNNING)
      attrs = trial.user_attrs
      return Trial(number=attrs["number"], point=attrs["point"], key=key)

  def _num_missing(self) -> int:
    """Points a search has yet to choose."""
    if self._search is None:
      return 0
    return max(self._search.num_trials - len(self._latest()), 0)

  def _ask(self) -> None:
    """Adds a waiting trial at a point that the search chooses."""
    number = len(self._latest())
    with _quiet():
      asked, point = self._search.ask(self._study, number)
    # Asked trials run at once; here all of them wait first, as those of a grid do.
    asked.set_user_attr("point", point)
    asked.set_user_attr("number", number)
    self._storage.set_trial_state_values(self._key(asked.number), TrialState.WAITING)

  def _key(self, trial_number: int) -> int:
    """The storage's key of one of Optuna's numbers."""
    return self._storage.get_trial_id_from_study_id_trial_number(self._id, trial_number)

  @contextlib.contextmanager
  def alive(self, trial: Trial) -> Iterator[None]:
    """Sends heartbeats of a claimed trial from a thread of its own."""
    stop = threading.Event()

    def beat() -> None:
      while not stop.wait(self._heartbeat_secs):
        # A store that does not answer now may answer at the next beat.
        with contextlib.suppress(*_BROKEN):
          self._storage.record_heartbeat(trial.key)

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
      yield
    finally:
      stop.set()
      thread.join()

  def finish(self, trial: Trial, loss: float) -> bool:
    """Says that a trial has its result; False if it was taken over meanwhile."""
    return self._end(trial, TrialState.COMPLETE, [loss])

  def fail(self, trial: Trial, reason: str) -> bool:
    """Says that a trial has no result; False if it was taken over meanwhile."""
    return self._end(trial, TrialState.FAIL, reason=reason)

  def release(self, trial: Trial) -> bool:
    """Gives a trial back, to be resumed; False if it was taken over meanwhile."""
    return self._end(trial, TrialState.WAITING)

  def state(self) -> State:
    """How far this worker's points are."""
    with self._locked():
      own, missing = self._own(), self._num_missing()
    number = lambda trial: trial.user_attrs["number"]
    return State(
      numbers=tuple(map(number, own)),
      open=tuple(number(t) for t in own if not t.state.is_finished()),
      num_missing=missing,
      failed={
        number(t): t.user_attrs["reason"] for t in own if t.state == TrialState.FAIL
      },
    )

  def _end(
    self,
    trial: Trial,
    state: TrialState,
    values: Sequence[float] | None = None,
    reason: str | None = None,
  ) -> bool:
    with self._locked():
      if self._storage.get_trial(trial.key).state != TrialState.RUNNING:
        return False
      if reason is not None:
        self._storage.set_trial_user_attr(trial.key, "reason", reason)
      return self._storage.set_trial_state_values(trial.key, state, values)

  def _latest(self) -> dict[int, FrozenTrial]:
    """The last trial of each number, in the order of numbers."""
    trials = {}
    for trial in self._study.get_trials(deepcopy=False):
      # Without a number, a worker died before it had added the trial.
      if "number" in trial.user_attrs:
        trials[trial.user_attrs["number"]] = trial
    return dict(sorted(trials.items()))

  def _own(self) -> list[FrozenTrial]:
    every = list(self._latest().values())
    if self._search is not None:
      return every
    return [trial for trial in every if trial.user_attrs["point"] in self._points]

  @contextlib.contextmanager
  def _locked(self) -> Iterator[None]:
    with open(self._root / ".lock", "w") as lock:
      fcntl.flock(lock, fcntl.LOCK_EX)
      try:
        yield
      except _BROKEN as error:
        raise errors.EffjaxError(
          f"the store of {self._root} does not answer any more ({_line(error)}); the "
          "same command goes on once it does"
        ) from None


def _add(study: optuna.Study, attrs: Mapping[str, object]) -> None:
  """A waiting trial.

  The point is an attribute, not Optuna's parameters: those allow no new values later.
  """
  study.add_trial(optuna.create_trial(state=TrialState.WAITING, user_attrs=dict(attrs)))


def _wait_again(study: optuna.Study, trial: FrozenTrial) -> None:
  """A new trial in the place of one that failed or whose worker died."""
  again = optuna.create_trial(
    state=TrialState.WAITING,
    params=trial.params,
    distributions=trial.distributions,
    user_attrs={name: trial.user_attrs[name] for name in ("number", "point")},
  )
  study.add_trial(again)


def _engine_options(url: str) -> dict[str, object]:
  if url.startswith("sqlite"):
    return {"connect_args": {"timeout": _SQLITE_TIMEOUT}}
  return {"pool_pre_ping": True}


def _try(url: str) -> None:
  """Connects once, before anything is written."""
  with _reaching(url):
    engine = sqlalchemy.create_engine(url)
    try:
      engine.connect().close()
    finally:
      engine.dispose()


@contextlib.contextmanager
def _reaching(url: str) -> Iterator[None]:
  """Turns what goes wrong on the way to a database into one line.

  Raises:
    InputError: a URL that is none, a missing driver, or no answer.
  """
  try:
    yield
  except (*_BROKEN, ImportError) as error:
    try:
      shown = sqlalchemy.make_url(url).render_as_string(hide_password=True)
    except sqlalchemy_exc.SQLAlchemyError:
      shown = url
    raise errors.InputError(
      f"the store {shown} cannot be reached ({_line(error)}); --store takes a URL such "
      "as sqlite:////shared/sweep.db or postgresql://user@host/database"
    ) from None


def _line(error: Exception) -> str:
  return str(error).split("\n", 1)[0]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
  """Without Optuna's warnings that heartbeats may change, and are its own loop's."""
  with warnings.catch_warnings():
    warnings.simplefilter("ignore", optuna_exceptions.ExperimentalWarning)
    warnings.filterwarnings("ignore", "Heartbeat of storage")
    yield
