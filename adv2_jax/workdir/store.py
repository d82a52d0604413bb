"""The result store: a working directory that is whole whenever the run is killed.

Results are written shard by shard; a shard is one batch of one (attack, interpreter). All its files
are first written and synced under `shards/.tmp-<key>/`, its record last; then each is renamed to
its place, and the record `shards/<key>.json` last of all. So an example counts exactly when its
record is there. A run killed before the staging was complete leaves nothing of the shard; killed
after it, the next `create` finishes the renaming.

    config.json                          every flag, and digests of the input; written first
    shards/<attack>-<interpreter>-<id>.json   per-example records; <id> is the shard's first example
    examples/…/<id>.png, maps/…/<id>.npy, flows/…/<id>.npy
    examples.csv, metrics.json, history.json   assembled from the records at the end
"""

import collections
import contextlib
import csv
import datetime
import hashlib
import io
import json
import math
import os
import pathlib
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from adv2_jax import images
from adv2_jax.types import InputError
from adv2_jax.validate import printable, user_path

ATTACKS = ('benign', 'again', 'other', 'pgd', 'adv2', 'adv2_joint')
NOT_PERTURBED = ('benign', 'again', 'other')  # rows of images that nobody attacked
CSV_FIELDS = (
  'id',
  'attack',
  'interpreter',
  'label',
  'target',
  'prediction',
  'confidence',
  'success',
  'map_l1',
  'map_iou',
  'file',
)
# Flags that say where and on what a run happens, not what comes out; a resumed run may change them.
FREE_FLAGS = frozenset(
  {
    'workdir',
    'resume',
    'compilation_cache',
    'num_devices',
    'coordinator',
    'process_id',
    'num_processes',
  }
)
RESUME = 'make room or choose a writable --workdir, then go on with --resume'


def part_name(epsilon: float) -> str:
  """The folder of one radius, in a run with several."""
  return f'eps-{epsilon:g}'


def image_folder(attack: str, interpreter: str) -> str:
  """Where the images of an attack lie: only `adv2` has its own for each interpreter."""
  return f'examples/adv2/{interpreter}' if attack == 'adv2' else f'examples/{attack}'


def map_folder(attack: str, interpreter: str) -> str:
  """Where the maps lie that this interpreter draws; attack 'target' for the wanted ones."""
  return f'maps/{attack}/{interpreter}'


def flow_folder(attack: str, interpreter: str) -> str:
  """Where the flows lie that StAdv made the images by."""
  return image_folder(attack, interpreter).replace('examples/', 'flows/', 1)


def read_map(path: pathlib.Path, attack: str, interpreter: str, example: int) -> np.ndarray | None:
  """A map of a working directory, f32[h,w]; None when it is not there."""
  file = path / map_folder(attack, interpreter) / f'{example:06d}.npy'
  return np.load(file, allow_pickle=False) if file.exists() else None


class StoreError(InputError):
  """The working directory cannot be used or written; one line that says what to do."""


@contextlib.contextmanager
def writing(path: pathlib.Path, remedy: str = RESUME) -> Iterator[None]:
  """Turns the operating system's refusals into one line."""
  try:
    yield
  except OSError as error:
    raise StoreError(
      f'cannot write {error.filename or path}: {error.strerror or error}; {remedy}'
    ) from error


def config_hash(config: Mapping[str, Any]) -> str:
  """Eight hex digits of the flags that change results."""
  text = json.dumps({k: v for k, v in plain(config).items() if k not in FREE_FLAGS}, sort_keys=True)
  return hashlib.sha256(text.encode()).hexdigest()[:8]


def default_workdir(config: Mapping[str, Any]) -> pathlib.Path:
  """`runs/<date-time>-<config hash>`."""
  return pathlib.Path('runs') / f'{datetime.datetime.now():%Y%m%d-%H%M%S}-{config_hash(config)}'


