"""`experiments.attack` end to end on a tiny data set: files, fields, resuming, and refusals."""

import csv
import functools
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest
import scipy.ndimage
from conftest import flag_defaults
from parity.weights import numpy_weights

from adv2_jax import checkpoints, data, interpreters, metrics, nets, presets
from adv2_jax.images import encode_png, from_uint8
from adv2_jax.interpreters import masking
from adv2_jax.types import InputError
from experiments import _flags, _setup, _targets, attack, evaluate

SIZE, EPSILON, SEED = 32, 0.05, 3
WHOLE = {'interpreters': ['grad', 'cam']}
FIELDS = {
  *('interpreter', 'attack', 'framework', 'target_map', 'n', 'n_skipped', 'asr', 'asr_ci95', 'mc'),
  *('map_l1', 'map_l2', 'map_mse', 'map_iou', 'map_spearman', 'map_ssim', 'two_class_l1'),
  *('pointing_game', 'energy_inside', 'linf_max', 'l2_mean', 'out_of_set', 'nonfinite'),
  *('gradient_evaluations', 'network_passes', 'seconds', 'seconds_compile'),
}
COLUMNS = [
  *('id', 'attack', 'interpreter', 'label', 'target', 'prediction', 'confidence', 'success'),
  *('map_l1', 'map_iou'),
]


@functools.cache
def defaults():
  """The command's flags."""
  return flag_defaults(_flags.define_data_flags, _flags.define_attack_flags)


@pytest.fixture(scope='module')
def victim(tmp_path_factory):
  """Flags of a random net that gets 8 of 10 images right, spread over several classes."""
  folder = tmp_path_factory.mktemp('victim')
  rng = np.random.RandomState(0)
  waves = np.sin(np.arange(SIZE).reshape(-1, 1, 1) * rng.uniform(0.1, 2, (3, 1, 1, 3)))
  noise = rng.uniform(-1, 1, (10, SIZE, SIZE, 3))
  image = np.uint8(127 + 80 * waves[np.arange(10) % 3] + 40 * noise)  # three kinds
  module = nets.build('scene_resnet')
  shapes = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, SIZE, SIZE, 3)))
  tensors = numpy_weights(checkpoints.tensor_shapes(shapes), seed=1)
  for shift in (True, False):
    checkpoints.write_safetensors(folder / 'net.safetensors', tensors)
    clf = checkpoints.load_classifier('scene_resnet', folder / 'net.safetensors')
    logits = np.asarray(clf(from_uint8(image)).logits)
    if shift:  # else all images are of one class
      tensors['fc.bias'] = tensors['fc.bias'] - logits.mean(0)
  label = logits.argmax(-1)
  assert len(set(label[2:7].tolist())) == 3
  label[:2] = (label[:2] + 1) % 10
  np.savez(folder / 'data.npz', image=image, label=label)
  mask = np.zeros((10, SIZE, SIZE), bool)
  mask[:, 8:20, 5:25] = True
  mask[3] = False  # has no object
  np.savez(folder / 'masks.npz', mask=mask)
  return {
    'dataset': 'npz',
    'data_path': str(folder / 'data.npz'),
    'masks': str(folder / 'masks.npz'),
    'image_size': SIZE,
    'weights': str(folder / 'net.safetensors'),
    'interpreters': ['cam'],
    'epsilon': EPSILON,
    'num_examples': 5,
    'batch_size': 2,
    'steps_s2': 4,
    'seed': SEED,
    'num_devices': 1,
  }


def run(victim, workdir, resume=False, **changes):
  """The command in this process; what it has compiled serves the next test too."""
  attack.run(defaults() | victim | changes | {'workdir': str(workdir), 'resume': resume})
  return pathlib.Path(workdir)


def select(victim, **changes):
  """What a run would work on."""
  return _setup.select(_setup.load(defaults() | victim | changes))


