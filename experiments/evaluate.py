r"""Re-scores a run from its images and maps alone: `python -m experiments.evaluate --workdir DIR`.

From metrics.json it takes the configuration, rebuilds classifier and interpreters, and judges the
8-bit images of examples/ anew: predictions, fresh maps, every figure. Nothing of the attack is run.
Then it compares with examples.csv, with the stored maps and with the rows of metrics.json, prints
the table, and exits with 0 if all agree, else with 1 and the first disagreement.

The rows 'again' and 'other' are left out, for their maps and images are not kept; and so are
pointing game and energy inside, unless masks/ is there.
"""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tqdm

from adv2_jax import images, metrics
from adv2_jax.classifier import Classifier
from adv2_jax.interpreters.base import Interpreter
from adv2_jax.types import Array
from adv2_jax.workdir import store
from adv2_jax.workdir.results import Results, read_parts
from experiments import _digests, _flags, _judge, _setup
from experiments._judge import Disagreement

# What another device may change. IoU and top-k count cells, and one may cross the threshold.
CELL = 0.02
TOLERANCE = {
  **{'map_iou': 0.03, 'map_topk': 0.03, 'patch_iou': 0.03},
  **{'map_ssim': 0.01, 'pointing_game': 0.0},
  **{'map_spearman': 0.01, 'map_kendall': 0.01, 'map_pearson': 0.01},
}
OTHERWISE = 2e-3
LOCALISATION = ('pointing_game', 'energy_inside')
OF_THE_ATTACK = ('zero_gradient', 'nonfinite_gradient')


def rescore(workdir: str) -> list[dict[str, Any]]:
  """Judges the images of a finished run anew, radius by radius where it has several.

  Returns:
    The rows of metrics.json that can be computed from the files.

  Raises:
    StoreError: there is no finished run, or its weights have changed since.
    Disagreement: an example's record, a stored map or a row says something else.
  """
  return [row for results in read_parts(workdir) for row in _rescored(results)]


def _rescored(results: Results) -> list[dict[str, Any]]:
  store.check_digests(results.path, results.config, _digests.of_weights(results.config))
  clf, built = _setup.models(results.config)
  ids_of = {
    kind: table['id'].astype(int).tolist()
    for kind, table in results.examples.items()
    if kind[0] not in _judge.NOT_KEPT
  }
  rows = []
  with tqdm.tqdm(total=sum(map(len, ids_of.values())), unit='img', mininterval=1) as bar:
    for name, interpreter in built.items():
      attacks = [r['attack'] for r in results.rows if r['interpreter'] == name]
      found: dict[str, list[dict[str, Any]]] = {a: [] for a in attacks if a not in _judge.NOT_KEPT}
      for kind in found:
        bar.set_postfix_str(f'{kind} {name}')
        for batch in _judge.batches(ids_of.get((kind, name), []), results.config['batch_size']):
          found[kind] += _judged(results, clf, interpreter, name, kind, batch)
          bar.update(len(batch))
      for kind, records in found.items():
        attacked = kind not in store.NOT_PERTURBED
        row = {
          'interpreter': name,
          'attack': kind,
          'epsilon': results.config.get('epsilon'),
          **metrics.aggregate(records, attacked),
        }
        _compare_rows(results.row(kind, name), row, (results.path / 'masks').is_dir())
        rows.append(row)
  return rows