def plain(value: Any) -> Any:
  """JSON's types from numpy's and jax's; a float that is not finite becomes None."""
  if isinstance(value, Mapping):
    return {str(k): plain(v) for k, v in value.items()}
  if isinstance(value, np.floating):
    value = float(str(value))  # the shortest decimal that is this float32
  elif isinstance(value, np.generic):
    value = value.item()
  if isinstance(value, float):
    return value if math.isfinite(value) else None
  if value is None or isinstance(value, bool | int | str):
    return value
  if isinstance(value, pathlib.PurePath):
    return str(value)
  if hasattr(value, '__array__'):
    value = np.asarray(value)
    return [plain(v) for v in value] if value.ndim else plain(value[()])
  return [plain(v) for v in value]


def as_records(
  scores: Mapping[str, Any], is_real: Any = None, **columns: Any
) -> list[dict[str, Any]]:
  """One plain dict per real example, from columns [B]: what is written and what is aggregated.

  Args:
    scores: what `metrics.score` gave.
    is_real: bool[B]; padding rows (False) are left out.
    **columns: further columns, put first: id, label, target.

  Returns:
    Dicts of Python numbers; a value that is not finite becomes None.

  Raises:
    InputError: when a column has another length.
  """
  table = {name: np.asarray(value) for name, value in {**columns, **scores}.items()}
  n = len(next(iter(table.values())))
  for name, column in table.items():
    if column.shape != (n,):
      raise InputError(f'column {name} has shape {column.shape}; expected one per example, ({n},)')
  keep = np.ones(n, bool) if is_real is None else np.asarray(is_real)
  return [{name: plain(v[i]) for name, v in table.items()} for i in np.flatnonzero(keep)]


def _json_bytes(value: Any, indent: int | None = 1) -> bytes:
  return (json.dumps(plain(value), indent=indent, allow_nan=False) + '\n').encode()


def _sync_directory(path: pathlib.Path) -> None:
  descriptor = os.open(path, os.O_RDONLY)
  try:
    os.fsync(descriptor)
  finally:
    os.close(descriptor)