def command(flags, cwd):
  """The command as a user runs it, on one device."""
  tree = pathlib.Path(attack.__file__).parent.parent
  arguments = [f'--{k}={",".join(v) if isinstance(v, list) else v}' for k, v in flags.items()]
  env = os.environ | {'PYTHONPATH': str(tree), 'XLA_FLAGS': '--xla_backend_optimization_level=0'}
  return subprocess.run(
    [sys.executable, '-m', 'experiments.attack', *arguments],
    cwd=cwd,
    env=env,
    capture_output=True,
    text=True,
    check=False,
  )


@pytest.fixture(scope='module')
def finished(victim, tmp_path_factory):
  """A whole run of two interpreters, not to be written to."""
  return run(victim, tmp_path_factory.mktemp('runs') / 'whole', **WHOLE)


def contents(workdir, *parts):
  """{path: bytes} of the files below these parts of a workdir."""
  found = [p for part in parts for p in [workdir / part, *(workdir / part).rglob('*')]]
  return {str(p.relative_to(workdir)): p.read_bytes() for p in found if p.is_file()}


def rows_of(workdir):
  """The rows of metrics.json, times aside."""
  rows = json.loads((workdir / 'metrics.json').read_text())['rows']
  return [{k: v for k, v in row.items() if not k.startswith('seconds')} for row in rows]


# --- what is written ------------------------------------------------------------------------------


def test_the_files_of_the_contract(finished):
  """The first two images are misclassified, so ids 2 to 6 are attacked."""
  names = [f'{i:06d}' for i in range(2, 7)]
  folders = ('benign', 'pgd', 'adv2/grad', 'adv2/cam')
  images = {f'examples/{folder}/{i}.png' for folder in folders for i in names}
  assert contents(finished, 'examples').keys() == images
  assert contents(finished, 'masks').keys() == {f'masks/{i}.png' for i in names}
  folders = [f'{k}/{name}' for k in ('target', 'benign', 'pgd', 'adv2') for name in ('grad', 'cam')]
  maps = {f'maps/{folder}/{i}.npy' for folder in folders for i in names}
  assert contents(finished, 'maps').keys() == maps
  for name in ('metrics.json', 'examples.csv', 'report.html'):
    assert (finished / name).stat().st_size > 0
  assert list((finished / 'figures').glob('*.png'))
  for name, side in (('grad', 16), ('cam', 4)):
    saved = np.load(finished / f'maps/adv2/{name}/000002.npy')
    assert saved.dtype == np.float32
    assert saved.shape == (side, side)


def test_the_fields_of_metrics_json(finished):
  told = json.loads((finished / 'metrics.json').read_text())
  assert told['config'].keys() == defaults().keys()
  assert {'jax', 'devices', 'commit'} <= told['environment'].keys()
  assert [(r['interpreter'], r['attack']) for r in told['rows']] == [
    (name, a) for name in ('grad', 'cam') for a in ('benign', 'other', 'pgd', 'adv2')
  ]
  for row in told['rows']:
    assert row.keys() >= FIELDS
    assert {f'{field}_all' for field in FIELDS if field.startswith('map_')} <= row.keys()
    assert row['n_skipped'] == 2
    assert row['nonfinite'] == 0
    if row['attack'] != 'other':
      assert row['n'] == 5
      assert row['out_of_set'] == 0
    for field in ('pointing_game_all', 'energy_inside_all'):
      assert 0 <= row[field] <= 1
  by_kind = {(row['attack'], row['interpreter']): row for row in told['rows']}
  # 4 steps, and the last iterate's check; GRAD's are of second order and its map is made afresh.
  grad = 4 * 4 + 4 // presets.FAST['grad'].every * 2 + 2 + 2
  passes = {('pgd', 'grad'): 9, ('pgd', 'cam'): 9, ('adv2', 'grad'): grad, ('adv2', 'cam'): 9}
  for kind, number in passes.items():
    assert 0 < by_kind[kind]['linf_max'] <= EPSILON + 0.5 / 255
    assert by_kind[kind]['gradient_evaluations'] == 4
    assert by_kind[kind]['network_passes'] == number
  for name in ('grad', 'cam'):
    benign = by_kind['benign', name]
    assert benign['linf_max'] == benign['map_l1'] == benign['asr'] == 0
    assert benign['mc'] is None


