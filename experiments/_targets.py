"""What the attack wants: target labels and target maps, per example and from the flags alone."""

import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from adv2_jax.attacks import goals
from adv2_jax.data import Dataset
from adv2_jax.data.sources import read_csv, read_npz, table_number
from adv2_jax.training.rts import another_class
from adv2_jax.types import InputError
from adv2_jax.validate import user_path, whole_number

MAPS = ('benign', 'random_class', 'random_patch', *goals.AWAY)


def goal_of(config: Mapping[str, Any]) -> goals.Goal:
  """What a run's flags ask for; of an older run, which had none, to deceive."""
  untargeted = config.get('target_label') == 'untargeted'
  return goals.find(config.get('goal', 'deceive'), config['target_map'], untargeted=untargeted)


def is_file(target_map: str) -> bool:
  """Whether `--target_map` names a file."""
  return target_map not in MAPS and not target_map.startswith('path:')


def labels(
  flag: str | None,
  seed: int,
  dataset: Dataset,
  num_classes: int,
  classes: Sequence[int] | None = None,
) -> Callable[[int, int, Any], int]:
  """(id, label, logits [K]) -> target class, for `--target_label`; None: 'random'.

  'random' gives (label + RandomState(seed).randint(1, K, size=n_dataset)[id]) % K, so that a target
  belongs to an example, not to a batch. Where an interpreter knows only some `classes` (sorted), it
  gives another one of these, in the same way by their places; any, if the label is none of them.
  'runner_up' and 'untargeted' give the most probable wrong class.

  Raises:
    InputError: unknown value, class out of range, or a file that lacks or misnames an example.
  """
  if flag in (None, 'random'):
    known = classes or range(num_classes)
    offset = np.random.RandomState(seed).randint(1, len(known), size=len(dataset))
    beyond = np.random.RandomState([seed, 1]).randint(0, len(known), size=len(dataset))

    def another(i: int, label: int, logits: np.ndarray) -> int:
      del logits
      return (
        int(another_class(label, int(offset[i]), known)) if label in known else known[beyond[i]]
      )

    return another
  if flag == 'least_likely':
    return lambda i, label, logits: int(np.argmin(logits))
  if flag in ('runner_up', 'untargeted'):
    return lambda i, label, logits: runner_up(logits, label)
  if (number := whole_number(flag)) is not None:
    target = _in_range(number, num_classes, '--target_label')
    return lambda i, label, logits: target
  path = user_path(flag)
  if path.suffix == '.csv' and not path.is_file():
    raise InputError(f'--target_label is {flag!r}: there is no such file; check its path')
  if not path.is_file():
    raise InputError(
      f'--target_label is {flag!r}; expected random, least_likely, runner_up, untargeted, a class, '
      'or FILE.csv (id,target)'
    )
  table = _read_table(path, dataset, num_classes)

  def from_file(i: int, label: int, logits: np.ndarray) -> int:
    del logits
    if i not in table:
      name = dataset.file(i)
      raise InputError(
        f'{path} has no target for example {i}{name and f" ({name})"}; add a line {i},<class>'
      )
    if table[i] == label:
      raise InputError(
        f'{path}: target {label} of example {i} is its true class; choose another class'
      )
    return table[i]

  return from_file


def runner_up(logits: np.ndarray, label: int) -> int:
  """The most probable class but `label`."""
  return int(np.argmax(np.where(np.arange(len(logits)) == label, -np.inf, logits)))


def _read_table(path: pathlib.Path, dataset: Dataset, num_classes: int) -> dict[int, int]:
  """{id: target} of a file with the columns id,target; an id may be the name of its file."""
  names: dict[str, int] = {}
  table: dict[int, int] = {}
  for line, row in read_csv(path, ('id', 'target')):
    i, target = table_number(row['id']), table_number(row['target'])
    if i is None:
      names = names or {dataset.file(k): k for k in range(len(dataset))}
      i = names.get(pathlib.PurePath(row['id']).as_posix())
    if i is None or target is None:
      such = f' (the id may be a file name such as {dataset.file(0)})' if dataset.file(0) else ''
      raise InputError(
        f'{path} line {line}: {row["id"]},{row["target"]} are not two whole numbers{such}'
      )
    if not 0 <= i < len(dataset):
      raise InputError(f'{path} line {line}: there is no example {i}; ids are 0…{len(dataset) - 1}')
    if table.get(i, target) != target:
      raise InputError(f'{path} line {line}: example {i} has the target {table[i]} already')
    table[i] = _in_range(target, num_classes, f'{path} line {line}')
  return table


def _in_range(target: int, num_classes: int, where: str) -> int:
  if not 0 <= target < num_classes:
    raise InputError(f'{where}: target {target} is outside 0…{num_classes - 1}')
  return target


def random_patch(seed: int, i: int, shape: tuple[int, ...]) -> np.ndarray:
  """A circle or a rotated box, f32[h,w]: U(.9, 1) inside, U(0, .1) outside, by (seed, i) alone.

  At 224 pixels a radius of 30…59, or half-sides of 30…60 and up to 30° of rotation, scaled to the
  map; the centre is within .3….7 of both sides. A cell belongs to it by its middle; on a map so
  coarse that none does, the cell of the centre.
  """
  rng = np.random.default_rng([seed, i])
  h, w = shape
  y, x = ((np.indices(shape) + 0.5) / np.array([h, w]).reshape(2, 1, 1)).astype(np.float64)
  cy, cx = rng.uniform(0.3, 0.7, size=2)
  if rng.random() < 0.5:
    inside = (y - cy) ** 2 + (x - cx) ** 2 <= (rng.integers(30, 60) / 224) ** 2
  else:
    angle, (a, b) = np.deg2rad(rng.uniform(-30, 30)), rng.integers(30, 61, size=2) / 224
    u = (x - cx) * np.cos(angle) + (y - cy) * np.sin(angle)
    v = (y - cy) * np.cos(angle) - (x - cx) * np.sin(angle)
    inside = (np.abs(u) <= a) & (np.abs(v) <= b)
  inside[int(cy * h), int(cx * w)] |= not inside.any()
  values = np.where(inside, rng.uniform(0.9, 1, shape), rng.uniform(0, 0.1, shape))
  return values.astype(np.float32)


def read_maps(path: str, names: list[str]) -> dict[str, dict[int, np.ndarray]]:
  """Interpreter -> id -> target map, from an .npz with `id` and one array per interpreter."""
  arrays = read_npz(_existing(path))
  for key in ('id', *names):
    if key not in arrays:
      raise InputError(f'{path} has no array {key!r}; it has: {", ".join(sorted(arrays))}')
  if (given := arrays['id']).dtype.kind not in 'iu' or given.ndim != 1:
    raise InputError(f'{path}: id is {given.dtype}{list(given.shape)}; expected whole numbers [N]')
  for name in names:
    maps = arrays[name]
    if maps.ndim != 3 or len(maps) != len(given) or maps.dtype.kind not in 'fiub':
      raise InputError(f'{path}: {name} is {maps.dtype}{list(maps.shape)}; expected one map per id')
    if not ((maps >= 0) & (maps <= 1)).all():
      raise InputError(f'{path}: {name} is not within [0,1]; scale the maps')
  return {
    name: dict(zip(given.tolist(), arrays[name].astype(np.float32), strict=True)) for name in names
  }


def _existing(flag: str) -> pathlib.Path:
  path = user_path(flag)
  if not path.is_file():
    raise InputError(
      f'--target_map is {flag!r}; expected {", ".join(MAPS)}, path:A such as path:0.5, or FILE.npz'
    )
  return path
