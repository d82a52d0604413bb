"""What the attack wants: target labels and target maps, per example and from the flags alone."""

import pathlib
from collections.abc import Callable, Sequence

import numpy as np

from adv2_jax.data.sources import read_csv, read_npz
from adv2_jax.training.rts import another_class
from adv2_jax.types import InputError

MAPS = ('benign', 'random_class', 'random_patch')


def labels(
  flag: str,
  seed: int,
  true: np.ndarray,
  num_classes: int,
  classes: Sequence[int] | None = None,
) -> Callable[[int, int], int]:
  """(id, least likely class) -> target class, for `--target_label`.

  'random' gives (label + RandomState(seed).randint(1, K, size=n_dataset)[id]) % K, so that a target
  belongs to an example, not to a batch. Where an interpreter knows only some `classes` (sorted), it
  gives another one of these, in the same way by their places.

  Raises:
    InputError: unknown value, class out of range, or a file that lacks or misnames an example.
  """
  if flag == 'random':
    known = classes or range(num_classes)
    offset = np.random.RandomState(seed).randint(1, len(known), size=len(true))
    random = np.asarray(another_class(true, offset, known))
    return lambda i, least: int(random[i])
  if flag == 'least_likely':
    return lambda i, least: least
  if flag.lstrip('-').isdigit():
    target = _in_range(int(flag), num_classes, '--target_label')
    return lambda i, least: target
  path = pathlib.Path(flag)
  if path.suffix == '.csv' and not path.is_file():
    raise InputError(f'--target_label is {flag!r}: there is no such file; check its path')
  if not path.is_file():
    raise InputError(
      f'--target_label is {flag!r}; expected random, least_likely, a class, or FILE.csv (id,target)'
    )
  table = {}
  for line, row in read_csv(path, ('id', 'target')):
    try:
      i, target = int(row['id']), int(row['target'])
    except ValueError:
      raise InputError(
        f'{path} line {line}: {row["id"]},{row["target"]} are not two whole numbers'
      ) from None
    table[i] = _in_range(target, num_classes, f'{path} line {line}')
    if 0 <= i < len(true) and target == true[i]:
      raise InputError(
        f'{path}: target {target} of example {i} is its true class; choose another class'
      )

  def from_file(i: int, least: int) -> int:
    del least
    if i not in table:
      raise InputError(f'{path} has no target for example {i}; add a line {i},<class>')
    return table[i]

  return from_file


def _in_range(target: int, num_classes: int, where: str) -> int:
  if not 0 <= target < num_classes:
    raise InputError(f'{where}: target {target} is outside 0…{num_classes - 1}')
  return target


def random_patch(seed: int, i: int, shape: tuple[int, ...]) -> np.ndarray:
  """A circle or a rotated box at a random place, f32[h,w] of 0 and 1; 10–30 % of the area."""
  rng = np.random.default_rng([seed, i])
  h, w = shape
  y, x = ((np.indices(shape) + 0.5) / np.array([h, w]).reshape(2, 1, 1)).astype(np.float64)
  area = rng.uniform(0.1, 0.3)
  cy, cx = rng.uniform(0.3, 0.7, size=2)
  if rng.random() < 0.5:
    inside = (y - cy) ** 2 + (x - cx) ** 2 <= area / np.pi
  else:
    angle, aspect = rng.uniform(0, np.pi), rng.uniform(0.5, 2)
    u = (x - cx) * np.cos(angle) + (y - cy) * np.sin(angle)
    v = (y - cy) * np.cos(angle) - (x - cx) * np.sin(angle)
    inside = (np.abs(u) <= np.sqrt(area * aspect) / 2) & (np.abs(v) <= np.sqrt(area / aspect) / 2)
  return inside.astype(np.float32)


def read_maps(path: str, names: list[str]) -> dict[str, dict[int, np.ndarray]]:
  """Interpreter -> id -> target map, from an .npz with `id` and one array per interpreter."""
  arrays = read_npz(_existing(path))
  for key in ('id', *names):
    if key not in arrays:
      raise InputError(f'{path} has no array {key!r}; it has: {", ".join(sorted(arrays))}')
  for name in names:
    maps = arrays[name]
    if maps.ndim != 3 or len(maps) != len(arrays['id']) or maps.dtype.kind not in 'fiub':
      raise InputError(f'{path}: {name} is {maps.dtype}{list(maps.shape)}; expected one map per id')
    if not ((maps >= 0) & (maps <= 1)).all():
      raise InputError(f'{path}: {name} is not within [0,1]; scale the maps')
  ids = [int(i) for i in arrays['id']]
  return {name: dict(zip(ids, arrays[name].astype(np.float32), strict=True)) for name in names}


def _existing(flag: str) -> pathlib.Path:
  path = pathlib.Path(flag)
  if not path.is_file():
    raise InputError(f'--target_map is {flag!r}; expected {", ".join(MAPS)}, or FILE.npz')
  return path
