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
import json
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import tqdm

from adv2_jax import images, metrics, overlay
from adv2_jax.classifier import Classifier
from adv2_jax.interpreters.base import Interpreter
from adv2_jax.types import Array, Image, InputError, Key, Label, Map
from adv2_jax.weights import files as weight_files
from adv2_jax.workdir import figures
from adv2_jax.workdir.store import (
  RESUME,
  StoreError,
  check_workdir,
  default_workdir,
  plain,
  writing,
)
from experiments import _flags, _judge, _setup

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
  path = pathlib.Path(flags['workdir'] or default_workdir(flags))
  check_workdir(path, flags, flags['resume'])
  setup = _setup.load(config)
  examples = _setup.select(setup, attacked=False)
  with writing(path, RESUME):
    images.write_atomic(path / 'config.json', json.dumps(plain(flags), indent=2).encode())
  seen = {name: read(path, name) for name in setup.interpreters}
  left = [i for i, n in enumerate(examples.id) if any(int(n) not in s for s in seen.values())]
  with tqdm.tqdm(total=len(left) * len(setup.interpreters), unit='map') as bar:
    for shard in _setup.shards(setup, examples, np.array(left, int)):
      real = shard.is_real
      for name, interpreter in setup.interpreters.items():
        bar.set_postfix_str(name)
        if not seen[name].keys() >= set(shard.id.tolist()):
          maps, found = look(
            setup.clf, interpreter, shard.batch.x, shard.label, shard.keys, shard.mask
          )
          seen[name] |= keep(path, name, {'id': shard.id, 'maps': maps} | found, real)
        bar.update(int(real.sum()))
  shown = setup.dataset.images(examples.id[:_SHOWN])
  rows, lines, columns = [], [], [panels(shown, None)]
  for name, records in seen.items():
    found = {
      k: np.stack([records[int(i)][k] for i in examples.id]) for k in records[examples.id[0]]
    }
    maps = found.pop('maps')
    rows.append(summary(name, maps, found))
    lines += [
      {'id': int(i), 'interpreter': name} | {k: float(v[n]) for k, v in found.items()}
      for n, i in enumerate(examples.id)
    ]
    columns.append(panels(shown, maps))
  report = {'config': flags, 'environment': _judge.environment(config), 'rows': rows}
  write(path, report, lines, ['image', *seen], list(zip(*columns, strict=True)))
  print(table(rows))
  print(path)
  return path


def keep(
  path: pathlib.Path, name: str, arrays: Mapping[str, Array], real: np.ndarray
) -> dict[int, dict[str, np.ndarray]]:
  """Writes what was found of a batch, padding rows left out, and returns it as `read` does."""
  whole = {k: np.asarray(v)[real] for k, v in arrays.items()}
  whole = {k: v if k == 'id' else v.astype(np.float32) for k, v in whole.items()}
  content = io.BytesIO()
  np.savez(content, **whole)
  with writing(path, RESUME):
    images.write_atomic(path / f'shards/{name}-{whole["id"][0]:06d}.npz', content.getvalue())
  return _by_example(whole)


def read(path: pathlib.Path, name: str) -> dict[int, dict[str, np.ndarray]]:
  """What an earlier run found for this interpreter: {id: {field: value}}."""
  records: dict[int, dict[str, np.ndarray]] = {}
  for part in sorted(path.glob(f'shards/{name}-*.npz')):
    try:
      records |= _by_example(weight_files.read_npz(part))
    except InputError as error:
      raise StoreError(f'{part} is damaged; remove it and run again with --resume') from error
  return records


def _by_example(arrays: Mapping[str, np.ndarray]) -> dict[int, dict[str, np.ndarray]]:
  fields = [k for k in arrays if k != 'id']
  return {int(i): {k: arrays[k][n] for k in fields} for n, i in enumerate(arrays['id'])}


def panels(x: np.ndarray, maps: np.ndarray | None) -> list[figures.Panel]:
  """The first images, with their maps where given."""
  drawn = x if maps is None else overlay(images.from_uint8(x), maps[: len(x)])
  return [figures.Panel(image, '') for image in drawn]


def write(
  path: pathlib.Path,
  report: dict[str, Any],
  lines: list[dict[str, Any]],
  columns: list[str],
  pictures: list[tuple[figures.Panel, ...]],
) -> None:
  """The files, each by an atomic rename."""
  with figures.style():
    drawn = io.BytesIO()
    figures.gallery('Maps of the true class', columns, pictures).savefig(drawn, format='png')
  text = io.StringIO()
  writer = csv.DictWriter(text, list(lines[0]))
  writer.writeheader()
  writer.writerows(lines)
  with writing(path, RESUME):
    images.write_atomic(path / 'figures/maps.png', drawn.getvalue())
    images.write_atomic(path / 'maps.csv', text.getvalue().encode())
    images.write_atomic(path / 'explain.json', json.dumps(plain(report), indent=2).encode())


if __name__ == '__main__':
  _flags.define_data_flags()
  _flags.define_explain_flags()
  _flags.start(run)
