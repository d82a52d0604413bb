"""experiments.evaluate agrees with an honest run, and names what was tampered with."""

import csv
import functools
import json
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from adv2_jax import data, images, metrics, nets
from adv2_jax.weights import zoo
from adv2_jax.workdir import store
from experiments import _judge, _setup, evaluate

N = 5


@pytest.fixture(scope='module')
def honest(tmp_path_factory):
  """A run on a random net, judged by the library; its 'attack' is noise within ε."""
  folder = tmp_path_factory.mktemp('evaluate')
  variables = nets.build('scene_resnet').init(jax.random.key(1), jnp.zeros((1, 64, 64, 3)))
  np.savez(folder / 'weights.npz', **zoo.to_tensors(variables))
  config = {
    'model': 'scene_resnet',
    'weights': str(folder / 'weights.npz'),
    'mean': None,
    'std': ['0.25', '0.25', '0.25'],
    'dtype': 'float32',
    'image_size': None,
    'interpreters': ['cam'],
    'batch_size': 3,
    'epsilon': 0.031,
    'seed': 7,
  }
  workdir = store.Workdir.create(folder / 'run', config)
  clf, built = _setup.models(config)
  clean = data.scenes('test', N).images(np.arange(N))
  noise = np.random.RandomState(0).randint(-8, 9, clean.shape)
  attacked = np.clip(clean.astype(int) + noise, 0, 255).astype(np.uint8)
  masks = np.stack([data.scenes('test', N).mask(i) for i in range(N)])
  logits = np.asarray(jax.jit(lambda c, x: c(x).logits)(clf, images.from_uint8(attacked)))
  label, target = logits.argmin(-1), np.where(np.arange(N) < 3, logits.argmax(-1), 4)

  rows = []
  for ids in (np.array([0, 1, 2]), np.array([3, 4, 4])):
    keep = np.arange(3) < len(set(ids))
    keys = metrics.judge_keys(config['seed'], ids)
    x0 = jnp.asarray(images.from_uint8(clean[ids]))
    y, t = jnp.asarray(label[ids]), jnp.asarray(target[ids])
    two = functools.partial(_judge.two_class_maps, clf, built['cam'], y=y, target=t, key=keys)
    clean_maps = two(x=x0)
    wanted = clean_maps[0]
    for kind, pictures in (('benign', clean), ('adv2', attacked)):
      x8, is_attacked = jnp.asarray(images.from_uint8(pictures[ids])), kind == 'adv2'
      maps = two(x=x8)
      scores = _judge.score(
        clf, x0, x8, t, wanted, clean_maps, maps,
        epsilon=0.031, attacked=is_attacked, mask=masks[ids],
      )  # fmt: skip
      arrays = {
        store.image_folder(kind, 'cam'): pictures[ids],
        store.map_folder(kind, 'cam'): np.asarray(maps[int(is_attacked)]),
      }
      if kind == 'benign':
        arrays['maps/target/cam'] = np.asarray(wanted)
        arrays['masks'] = masks[ids].astype(np.uint8) * 255
      records = store.as_records(scores, keep, id=ids, label=y, target=t)
      workdir.write_shard(kind, 'cam', records, {k: v[keep] for k, v in arrays.items()})
  for kind in ('benign', 'adv2'):
    figures = metrics.aggregate(workdir.records(kind, 'cam'), attacked=kind == 'adv2')
    rows.append({'attack': kind, 'interpreter': 'cam', **figures})
  workdir.finish(rows, {})
  return workdir.path


@pytest.fixture
def copy(honest, tmp_path):
  shutil.copytree(honest, tmp_path / 'run')
  return tmp_path / 'run'


def test_an_honest_run_agrees(honest):
  rows = evaluate.rescore(str(honest))
  stored = json.loads((honest / 'metrics.json').read_text())['rows']
  assert [(r['attack'], r['n']) for r in rows] == [('benign', N), ('adv2', N)]
  assert rows[1]['asr'] >= 3 / N
  for row, said in zip(rows, stored, strict=True):
    for field in ('mc', 'map_l1', 'map_ssim_all', 'two_class_l1', 'l2_mean', 'energy_inside_all'):
      assert (row[field] is None) == (said[field] is None)
      if said[field] is not None:
        np.testing.assert_allclose(row[field], said[field], atol=1e-4)


def test_an_older_run_agrees(copy):
  """Without the figures that are counted since, and without digests."""
  result = json.loads((copy / 'metrics.json').read_text())
  for row in result['rows']:
    new = ('_median', 'gradient', 'flat', 'topk', 'kendall', 'pearson', 'centre')
    for field in [f for f in row if any(part in f for part in new)]:
      del row[field]
  (copy / 'metrics.json').write_text(json.dumps(result))
  assert len(evaluate.rescore(str(copy))) == 2