class Workdir(NamedTuple):
  """A working directory; made by `create`.

  Attributes:
    path: where it is.
    config: every flag of the run.
  """

  path: pathlib.Path
  config: dict[str, Any]

  @classmethod
  def create(
    cls,
    path: str | os.PathLike,
    config: Mapping[str, Any],
    resume: bool = False,
    digests: Mapping[str, str] | None = None,
  ) -> 'Workdir':
    """Starts a run in a new directory, or goes on with the one that is there.

    Call it in one process only, before the others write: it clears away what a killed run left.

    Args:
      path: the directory; made if it does not exist.
      config: every flag.
      resume: allow a directory that already holds a run of the same config.
      digests: of each input whose content counts, by its flag; see `check_digests`.

    Raises:
      StoreError: see `check_workdir` and `check_digests`.
    """
    check_workdir(path, config, resume)
    check_digests(path, config, digests or {})
    workdir = cls(directory(path), plain(config))
    workdir.write_json('config.json', {**config, 'digests': digests} if digests else config)
    with writing(workdir.path):
      workdir._recover()
    return workdir

  def kinds(self) -> list[tuple[str, str]]:
    """(attack, interpreter) of which there are shards, in the order of the tables."""
    found = {_kind(file) for file in (self.path / 'shards').glob('[!.]*.json')}
    rank = {attack: n for n, attack in enumerate(ATTACKS)}
    return sorted(found, key=lambda kind: (rank.get(kind[0], len(rank)), *kind))

  def done(self, attack: str, interpreter: str) -> set[int]:
    """Ids of the examples that are finished; whatever batches they were done in."""
    return {r['id'] for shard in self.shards(attack, interpreter) for r in shard['records']}

  def records(self, attack: str, interpreter: str) -> list[dict[str, Any]]:
    """The finished examples' records, in the order of their ids."""
    found = [r for shard in self.shards(attack, interpreter) for r in shard['records']]
    return sorted(found, key=lambda record: record['id'])

  def shards(self, attack: str, interpreter: str) -> Iterator[dict[str, Any]]:
    """What `write_shard` was given, per finished shard: attack, interpreter, records, extras.

    Read one by one, those of this kind alone: a run may have many, with their curves.
    """
    for file in sorted((self.path / 'shards').glob('[!.]*.json')):
      if _kind(file) == (attack, interpreter):
        yield read_json(file, 'is damaged; remove it and run again with --resume')

  def map(self, attack: str, interpreter: str, example: int) -> np.ndarray:
    """An example's map, f32[h,w]."""
    found = read_map(self.path, attack, interpreter, example)
    if found is None:
      raise StoreError(
        f'{self.path / map_folder(attack, interpreter)} lacks example {example}, which '
        f'{self.path / "shards"} has; remove both and run again with --resume'
      )
    return found

  def write_shard(
    self,
    attack: str,
    interpreter: str,
    records: Sequence[Mapping[str, Any]],
    arrays: Mapping[str, Any],
    **extras: Any,
  ) -> None:
    """Writes one finished batch; all of it or, if the run is killed, nothing.

    Args:
      attack: one of ATTACKS.
      interpreter: its name.
      records: one dict per example with at least 'id'; see `as_records`.
      arrays: folder → one array per record, in the same order: u8[n,H,W,3] becomes
        `<folder>/<id>.png`, anything else `<folder>/<id>.npy` in float32.
      **extras: what else to keep with the shard, such as seconds or curves (see `finish`).

    Raises:
      StoreError: it cannot be written; nothing stands under the final names.
    """
    if not records:
      return
    for folder, array in arrays.items():
      if len(array) != len(records):
        raise ValueError(f'{folder}: {len(array)} arrays for {len(records)} records')
    key = f'{attack}-{interpreter}-{records[0]["id"]:06d}'
    staging = self.path / 'shards' / f'.tmp-{key}'
    record = {'attack': attack, 'interpreter': interpreter, 'records': records, **extras}
    with writing(self.path):
      try:
        shutil.rmtree(staging, ignore_errors=True)
        for folder, array in arrays.items():
          (staging / folder).mkdir(parents=True, exist_ok=True)
          for row, value in zip(records, np.asarray(array), strict=True):
            _write_array(staging / folder / f'{row["id"]:06d}', value)
          _sync_directory(staging / folder)
        staging.mkdir(parents=True, exist_ok=True)
        images.write_atomic(staging / 'record.json', _json_bytes(record, None))
        _sync_directory(staging)
      except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
      self._publish(staging)

  def _publish(self, staging: pathlib.Path) -> None:
    """Renames a complete staging directory's files to their places, the record last."""
    folders = set()
    for file in sorted(p for p in staging.rglob('*') if p.is_file() and p.parent != staging):
      final = self.path / file.relative_to(staging)
      final.parent.mkdir(parents=True, exist_ok=True)
      os.replace(file, final)
      folders.add(final.parent)
    for folder in folders:
      _sync_directory(folder)
    os.replace(staging / 'record.json', self.path / 'shards' / f'{staging.name[5:]}.json')
    _sync_directory(self.path / 'shards')
    shutil.rmtree(staging)

  def _recover(self) -> None:
    """Finishes the shards a killed run had staged completely and removes the others."""
    for staging in sorted((self.path / 'shards').glob('.tmp-*')):
      if (staging / 'record.json').exists():
        self._publish(staging)
      else:
        shutil.rmtree(staging)

  def write_json(self, name: str, value: Any) -> None:
    """Writes `<name>` atomically; what is not finite becomes null."""
    with writing(self.path):
      images.write_atomic(self.path / name, _json_bytes(value))

  def finish(
    self,
    rows: Sequence[Mapping[str, Any]],
    environment: Mapping[str, Any],
    class_names: Sequence[str] | None = None,
    health: Mapping[str, Any] | None = None,
  ) -> None:
    """Writes `examples.csv`, `history.json` and `metrics.json`; the last one ends the run.

    The curves are means over examples. A shard that has them was written with `curves={'step': [T],
    name: [T][n], …}`, per-example values at `step` gradient evaluations; between these, and after
    the last one, the last value is held, because a finished example is held still.

    Args:
      rows: one per (attack, interpreter), see `metrics.aggregate`.
      environment: versions, devices, commit.
      class_names: of the data set; those that occur are kept, for the report.
      health: see `health.Health`.
    """
    lines: dict[int, bytes] = collections.defaultdict(bytes)  # in the order of `kinds`
    curves: dict[str, dict[str, Any]] = {}
    seen: set[int | None] = set()
    for attack, interpreter in self.kinds():
      sums = _Curves()
      for shard in self.shards(attack, interpreter):
        for record in shard['records']:
          whole = {'attack': attack, 'interpreter': interpreter, **record}
          lines[record['id']] += _csv_line([whole.get(field) for field in CSV_FIELDS])
          seen |= {record.get(field) for field in ('label', 'target', 'prediction')}
        if shard.get('curves'):
          sums.add(shard['curves'])
      if means := sums.means():
        curves[f'{attack}/{interpreter}'] = means
    self.write_json('history.json', {'curves': dict(sorted(curves.items()))})
    text = _csv_line(CSV_FIELDS) + b''.join(lines[i] for i in sorted(lines))
    with writing(self.path):
      images.write_atomic(self.path / 'examples.csv', text)
    names = {k: printable(name) for k, name in enumerate(class_names or ()) if k in seen}
    self.write_metrics(rows, environment, names, health)

  def write_metrics(
    self,
    rows: Sequence[Mapping[str, Any]],
    environment: Mapping[str, Any],
    class_names: Mapping[int, str],
    health: Mapping[str, Any] | None = None,
  ) -> None:
    """Writes `metrics.json` alone: each of several radii has its examples in its own folder."""
    told = {'config': self.config, 'environment': environment, 'rows': rows}
    more = {} if health is None else {'health': health}
    self.write_json('metrics.json', {**told, 'class_names': class_names, **more})


