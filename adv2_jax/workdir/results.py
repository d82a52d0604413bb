"""What a finished run left in its working directory, read back from the files alone."""

import array
import csv
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from adv2_jax import images
from adv2_jax.validate import user_path
from adv2_jax.workdir import store

_NUMBERS = ('id', 'label', 'target', 'prediction', 'confidence', 'success', 'map_l1', 'map_iou')


class Results(NamedTuple):
  """What a finished run left: its table, its examples, its curves.

  Attributes:
    path: the working directory.
    config: every flag.
    environment: versions, devices, commit.
    rows: of the table.
    class_names: by the class's number, of those that occur.
    health: see `health.Health`; {} of an older run.
    examples: (attack, interpreter) -> field -> f64[n], in the order of ids; NaN where it is empty.
      {} of a run with several radii: each of its parts has its own.
    curves: '<attack>/<interpreter>' -> name -> [T].
  """

  path: pathlib.Path
  config: Mapping[str, Any]
  environment: Mapping[str, Any]
  rows: Sequence[Mapping[str, Any]]
  class_names: Mapping[str, str]
  health: Mapping[str, Any]
  examples: Mapping[tuple[str, str], Mapping[str, np.ndarray]]
  curves: Mapping[str, Mapping[str, Sequence[float | None]]]

  @property
  def interpreters(self) -> list[str]:
    """In the order of the table."""
    return list(dict.fromkeys(row['interpreter'] for row in self.rows))

  @property
  def radii(self) -> list[float]:
    """Of a run with several of them; else []."""
    return _radii(self.config)

  def row(self, attack: str, interpreter: str) -> Mapping[str, Any]:
    """The table's row, empty when there is none."""
    wanted = (attack, interpreter)
    return next((r for r in self.rows if (r['attack'], r['interpreter']) == wanted), {})

  def ids(self, interpreter: str) -> list[int]:
    """Examples this interpreter has looked at, in data-set order."""
    found = [table['id'] for (_, name), table in self.examples.items() if name == interpreter]
    return np.unique(np.concatenate(found)).astype(int).tolist() if found else []

  def example(self, attack: str, interpreter: str, i: int) -> dict[str, float]:
    """Its line of examples.csv, {field: number}, empty fields left out; {} when there is none."""
    table = self.examples.get((attack, interpreter), {'id': np.empty(0)})
    place = np.searchsorted(table['id'], i)
    if not np.array_equal(table['id'][place : place + 1], [i]):
      return {}
    line = {field: float(column[place]) for field, column in table.items()}
    return {field: value for field, value in line.items() if not np.isnan(value)}

  def class_name(self, label: float | None) -> str:
    """The class's name where known, else its number."""
    return '' if label is None else self.class_names.get(str(int(label)), f'class {int(label)}')

  def image(self, attack: str, interpreter: str, example: int) -> np.ndarray | None:
    """u8[H,W,3] or None."""
    file = self.path / store.image_folder(attack, interpreter) / f'{example:06d}.png'
    return images.read_image(file) if file.exists() else None

  def map(self, attack: str, interpreter: str, example: int) -> np.ndarray | None:
    """f32[h,w] or None."""
    return store.read_map(self.path, attack, interpreter, example)


def read_results(workdir: str | os.PathLike) -> Results:
  """Reads metrics.json, examples.csv and, if there, history.json.

  Raises:
    StoreError: there is no finished run.
  """
  path = user_path(workdir)
  metrics = store.read_json(
    path / 'metrics.json', 'has no metrics.json: the run is not finished; go on with it by --resume'
  )
  history = path / 'history.json'
  config = metrics.get('config', {})
  return Results(
    path=path,
    config=config,
    environment=metrics.get('environment', {}),
    rows=metrics['rows'],
    class_names=metrics.get('class_names', {}),
    health=metrics.get('health', {}),
    examples={} if _radii(config) else _read_examples(path / 'examples.csv'),
    curves=store.read_json(history, 'is damaged')['curves'] if history.exists() else {},
  )


def read_parts(workdir: str | os.PathLike) -> list[Results]:
  """What there are images of: the run, or each radius of a run with several.

  Raises:
    StoreError: there is no finished run.
  """
  whole = read_results(workdir)
  parts = [read_results(whole.path / store.part_name(epsilon)) for epsilon in whole.radii]
  return parts or [whole]


def _radii(config: Mapping[str, Any]) -> list[float]:
  epsilon = config.get('epsilon')
  return epsilon if isinstance(epsilon, list) else []


def _read_examples(path: pathlib.Path) -> dict[tuple[str, str], dict[str, np.ndarray]]:
  columns: dict[tuple[str, str], dict[str, array.array]] = {}
  try:
    file = open(path, newline='', encoding='utf-8')  # noqa: SIM115
  except OSError as error:
    raise store.StoreError(f'cannot read {path}: {error.strerror}; get the run again') from None
  with file:
    for line in csv.DictReader(file):
      kind = columns.setdefault(
        (line['attack'], line['interpreter']), {name: array.array('d') for name in _NUMBERS}
      )
      for name, column in kind.items():
        column.append(float(line[name] or 'nan'))
  return {
    kind: {name: np.array(column) for name, column in table.items()}
    for kind, table in columns.items()
  }
