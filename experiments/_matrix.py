"""What experiments.transfer tells, as a table and as heat maps: attacked down, looking across."""

import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure

from adv2_jax.workdir import figures
from experiments import _printed

SHOWN = {
  'map_iou': 'Map IoU (higher: better hidden)',
  'map_l1': 'Map L1 (lower: better hidden)',
}
LIMITS = {'map_iou': (0.0, 1.0), 'map_l1': (None, 0.0)}  # where the colour is palest, darkest


def classifier_of(config: Mapping[str, Any]) -> tuple[str, str]:
  """(model, weights), the latter by the model's name where they are its own."""
  return config['model'], str(config['weights'] or config['model'])


class Matrix(NamedTuple):
  """A figure of all rows, by what was attacked (down) and who looks (across).

  Attributes:
    values: f64[rows, columns], NaN where there is none.
    is_attacked: bool[rows, columns], who looks was attacked.
    down: what was attacked, for people.
    across: who looks, for people; of another classifier with its name.
  """

  values: np.ndarray
  is_attacked: np.ndarray
  down: list[str]
  across: list[str]

  def numbers(self) -> list[list[str]]:
    """The values as they are printed."""
    return [['–' if np.isnan(v) else f'{v:.3f}' for v in line] for line in self.values]


def matrix(found: Sequence[Mapping[str, Any]], field: str, own: tuple[str, str]) -> Matrix:
  """A figure of the rows.

  Means over successes on the classifier attacked, `own`; on others, where few succeed, over all.
  """
  down = {'pgd': f'{figures.label("pgd")} alone', 'adv2_joint': 'joint'}
  cells: dict[str, dict[str, tuple[float | None, bool]]] = {}
  for row in found:
    classifier = (row['model'], row['weights'])
    value = row.get(field if classifier == own or field == 'asr' else f'{field}_all')
    across = row['seen_by']
    if classifier != own:
      across += ', ' + ' '.join(dict.fromkeys((row['model'], pathlib.Path(row['weights']).name)))
    name = row.get('made_for') or down.get(row['attack'], row['attacked'])
    of_attack = cells.setdefault(name, {})
    of_attack[across] = value, row['attacked'] in (row['seen_by'], 'joint') and classifier == own
  names = list(dict.fromkeys(name for line in cells.values() for name in line))
  table = [[line.get(name, (None, False)) for name in names] for line in cells.values()]
  values = np.array([[math.nan if v is None else v for v, _ in line] for line in table])
  return Matrix(values, np.array([[a for _, a in line] for line in table]), list(cells), names)


def markdown(found: Sequence[Mapping[str, Any]], own: tuple[str, str]) -> str:
  """A table for each figure shown, in bold where who looks was attacked; at last the success."""
  parts = ['Down: what was attacked. Across: who looks, in bold where it was attacked.', '']
  for field, title in (SHOWN | {'asr': 'Success rate on the classifier that looks'}).items():
    m = matrix(found, field, own)
    lines = [
      [name, *(f'**{v}**' if a else v for v, a in zip(numbers, is_attacked, strict=True))]
      for name, numbers, is_attacked in zip(m.down, m.numbers(), m.is_attacked, strict=True)
    ]
    parts += [title, '', _printed.table(['attacked', *m.across], lines), '']
  parts.append(
    'Each interpreter’s map of the class shown, against its own map of the clean image; means over '
    'successes.'
  )
  if any((row['model'], row['weights']) != own for row in found):
    parts[-1] += ' Of a classifier that was not attacked: over all images.'
  return '\n'.join(parts) + '\n'


def draw(found: Sequence[Mapping[str, Any]], own: tuple[str, str]) -> Figure:
  """The same as heat maps."""
  panels = {}
  for field, title in SHOWN.items():
    m = matrix(found, field, own)
    panels[title] = figures.Heat(m.values, m.is_attacked, LIMITS[field])
  across = [name.replace(', ', '\n').replace(' ', '\n') for name in m.across]
  return figures.heat_maps(panels, m.down, across)