def read_json(path: pathlib.Path, otherwise: str) -> dict[str, Any]:
  """The file's content; `otherwise` completes the error's sentence when there is none."""
  try:
    return json.loads(path.read_text(encoding='utf-8'))
  except FileNotFoundError:
    known = path.parent.is_dir()
    raise StoreError(f'{path.parent} {otherwise if known else "does not exist"}') from None
  except (OSError, ValueError) as error:
    raise StoreError(f'{path} {otherwise} ({error})') from None


def check_workdir(
  path: str | os.PathLike, config: Mapping[str, Any], resume: bool, remedy: str | None = None
) -> None:
  """Whether `Workdir.create` would take the directory; nothing is written.

  To be asked before any work, while `create` comes once nothing else can be refused.

  Raises:
    StoreError: the directory holds something and `resume` is False; with `resume`, a flag that
      changes results differs, or what is there is no run; it cannot be written.
  """
  path = directory(path)
  with writing(path, remedy or RESUME):
    if path.exists() and not path.is_dir():
      raise StoreError(f'workdir {path} is a file; choose a directory with --workdir')
    if path.exists() and any(not p.name.startswith('.') for p in path.iterdir()):
      if not resume:
        remedy = remedy or 'go on with that run by --resume, or choose another --workdir'
        raise StoreError(f'workdir {path} is not empty; {remedy}')
      _refuse_other_config(path, plain(config))
    there = next(p for p in (path, *path.absolute().parents) if p.exists())
    tempfile.TemporaryFile(dir=there).close()


def directory(path: str | os.PathLike) -> pathlib.Path:
  """The path a user gave, '~' expanded; no '..': a/../b would be another once `a` is made."""
  return pathlib.Path(os.path.normpath(user_path(path)))


def read_digests(path: str | os.PathLike) -> dict[str, str]:
  """What `create` was given; {} of a directory without a run, or of one that has none."""
  file = directory(path) / 'config.json'
  return read_json(file, 'is damaged').get('digests', {}) if file.exists() else {}