def test_evaluate_agrees_with_the_run_and_sees_a_forged_figure(finished, tmp_path):
  """Also one that cannot be computed: there is no confidence without a success."""
  assert len(evaluate.rescore(str(finished))) == 6
  shutil.copytree(finished, tmp_path / 'run')
  result = json.loads((finished / 'metrics.json').read_text())
  result['rows'][0]['mc'] = 0.9
  (tmp_path / 'run/metrics.json').write_text(json.dumps(result))
  with pytest.raises(InputError, match=r'benign/grad: mc is None, metrics\.json says 0\.9'):
    evaluate.rescore(str(tmp_path / 'run'))


def test_mask_has_its_ceiling_beside_it(victim, tmp_path, monkeypatch):
  """The clean image explained with another key; evaluate re-scores what is kept."""
  quick = masking.CIFAR._replace(steps=8, area=0.0)  # this net is never sure enough for an area
  monkeypatch.setattr(masking, 'CIFAR', quick)
  interpreters._build.cache_clear()
  try:
    path = run(victim, tmp_path / 'run', interpreters=['mask'], num_examples=2)
    assert len(evaluate.rescore(str(path))) == 3
  finally:
    interpreters._build.cache_clear()
  rows = {row['attack']: row for row in rows_of(path)}
  assert list(rows) == ['benign', 'again', 'other', 'pgd', 'adv2']
  assert rows['benign']['map_l1_all'] == 0
  assert 1e-3 < rows['again']['map_l1_all'] < 0.3  # rounding alone would be less
  # 4 steps with 4 masks each; the path before them; the last iterate's check.
  assert rows['adv2']['network_passes'] == 2 * 8 + 1 + 4 * 14 + 7
  for kind in ('target', 'benign', 'pgd', 'adv2'):
    assert np.load(path / f'maps/{kind}/mask/000002.npy').shape == (8, 8)
  assert not (path / 'maps/again').exists()


def test_each_line_of_examples_csv_is_true(finished, victim):
  """Recomputed from the PNGs by the real net, in this test's own words."""
  clf = checkpoints.load_classifier('scene_resnet', victim['weights'])
  cam = interpreters.build('cam', SIZE)
  labels = np.load(victim['data_path'])['label']
  with open(finished / 'examples.csv', newline='') as file:
    lines = list(csv.DictReader(file))
  assert list(lines[0]) == COLUMNS
  targets = (labels + np.random.RandomState(SEED).randint(1, 10, size=10)) % 10
  shown = {'benign': labels, 'pgd': targets, 'adv2': targets}

  @jax.jit
  def judge(clf, x, y):
    return jax.nn.softmax(clf(x).logits), cam.explain(clf, x, y, jax.random.key(0))

  for kind, folder in (('benign', 'benign'), ('pgd', 'pgd'), ('adv2', 'adv2/cam')):
    told = [r for r in lines if (r['attack'], r['interpreter']) == (kind, 'cam')]
    ids = np.array([int(line['id']) for line in told])
    np.testing.assert_array_equal(ids, range(2, 7))
    column = {name: np.array([float(line[name]) for line in told]) for name in COLUMNS[3:]}
    x = []
    for i in ids:
      with PIL.Image.open(finished / f'examples/{folder}/{i:06d}.png') as png:
        x.append(from_uint8(np.asarray(png)))
    p, m = judge(clf, np.stack(x), jnp.asarray(shown[kind][ids]))
    saved, wanted = (
      np.stack([np.load(finished / f'maps/{k}/cam/{i:06d}.npy') for i in ids])
      for k in (kind, 'target')
    )
    np.testing.assert_array_equal(column['label'], labels[ids])
    np.testing.assert_array_equal(column['target'], targets[ids])
    np.testing.assert_array_equal(column['prediction'], p.argmax(-1))
    np.testing.assert_array_equal(column['success'], p.argmax(-1) == targets[ids])
    of_target = p[np.arange(5), targets[ids]]
    np.testing.assert_allclose(column['confidence'], of_target, rtol=1e-3, atol=1e-6)
    np.testing.assert_allclose(m, saved, atol=1e-4)
    np.testing.assert_allclose(column['map_l1'], np.abs(m - wanted).mean((1, 2)), atol=1e-4)
    np.testing.assert_allclose(column['map_iou'], metrics.map_iou(m, wanted), atol=1e-4)