def test_other_weights_are_told_before_anything_is_scored(copy, monkeypatch):
  config = json.loads((copy / 'config.json').read_text())
  (copy / 'config.json').write_text(json.dumps(config | {'digests': {'weights': 'others'}}))
  monkeypatch.setattr(_setup, 'models', lambda _: pytest.fail('loaded'))
  with pytest.raises(store.StoreError, match=r'^weights .*weights\.npz changed since'):
    evaluate.rescore(str(copy))


def test_localisation_is_left_out_without_masks(copy):
  shutil.rmtree(copy / 'masks')
  rows = evaluate.rescore(str(copy))
  assert rows[1]['pointing_game_all'] is None
  assert rows[1]['map_l1_all'] is not None


def disagrees(path, match):
  with pytest.raises(evaluate.Disagreement, match=match):
    evaluate.rescore(str(path))


def test_exchanged_images_are_noticed(copy):
  a, b = (copy / f'examples/adv2/cam/{i:06d}.png' for i in (0, 3))
  one = a.read_bytes()
  a.write_bytes(b.read_bytes())
  b.write_bytes(one)
  disagrees(copy, r'examples/adv2/cam/000000\.png is outside of the perturbation set')


def test_a_pixel_outside_the_set_is_noticed(copy):
  file = copy / 'examples/adv2/cam/000004.png'
  image = images.read_image(file).copy()
  clean = images.read_image(copy / 'examples/benign/000004.png')
  image[5, 6, 1] = int(clean[5, 6, 1]) + (9 if clean[5, 6, 1] < 128 else -9)
  images.write_png(file, image)
  disagrees(copy, r'examples/adv2/cam/000004\.png is outside of the perturbation set')


def test_a_changed_map_is_noticed(copy):
  file = copy / 'maps/adv2/cam/000002.npy'
  m = np.load(file)
  m[3, 4] += 0.05 if m[3, 4] < 0.5 else -0.05
  np.save(file, m)
  disagrees(copy, r'maps/adv2/cam/000002\.npy differs from the fresh map by 0\.05')
  np.save(file, m[:4])
  disagrees(copy, r'maps/adv2/cam/000002\.npy has shape')


@pytest.mark.parametrize('name', ['examples/adv2/cam/000001.png', 'maps/target/cam/000001.npy'])
def test_a_missing_file_is_noticed(copy, name):
  (copy / name).unlink()
  disagrees(copy, rf'{name} is missing')


@pytest.mark.parametrize(
  ('field', 'change'),
  [
    ('prediction', lambda v: str((int(v) + 1) % 10)),
    ('success', lambda v: str(1 - int(v))),
    ('confidence', lambda v: str(float(v) + 0.01)),
    ('map_l1', lambda v: str(float(v) + 0.01)),
    ('map_iou', lambda v: ''),
  ],
)
def test_a_changed_table_is_noticed(copy, field, change):
  with open(copy / 'examples.csv', newline='') as file:
    lines = list(csv.DictReader(file))
  line = next(r for r in lines if (r['id'], r['attack']) == ('2', 'adv2'))
  line[field] = change(line[field])
  with open(copy / 'examples.csv', 'w', newline='') as file:
    writer = csv.DictWriter(file, list(line))
    writer.writeheader()
    writer.writerows(lines)
  disagrees(copy, f'adv2/cam, example 2: {field} is .*, examples.csv says')


@pytest.mark.parametrize(
  'field',
  [
    'asr',
    'n',
    'mc',
    'map_spearman',
    'map_l2_median',
    'linf_max',
    'map_mse_all',
    'map_topk',
    'map_kendall_all',
    'map_centre',
  ],
)
def test_a_changed_figure_is_noticed(copy, field):
  result = json.loads((copy / 'metrics.json').read_text())
  result['rows'][1][field] = result['rows'][1][field] * 0.9 + 0.05
  (copy / 'metrics.json').write_text(json.dumps(result))
  disagrees(copy, f'adv2/cam: {field} is .*, metrics.json says')


def test_the_command_tells_its_failure_in_the_last_line(tmp_path):
  command = [sys.executable, '-m', 'experiments.evaluate', '--workdir', str(tmp_path)]
  done = subprocess.run(command, capture_output=True, text=True, check=False)
  assert done.returncode == 1
  assert done.stderr.splitlines()[-1].endswith('the run is not finished; go on with it by --resume')