def check_digests(
  path: str | os.PathLike, config: Mapping[str, Any], digests: Mapping[str, str]
) -> None:
  """Whether the run in `path`, if there is one, was made with the same content of its inputs.

  To be asked before any work; nothing is written. An input whose digest is not known on both sides
  (an older run has none) is taken for the same.

  Raises:
    StoreError: an input has changed; the message names it.
  """
  old_ones = read_digests(path)
  # The data last: masks belong to it, and say better what it is.
  for name, old in sorted(old_ones.items(), key=lambda item: (item[0] == 'data', item)):
    if digests.get(name, old) != old:
      value = config.get('data_path' if name == 'data' else name)
      raise StoreError(
        f'{name}{f" {value}" if value else ""} changed since the run in {directory(path)} was '
        'made: put it back as it was, or start anew in another --workdir'
      )


def _refuse_other_config(path: pathlib.Path, config: Mapping[str, Any]) -> None:
  old = read_json(
    path / 'config.json', 'holds no run that could be resumed; choose another --workdir'
  )
  for name in sorted((old.keys() | config.keys()) - FREE_FLAGS - {'digests'}):
    if name not in old:
      raise StoreError(
        f'workdir {path} was made by another version, which knew no --{name}: choose another '
        '--workdir'
      )
    if old.get(name) != config.get(name):
      raise StoreError(
        f'workdir {path} was made with --{name} {old.get(name)!r}, now it is '
        f'{config.get(name)!r}; repeat the old flag to resume, or choose another --workdir'
      )


def _write_array(stem: pathlib.Path, value: np.ndarray) -> None:
  if value.dtype == np.uint8:
    content, path = images.encode_png(value), stem.with_suffix('.png')
  else:
    buffer = io.BytesIO()
    np.save(buffer, value.astype(np.float32), allow_pickle=False)
    content, path = buffer.getvalue(), stem.with_suffix('.npy')
  with open(path, 'wb') as file:
    file.write(content)
    file.flush()
    os.fsync(file.fileno())


class _Curves:
  """The curves of one kind's shards, summed up shard by shard."""

  def __init__(self):
    self.steps = np.empty(0, int)
    self.sums: dict[str, np.ndarray] = {}  # name -> f64[2,T]: sum and number of values

  def add(self, curves: Mapping[str, Any]) -> None:
    """Another shard's, {'step': [T], name: [T][n]}; None is no value."""
    own = np.array(curves['step'], int)
    both = np.union1d(self.steps, own)
    for name, values in curves.items():
      if name == 'step':
        continue
      column = np.array(values, float).reshape(len(own), -1)
      known = np.isfinite(column)
      sums = [math.fsum(row[is_known]) for row, is_known in zip(column, known, strict=True)]
      before = self.sums.get(name, np.zeros((2, len(self.steps))))
      new = np.array([sums, known.sum(1)])
      self.sums[name] = _held(self.steps, before, both) + _held(own, new, both)
    self.steps = both

  def means(self) -> dict[str, list[Any]]:
    """{'step': [T], name: [T]} over examples; None where no example has a value."""
    if not self.sums:
      return {}
    found: dict[str, list[Any]] = {'step': self.steps.tolist()}
    for name, (total, n) in self.sums.items():
      found[name] = [float(f'{a / b:.6g}') if b else None for a, b in zip(total, n, strict=True)]
    return found


def _held(steps: np.ndarray, values: np.ndarray, at: np.ndarray) -> np.ndarray:
  """values [2,T], known at `steps`, at other steps: the last one held, 0 before the first."""
  padded = np.pad(values, ((0, 0), (1, 0)))
  return padded[:, np.searchsorted(steps, at, side='right')]


def _kind(file: pathlib.Path) -> tuple[str, str]:
  """(attack, interpreter) of a shard, by its name."""
  attack, _, rest = file.stem.partition('-')
  return attack, rest.rpartition('-')[0]


def _csv_line(values: Sequence[Any]) -> bytes:
  text = io.StringIO()
  csv.writer(text, lineterminator='\n').writerow([_csv(value) for value in values])
  return text.getvalue().encode()


def _csv(value: Any) -> str:
  if value is None:
    return ''
  if isinstance(value, bool):
    return str(int(value))
  return f'{value:.6g}' if isinstance(value, float) else printable(str(value))