def test_other_images_are_of_the_same_predicted_class(finished, victim):
  labels = np.load(victim['data_path'])['label']
  with open(finished / 'examples.csv', newline='') as file:
    others = [line for line in csv.DictReader(file) if line['attack'] == 'other']
  assert others
  for line in others:
    assert int(line['prediction']) == labels[int(line['id'])]


def test_the_attack_does_something(finished, victim):
  """With steps enough both rows succeed more than chance; here: the target's probability rises."""
  with open(finished / 'examples.csv', newline='') as file:
    lines = list(csv.DictReader(file))
  p = {
    kind: np.array([float(r['confidence']) for r in lines if r['attack'] == kind])
    for kind in ('benign', 'pgd', 'adv2')
  }
  assert (p['pgd'] > p['benign']).all()
  assert p['adv2'].mean() > p['benign'].mean()


# --- resuming -------------------------------------------------------------------------------------


@pytest.mark.parametrize('gone', [0, 1, 'grad'])
def test_resume_makes_what_is_missing_byte_for_byte(finished, victim, tmp_path, gone):
  """Shards gone, as after a kill: every other, or all of one interpreter; the rest stays."""
  workdir = tmp_path / 'run'
  shutil.copytree(finished, workdir)
  for name in ('metrics.json', 'examples.csv', 'report.html', 'history.json'):
    (workdir / name).unlink()
  records = sorted((workdir / 'shards').glob('*.json'))
  assert len(records) >= 18
  kept = {}
  for i, record in enumerate(records):
    shard = json.loads(record.read_text())
    if gone in (i % 2, shard['interpreter']):
      record.unlink()
      if shard['attack'] == 'adv2':
        for example in shard['records']:
          folder = workdir / 'examples/adv2' / shard['interpreter']
          (folder / f'{example["id"]:06d}.png').unlink()
    else:
      kept[record] = record.stat().st_mtime_ns
  run(victim, workdir, resume=True, **WHOLE)
  parts = ('examples', 'maps', 'masks', 'examples.csv')
  assert contents(workdir, *parts) == contents(finished, *parts)
  assert rows_of(workdir) == rows_of(finished)
  assert {record: record.stat().st_mtime_ns for record in kept} == kept


def test_resume_of_a_finished_run_attacks_nothing(finished, victim, tmp_path, monkeypatch):
  workdir = tmp_path / 'run'
  shutil.copytree(finished, workdir)
  monkeypatch.setattr(attack.api, 'attack_batch', lambda *_, **__: pytest.fail('attacked again'))
  run(victim, workdir, resume=True, **WHOLE)
  assert rows_of(workdir) == rows_of(finished)


def test_an_existing_workdir_is_refused(finished, victim):
  before = contents(finished, '.')
  with pytest.raises(InputError, match='not empty; go on with that run by --resume'):
    run(victim, finished, **WHOLE)
  assert contents(finished, '.') == before


@pytest.mark.parametrize(
  'change',
  [{'epsilon': 0.04}, {'seed': 4}, {'steps_s2': 5}, {'interpreters': ['cam']}, {'batch_size': 3}],
)
def test_resume_with_another_config_is_refused(finished, victim, change):
  before = contents(finished, '.')
  flag = next(iter(change))
  with pytest.raises(InputError, match=f'was made with --{flag}'):
    run(victim, finished, resume=True, **WHOLE | change)
  assert contents(finished, '.') == before


