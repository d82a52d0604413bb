"""What a finished run left in its working directory, read back from the files alone."""

import csv
import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from adv2_jax import images
from adv2_jax.workdir import store

_NUMBERS = ('id', 'label', 'target', 'prediction', 'confidence', 'success', 'map_l1', 'map_iou')


class Results(NamedTuple):
  """What a finished run left: its table, its examples, its curves."""

  path: pathlib.Path
  config: Mapping[str, Any]
  environment: Mapping[str, Any]
  rows: Sequence[Mapping[str, Any]]
  class_names: Mapping[str, str]
  examples: Mapping[tuple[str, str, int], Mapping[str, float]]  # by (attack, interpreter, id)
  curves: Mapping[str, Mapping[str, Sequence[float | None]]]

  @property
  def interpreters(self) -> list[str]:
    """In the order of the table."""
    return list(dict.fromkeys(row['interpreter'] for row in self.rows))

  def row(self, attack: str, interpreter: str) -> Mapping[str, Any]:
    """The table's row, empty when there is none."""
    wanted = (attack, interpreter)
    return next((r for r in self.rows if (r['attack'], r['interpreter']) == wanted), {})

  def ids(self, interpreter: str) -> list[int]:
    """Examples this interpreter has looked at, in data-set order."""
    return sorted({i for _, name, i in self.examples if name == interpreter})

  def class_name(self, label: float | None) -> str:
    """The class's name where known, else its number."""
    return '' if label is None else self.class_names.get(str(int(label)), f'class {int(label)}')

  def image(self, attack: str, interpreter: str, example: int) -> np.ndarray | None:
    """u8[H,W,3] or None."""
    file = self.path / store.image_folder(attack, interpreter) / f'{example:06d}.png'
    return images.read_image(file) if file.exists() else None

  def map(self, attack: str, interpreter: str, example: int) -> np.ndarray | None:
    """f32[h,w] or None."""
    file = self.path / store.map_folder(attack, interpreter) / f'{example:06d}.npy'
    return np.load(file, allow_pickle=False) if file.exists() else None


def read_results(workdir: str | os.PathLike) -> Results:
  """Reads metrics.json, examples.csv and, if there, history.json.

  Raises:
    StoreError: there is no finished run.
  """
  path = pathlib.Path(workdir)
  metrics = store.read_json(
    path / 'metrics.json', 'has no metrics.json: the run is not finished; go on with it by --resume'
  )
  history = path / 'history.json'
  with open(path / 'examples.csv', newline='', encoding='utf-8') as file:
    lines = list(csv.DictReader(file))
  return Results(
    path=path,
    config=metrics.get('config', {}),
    environment=metrics.get('environment', {}),
    rows=metrics['rows'],
    class_names=metrics.get('class_names', {}),
    examples={
      (line['attack'], line['interpreter'], int(line['id'])): {
        name: float(line[name]) for name in _NUMBERS if line[name]
      }
      for line in lines
    },
    curves=json.loads(history.read_text(encoding='utf-8'))['curves'] if history.exists() else {},
  )
