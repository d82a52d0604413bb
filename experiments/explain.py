r"""Judges interpreters on clean images: `python -m experiments.explain`.

    python -m experiments.explain --interpreters grad,cam,mask --num_examples 500

For the first N images that the classifier gets right and their true class: does the map point at
the object (where the data has masks or boxes), is it faithful (what the class loses when the marked
part is blurred, beside a part elsewhere of the same shape; MASK minimises that very figure), and
how alike are the maps of different images? Writes explain.json, maps.csv (one line per image and
interpreter) and figures/maps.png; before these, batch by batch, shards/, from which --resume goes
on.
"""

import csv
import io
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import tqdm

from adv2_jax import images, metrics, overlay
from adv2_jax.classifier import Classifier
from adv2_jax.interpreters.base import Interpreter
from adv2_jax.types import Array, Image, Key, Label, Map
from adv2_jax.workdir import figures
from adv2_jax.workdir.store import (
  Workdir,
  as_records,
  check_digests,
  check_workdir,
  default_workdir,
  map_folder,
  writing,
)
from experiments import _digests, _flags, _judge, _setup

MEDIANS = ('marked', 'p', 'p_removed', 'p_random', 'p_kept')
FIELDS = (*MEDIANS, 'pointing_game', 'energy_inside')
SMALL = 0.6  # an object that covers more of the image than this is hard to miss
_SHOWN = 6


@jax.jit
def look(
  clf: Classifier, interpreter: Interpreter, x: Image, y: Label, keys: Key, mask: Array | None
) -> tuple[Map, dict[str, Array]]:
  """The maps of class y and their figures, [B] each."""
  maps = interpreter.explain(clf, x, y, keys)
  found = metrics.faithfulness(clf, x, y, maps, keys)
  found['p'] = metrics.confidence(clf(x).logits, y)
  if mask is not None:
    found['pointing_game'] = metrics.pointing_game(maps, mask)
    found['energy_inside'] = metrics.energy_inside(maps, mask)
    found['object'] = mask.mean((1, 2))
  return maps, found


def summary(name: str, maps: np.ndarray, found: Mapping[str, np.ndarray]) -> dict[str, Any]:
  """Means over the images, also over those of small objects; medians beside some."""
  row: dict[str, Any] = {'interpreter': name, 'n': len(maps)}
  row['correlation'] = metrics.mean_correlation(maps)
  for field in FIELDS:
    if field in found:
      row[field] = _mean(found[field])
    if field in found and field in MEDIANS:
      row[f'{field}_median'] = float(np.median(found[field]))
  if 'object' in found:
    small = (found['object'] < SMALL) & (found['object'] > 0)
    row['n_small'] = int(small.sum())
    for field in ('pointing_game', 'energy_inside'):
      row[f'{field}_small'] = _mean(found[field][small])
  return row


def _mean(values: np.ndarray) -> float | None:
  """The mean of those that are numbers; None where there are none."""
  values = values[np.isfinite(values)]
  return float(values.mean()) if len(values) else None


def table(rows: list[dict[str, Any]]) -> str:
  """The rows as a markdown table."""
  fields = ['correlation', *FIELDS]
  fields = ['n', *(f for f in fields if f in rows[0]), 'pointing_game_small', 'p_removed_median']
  fields = [f for f in fields if f in rows[0]]
  lines = ['| interpreter | ' + ' | '.join(fields) + ' |', '|---' * (len(fields) + 1) + '|']
  for row in rows:
    cells = ['–' if row[f] is None else f'{row[f]:.3f}'.removesuffix('.000') for f in fields]
    lines.append(f'| {row["interpreter"]} | {" | ".join(cells)} |')
  return '\n'.join(lines)


def run(flags: dict[str, Any]) -> pathlib.Path:
  """The whole command, once the flags are known."""
  _flags.check(flags)
  config = flags | {'target_label': 'random', 'target_map': 'benign'}
  path = flags['workdir'] or default_workdir(flags)
  check_workdir(path, flags, flags['resume'])
  setup = _setup.load(config)
  digests = _digests.of_inputs(flags, data=setup.dataset)
  check_digests(path, flags, digests)
  examples = _setup.select(setup, attacked=False)
  workdir = Workdir.create(path, flags, flags['resume'], digests)
  draw(setup, examples, workdir)
  shown = setup.dataset.images(examples.id[:_SHOWN])
  rows, lines, columns = [], [], [panels(shown, None)]
  for name in setup.interpreters:
    told = {r['id']: r for r in workdir.records('benign', name)}
    found = {
      field: np.array([told[i][field] for i in examples.id.tolist()], float)  # None becomes NaN
      for field in told[int(examples.id[0])]
    }
    ids = found.pop('id').astype(int).tolist()
    maps = np.stack([workdir.map('benign', name, i) for i in ids])
    rows.append(summary(name, maps, found))
    lines += [
      {'id': i, 'interpreter': name} | {field: float(v[n]) for field, v in found.items()}
      for n, i in enumerate(ids)
    ]
    columns.append(panels(shown, maps))
  report = {'config': flags, 'environment': _judge.environment(config), 'rows': rows}
  write(workdir, report, lines, ['image', *setup.interpreters], list(zip(*columns, strict=True)))
  print(table(rows))
  print(workdir.path)
  return workdir.path


def draw(setup: _setup.Setup, examples: _setup.Examples, workdir: Workdir) -> None:
  """Makes and judges the maps that are not there yet, batch by batch."""
  ids = set(examples.id.tolist())
  done = {name: workdir.done('benign', name) & ids for name in setup.interpreters}
  whole = set.intersection(*done.values())
  left = np.flatnonzero(~np.isin(examples.id, list(whole)))
  total, before = len(ids) * len(done), sum(map(len, done.values()))
  with tqdm.tqdm(total=total, initial=before, unit='map') as bar:
    for shard in _setup.shards(setup, examples, left):
      for name, interpreter in setup.interpreters.items():
        keep = shard.is_real & ~np.isin(shard.id, list(done[name]))
        if keep.any():
          bar.set_postfix_str(name)
          maps, found = look(
            setup.clf, interpreter, shard.batch.x, shard.label, shard.keys, shard.mask
          )
          arrays = {map_folder('benign', name): np.asarray(maps)[keep]}
          workdir.write_shard('benign', name, as_records(found, keep, id=shard.id), arrays)
          bar.update(int(keep.sum()))


def panels(x: np.ndarray, maps: np.ndarray | None) -> list[figures.Panel]:
  """The first images, with their maps where given."""
  drawn = x if maps is None else overlay(images.from_uint8(x), maps[: len(x)])
  return [figures.Panel(image, '') for image in drawn]


def write(
  workdir: Workdir,
  report: dict[str, Any],
  lines: list[dict[str, Any]],
  columns: list[str],
  pictures: list[tuple[figures.Panel, ...]],
) -> None:
  """The files, each by an atomic rename."""
  with figures.style():
    drawn = figures.png(figures.gallery('Maps of the true class', columns, pictures))
  text = io.StringIO()
  writer = csv.DictWriter(text, list(lines[0]))
  writer.writeheader()
  writer.writerows(lines)
  with writing(workdir.path):
    images.write_atomic(workdir.path / 'figures/maps.png', drawn)
    images.write_atomic(workdir.path / 'maps.csv', text.getvalue().encode())
  workdir.write_json('explain.json', report)


if __name__ == '__main__':
  _flags.define_data_flags()
  _flags.define_explain_flags()
  _flags.start(run)