@pytest.mark.slow
def test_what_comes_out_does_not_depend_on_batches_and_devices(finished, victim, tmp_path):
  """Sign steps: the images are equal to the byte; two devices, batches cut elsewhere."""
  other = run(victim, tmp_path / 'run', **WHOLE, batch_size=3, num_devices=2)
  parts = ('examples/benign', 'examples/pgd', 'maps/target')
  assert contents(other, parts[0], parts[1]) == contents(finished, parts[0], parts[1])
  for name, content in contents(other, 'maps/adv2').items():
    assert content[:128] == (finished / name).read_bytes()[:128]
    np.testing.assert_allclose(np.load(other / name), np.load(finished / name), atol=1e-3)


# --- which examples -------------------------------------------------------------------------------


@pytest.fixture
def damaged(victim, tmp_path, monkeypatch):
  """Flags of the same images, the fourth one cut short, as a set too large to be checked whole."""
  monkeypatch.setattr(data, 'CHECK_ALL_UP_TO', 5)
  arrays = np.load(victim['data_path'])
  files = [encode_png(image) for image in arrays['image']]
  files[3] = files[3][:200]
  offsets = np.cumsum([0, *map(len, files)])
  blob = np.frombuffer(b''.join(files), np.uint8)
  np.savez(tmp_path / 'packed.npz', blob=blob, offsets=offsets, y=arrays['label'])
  return victim | {'dataset': 'packed', 'data_path': str(tmp_path / 'packed.npz')}


def test_damaged_images_are_skipped_and_too_few_are_told(damaged, tmp_path, capsys):
  """2, 4, 5, …, 9 are right; the first five of these are passed over, and 0, 1 and 3 skipped."""
  changes = {'skip_corrupt': True, 'skip_examples': 5, 'num_examples': 64}
  workdir = run(damaged, tmp_path / 'run', **changes)
  with open(workdir / 'examples.csv', newline='') as file:
    assert {int(line['id']) for line in csv.DictReader(file)} == {8, 9}
  assert {row['n_skipped'] for row in rows_of(workdir)} == {3}
  last = [line for line in capsys.readouterr().err.splitlines() if 'num_examples' in line]
  assert last == ['2 examples instead of --num_examples 64: the classifier gets no more right']


def test_a_damaged_image_stops_the_run_before_it_starts(damaged, tmp_path):
  with pytest.raises(InputError, match=r'image 3 of .*packed\.npz cannot be decoded'):
    run(damaged, tmp_path / 'run')
  assert not (tmp_path / 'run').exists()


def test_examples_are_passed_over(victim):
  examples = select(victim, skip_examples=2, num_examples=3)
  assert examples.id.tolist() == [4, 5, 6]
  assert examples.num_skipped == 2


def test_a_partner_is_looked_for_among_the_images_of_its_class_only(victim, monkeypatch):
  """Beyond the last example, too, until one is found."""
  asked, real = [], _setup.predictions

  def predictions(setup, ids):
    asked.append(ids.tolist())
    return real(setup, ids)

  monkeypatch.setattr(_setup, 'predictions', predictions)
  label = np.load(victim['data_path'])['label']
  same = [i for i in range(3, 10) if label[i] == label[2]]
  assert select(victim, num_examples=1).other.tolist() == same[:1]
  assert asked == [list(range(10)), same]


def test_the_classifier_lies_on_all_devices(victim):
  setup = _setup.load(defaults() | victim | {'num_devices': 2})
  for leaf in jax.tree.leaves(setup.clf):
    assert leaf.sharding.is_fully_replicated
    assert len(leaf.devices()) == 2


def test_the_commit_is_that_of_the_folder_s_own_repository(tmp_path):
  """Not that of one around an installed package."""
  (tmp_path / 'site-packages').mkdir()
  identity = ['-c', 'user.name=a', '-c', 'user.email=a@b']
  for step in (['init', '-q'], [*identity, 'commit', '-q', '--allow-empty', '-m', 'one']):
    subprocess.run(['git', *step], cwd=tmp_path, check=True)
  assert re.fullmatch('[0-9a-f]{7,}', attack.commit_of(tmp_path))
  assert attack.commit_of(tmp_path / 'site-packages') is None


# --- targets --------------------------------------------------------------------------------------