def _judged(
  results: Results,
  clf: Classifier,
  interpreter: Interpreter,
  name: str,
  kind: str,
  ids: list[int],
) -> list[dict[str, Any]]:
  """The records of one batch, compared with the stored ones; batches are filled up to one shape."""
  padded = np.resize(ids, results.config['batch_size']).tolist()
  said = [results.example(kind, name, i) for i in padded]
  label, target = (jnp.array([int(s[k]) for s in said]) for k in ('label', 'target'))
  clean = _judge.read_images(results, 'benign', name, padded)
  x8 = clean if kind == 'benign' else _judge.read_images(results, kind, name, padded)
  keys = metrics.judge_keys(results.config['seed'], padded)
  maps_of = functools.partial(
    _judge.two_class_maps, clf, interpreter, y=label, target=target, key=keys
  )
  clean_maps = maps_of(x=clean)
  maps = clean_maps if kind == 'benign' else maps_of(x=x8)
  attacked = kind not in store.NOT_PERTURBED
  wanted = _judge.read_maps(results, 'target', name, padded)
  scores = _judge.score(
    clf,
    clean,
    x8,
    target,
    wanted,
    clean_maps,
    maps,
    **_judge.bounds(results.config),
    attacked=attacked,
    mask=_judge.read_masks(results, padded, clean.shape[1:3]),
    patch=_judge.patch_of(results.config, wanted),
  )
  if attacked and results.config.get('framework') == 'stadv':
    scores |= _flows(results, name, kind, padded, clean, x8)
  is_real = np.arange(len(padded)) < len(ids)
  records = store.as_records(scores, is_real, id=padded, label=label, target=target)
  for record in records:
    if record['out_of_set']:
      image = f'{store.image_folder(kind, name)}/{record["id"]:06d}.png'
      raise Disagreement(f'{image} is outside of the perturbation set around its benign image')
  fresh, stored = np.asarray(maps[int(attacked)]), _judge.read_maps(results, kind, name, padded)
  _compare_maps(fresh, stored, kind, name, ids)
  for record, one in zip(records, said, strict=False):
    where = f'{kind}/{name}, example {record["id"]}'
    for field in ('prediction', 'success', 'confidence', 'map_l1', 'map_iou'):
      _compare(where, field, one.get(field), record[field], 'examples.csv')
  return records


def _flows(
  results: Results, name: str, kind: str, ids: list[int], clean: Array, x8: Array
) -> dict[str, np.ndarray]:
  """Their figures; Disagreement where a flow does not make the image."""
  folder = store.flow_folder(kind, name)
  flow = jnp.asarray(_judge.read_arrays(results.path, folder, ids))
  apart = np.abs(np.asarray(_warped(clean, flow) - x8)).max((1, 2, 3))
  for i, one in zip(ids, apart, strict=True):
    if not one <= 1.5 / 255:  # where half a level is rounded the other way
      raise Disagreement(f'{folder}/{i:06d}.npy warps the benign image to another one than its own')
  return _judge.flow_figures(flow)


_warped = jax.jit(lambda x, flow: images.quantise(images.warp(x, flow)))


def _compare_maps(fresh: np.ndarray, stored: Array, kind: str, name: str, ids: list[int]) -> None:
  for i, new, old in zip(ids, fresh, np.asarray(stored), strict=False):
    file = f'{store.map_folder(kind, name)}/{i:06d}.npy'
    if new.shape != old.shape:
      raise Disagreement(f'{file} has shape {old.shape}, the fresh map {new.shape}')
    if not (worst := np.abs(new - old).max()) <= CELL:
      raise Disagreement(f'{file} differs from the fresh map by {worst:.3g} in a cell')


def _compare_rows(said: Mapping[str, Any], row: Mapping[str, Any], has_masks: bool) -> None:
  where = f'{row["attack"]}/{row["interpreter"]}'
  for field, value in row.items():
    # What the images do not tell, and what an older run did not count.
    if field in ('interpreter', 'attack', 'epsilon', *OF_THE_ATTACK) or field not in said:
      continue
    if field.startswith(LOCALISATION) and not has_masks:
      continue
    if field == 'asr_ci95':
      for bound, told in zip(value or (None, None), said.get(field) or (None, None), strict=True):
        _compare(where, field, told, bound, 'metrics.json')
    else:
      _compare(where, field, said.get(field), value, 'metrics.json')


def _compare(where: str, field: str, said: Any, computed: Any, file: str) -> None:
  if said is None and computed is None:
    return
  exact = isinstance(computed, bool | int)
  figure = field.removesuffix('_all').removesuffix('_median')
  allowed = 0.0 if exact else TOLERANCE.get(figure, OTHERWISE)
  if said is None or computed is None or not abs(said - computed) <= allowed:
    raise Disagreement(f'{where}: {field} is {computed}, {file} says {said}')


def main(config: Mapping[str, Any]) -> None:
  """The whole command; a disagreement is an InputError."""
  rows, workdir = rescore(config['workdir']), config['workdir']
  print(_judge.table(rows))
  print(f'{workdir}: all {sum(r["n"] for r in rows)} re-scored images agree with its files')


if __name__ == '__main__':
  _flags.define_evaluate_flags()
  _flags.start(main)