def test_random_patch_targets(victim, tmp_path):
  """One patch of 10–30 % of the area, for each example another one."""
  workdir = run(
    victim, tmp_path / 'run', target_map='random_patch', num_examples=2, interpreters=['grad']
  )
  maps = [np.load(workdir / f'maps/target/grad/{i:06d}.npy') for i in (2, 3)]
  for m in maps:
    assert set(np.unique(m)) == {0.0, 1.0}
    assert 0.05 < m.mean() < 0.35
    assert scipy.ndimage.label(m)[1] == 1
  assert (maps[0] != maps[1]).any()
  assert {row['target_map'] for row in rows_of(workdir)} == {'random_patch'}


def test_random_patches_are_circles_and_boxes_of_the_declared_size():
  patches = np.stack([_targets.random_patch(0, i, (56, 56)) for i in range(60)])
  assert set(np.unique(patches)) == {0.0, 1.0}
  assert all(scipy.ndimage.label(patch)[1] == 1 for patch in patches)
  area = patches.mean((1, 2))
  assert area.min() > 0.05
  assert area.max() < 0.31
  assert len(np.unique(area.round(3))) > 30
  np.testing.assert_array_equal(patches[7], _targets.random_patch(0, 7, (56, 56)))
  assert (_targets.random_patch(1, 7, (56, 56)) != patches[7]).any()


def test_random_class_targets_are_maps_of_the_target_class(victim, tmp_path):
  """The map of an image that is rightly taken for the target class, for that class."""
  labels = np.load(victim['data_path'])['label']
  wanted = sorted(set(labels[2:].tolist()))[:2]
  file = tmp_path / 'targets.csv'
  pairs = [(i, next(c for c in wanted if c != labels[i])) for i in range(2, 10)]
  file.write_text('id,target\n' + ''.join(f'{i},{c}\n' for i, c in pairs))
  workdir = run(
    victim, tmp_path / 'run', target_map='random_class', target_label=str(file), num_examples=3
  )
  clf = checkpoints.load_classifier('scene_resnet', victim['weights'])
  image = np.load(victim['data_path'])['image']
  for i, c in pairs[:3]:
    of_class = [j for j in range(2, 10) if labels[j] == c]
    x, y = jnp.asarray(from_uint8(image[of_class])), jnp.full(len(of_class), c)
    maps = np.asarray(jax.jit(interpreters.cam().explain)(clf, x, y, jax.random.key(0)))
    target_map = np.load(workdir / f'maps/target/cam/{i:06d}.npy')
    assert np.abs(maps - target_map).max((1, 2)).min() < 1e-4
  with open(workdir / 'examples.csv', newline='') as lines:
    assert {(int(r['id']), int(r['target'])) for r in csv.DictReader(lines)} == set(pairs[:3])


def test_random_class_without_an_image_of_that_class(victim, tmp_path):
  labels = np.load(victim['data_path'])['label']
  absent = min(set(range(10)) - set(labels[2:].tolist()))
  with pytest.raises(InputError, match=f'no correctly classified image of class {absent}'):
    run(victim, tmp_path / 'run', target_map='random_class', target_label=str(absent))
  assert not (tmp_path / 'run').exists()


def test_least_likely_targets(victim, tmp_path):
  workdir = run(victim, tmp_path / 'run', target_label='least_likely', num_examples=2)
  clf = checkpoints.load_classifier('scene_resnet', victim['weights'])
  x = from_uint8(np.load(victim['data_path'])['image'][2:4])
  worst = np.argmin(clf(jnp.asarray(x)).logits, -1)
  with open(workdir / 'examples.csv', newline='') as file:
    found = {int(r['id']): int(r['target']) for r in csv.DictReader(file)}
  assert found == {2: worst[0], 3: worst[1]}


def write_maps(path, ids, **arrays):
  np.savez(path, id=ids, **arrays)
  return str(path)


def test_given_targets(victim, tmp_path):
  """A map is found by its example's id, not by its row."""
  maps = np.random.RandomState(0).rand(4, 4, 4)
  file = write_maps(tmp_path / 'maps.npz', [3, 9, 2, 4], cam=maps)
  workdir = run(victim, tmp_path / 'run', target_map=file, num_examples=2)
  for i, row in ((2, 2), (3, 0)):
    found = np.load(workdir / f'maps/target/cam/{i:06d}.npy')
    np.testing.assert_array_equal(found, maps[row].astype(np.float32))


@pytest.mark.parametrize(
  ('ids', 'arrays', 'message'),
  [
    ([2, 3], {'cam': np.zeros((2, 4, 4))}, 'no target map for example 4'),
    ([2, 3, 4, 5, 6], {'cam': np.zeros((5, 8, 8))}, r'maps of cam are \(8, 8\); expected \(4, 4\)'),
    ([2, 3], {'grad': np.zeros((2, 4, 4))}, "no array 'cam'; it has: grad, id"),
    ([2, 3], {'cam': np.zeros((3, 4, 4))}, 'expected one map per id'),
    ([2, 3], {'cam': np.zeros((2, 16))}, 'expected one map per id'),
    ([2], {'cam': np.array([[['x']]])}, 'expected one map per id'),
    ([2], {'cam': np.full((1, 4, 4), 1.5)}, r'not within \[0,1\]'),
    ([2], {'cam': np.full((1, 4, 4), np.nan)}, r'not within \[0,1\]'),
  ],
)
def test_bad_given_targets(victim, tmp_path, monkeypatch, ids, arrays, message):
  monkeypatch.setattr(attack.api, 'attack_batch', lambda *_, **__: pytest.fail('work was done'))
  file = write_maps(tmp_path / 'maps.npz', ids, **arrays)
  with pytest.raises(InputError, match=message):
    run(victim, tmp_path / 'run', target_map=file)
  assert not (tmp_path / 'run').exists()


@pytest.mark.parametrize(
  ('text', 'message'),
  [
    ('id,target\n2,{own}\n', 'target .* of example 2 is its true class'),
    ('id,target\n2,10\n', r'line 2: target 10 is outside 0…9'),
    ('id,target\n2,cat\n', r'line 2: 2,cat are not two whole numbers'),
    ('id,target\n2\n', 'line 2: 2, are not two whole numbers'),
    ('image,class\n2,3\n', r"starts with \['image', 'class'\]; expected the columns id,target"),
    ('', 'expected the columns id,target'),
    ('id,target\n9,{other}\n', 'no target for example 2; add a line 2,<class>'),
  ],
)
def test_bad_target_files(victim, tmp_path, text, message):
  labels = np.load(victim['data_path'])['label']
  other = next(c for c in range(10) if c != labels[9])
  file = tmp_path / 'targets.csv'
  file.write_text(text.format(own=labels[2], other=other))
  with pytest.raises(InputError, match=message):
    run(victim, tmp_path / 'run', target_label=str(file))
  assert not (tmp_path / 'run').exists()


def test_a_target_file_in_another_encoding_is_named(tmp_path):
  file = tmp_path / 'targets.csv'
  file.write_bytes('id,target,what\n2,3,Käfer\n'.encode('latin-1'))
  with pytest.raises(InputError, match=r'targets\.csv is not a CSV file in UTF-8'):
    _targets.labels(str(file), 0, np.zeros(10, int), 10)


# --- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    ({'epsilon': 0.0}, '--epsilon is 0.0; expected 0 < epsilon ≤ 1'),
    ({'epsilon': 8.0}, '--epsilon is 8.0'),
    ({'epsilon': float('nan')}, '--epsilon is nan'),
    ({'num_examples': 0}, '--num_examples is 0; expected at least 1'),
    ({'batch_size': -1}, '--batch_size is -1'),
    ({'steps_s2': 0}, '--steps_s2 is 0'),
    ({'steps_s1': -1}, '--steps_s1 is -1'),
    ({'seed': -1}, '--seed is -1'),
    ({'num_devices': 99}, '--num_devices is 99; this machine has 8'),
    ({'model': 'vgg16'}, "--model 'vgg16' is unknown; expected one of .*resnet18"),
    ({'interpreters': ['cam', 'lime']}, "interpreter 'lime' is unknown; expected one of grad, cam"),
    ({'interpreters': []}, '--interpreters is'),
    ({'interpreters': ['cam', 'cam']}, 'expected distinct names'),
    ({'dataset': 'mnist'}, 'mnist.*scenes'),
    ({'data_path': 'nowhere.npz'}, '--data_path nowhere.npz does not exist'),
    ({'data_path': None}, '--dataset npz needs --data_path'),
    ({'weights': 'nowhere.npz'}, 'nowhere.npz'),
    ({'target_map': 'circle'}, "--target_map is 'circle'; expected benign, random_class"),
    ({'target_label': 'best'}, "--target_label is 'best'; expected random, least_likely"),
    ({'target_label': '10'}, 'target 10 is outside 0…9'),
    ({'mean': ['0.5', 'x', '0.5']}, '--mean is 0.5,x,0.5; expected three finite numbers'),
    ({'std': ['0.5', '0', '0.5']}, '--std is 0.5,0,0.5; expected three positive numbers'),
  ],
)
def test_bad_flags_are_told_before_anything_is_written(victim, tmp_path, change, message):
  workdir = tmp_path / 'run'
  with pytest.raises(InputError, match=message) as error:
    run(victim, workdir, **change)
  assert '\n' not in str(error.value)
  assert not workdir.exists()


def test_a_classifier_that_gets_nothing_right(victim, tmp_path):
  arrays = dict(np.load(victim['data_path']))
  wrong = np.where(np.arange(10) < 2, arrays['label'], (arrays['label'] + 5) % 10)
  np.savez(tmp_path / 'data.npz', image=arrays['image'], label=wrong)
  with pytest.raises(InputError, match=r'gets 0 of 10 images right.*check --weights'):
    run(victim, tmp_path / 'run', data_path=str(tmp_path / 'data.npz'))
  assert not (tmp_path / 'run').exists()


def test_an_image_outside_of_the_set_is_told_and_not_written(victim, tmp_path, monkeypatch):
  real = attack.api.attack_batch

  def far(*given, **options):
    x8, history = real(*given, **options)
    return 1 - x8, history

  monkeypatch.setattr(attack.api, 'attack_batch', far)
  with pytest.raises(InputError, match='pgd on cam: the image of example 2 is outside') as error:
    run(victim, tmp_path / 'run', num_examples=2)
  assert '\n' not in str(error.value)
  assert not contents(tmp_path / 'run', 'examples/pgd')


def test_as_a_command_a_refusal_is_the_last_line_on_stderr(victim, tmp_path):
  """Weights that would have to be unpickled; no traceback, nothing written, exit code not 0."""
  (tmp_path / 'net.pth').write_bytes(b'\x80\x02}q\x00.')
  done = command(victim | {'weights': 'net.pth', 'workdir': 'run'}, tmp_path)
  assert done.returncode != 0
  last = done.stderr.strip().splitlines()[-1]
  assert 'net.pth' in last
  assert 'experiments.convert' in last
  assert 'Traceback' not in done.stderr
  assert not (tmp_path / 'run').exists()


def test_half_a_weights_file(victim, tmp_path):
  whole = pathlib.Path(victim['weights']).read_bytes()
  half = tmp_path / 'half.safetensors'
  half.write_bytes(whole[: len(whole) // 2])
  with pytest.raises(InputError, match=r'half\.safetensors') as error:
    run(victim, tmp_path / 'run', weights=str(half))
  assert '\n' not in str(error.value)
  assert not (tmp_path / 'run').exists()


def test_as_a_command_it_ends_with_the_table_and_the_report(victim, tmp_path):
  """The same run in another process and directory, with defaults from the flags."""
  done = command(victim | {'num_examples': 2, 'workdir': 'run'}, tmp_path)
  assert done.returncode == 0, done.stderr
  *table, last = done.stdout.strip().splitlines()
  assert last == 'run/report.html'
  assert any('| cam | adv2 | 2 |' in line for line in table)
  config = json.loads((tmp_path / 'run/metrics.json').read_text())['config']
  expected = defaults() | victim | {'num_examples': 2, 'workdir': 'run'}
  assert config == expected
