"""`experiments.attack`: the target maps and classes that its flags ask for."""

import csv

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.ndimage
from cli import rows_of, run, select

from adv2_jax import data, interpreters
from adv2_jax.images import from_uint8, write_png
from adv2_jax.types import InputError
from adv2_jax.weights import zoo
from experiments import _targets, attack


def test_random_patch_targets(victim, tmp_path):
  """One patch for each example another one, and how well it is met."""
  workdir = run(
    victim, tmp_path / 'run', target_map='random_patch', num_examples=2, interpreters=['grad']
  )
  maps = [np.load(workdir / f'maps/target/grad/{i:06d}.npy') for i in (2, 3)]
  for m in maps:
    assert (((m >= 0.9) & (m <= 1)) | ((m >= 0) & (m <= 0.1))).all()
    assert 0.03 < (m > 0.5).mean() < 0.35
    assert scipy.ndimage.label(m > 0.5)[1] == 1
  assert (maps[0] != maps[1]).any()
  rows = {row['attack']: row for row in rows_of(workdir)}
  assert {row['target_map'] for row in rows.values()} == {'random_patch'}
  shown = [np.load(workdir / f'maps/adv2/grad/{i:06d}.npy') for i in (2, 3)]
  wanted = []
  for patch, m in zip(maps, shown, strict=True):
    inside = (patch > 0.5).ravel()
    top = set(np.argsort(-m.ravel(), kind='stable')[: inside.sum()].tolist())
    common = len(top & set(np.flatnonzero(inside).tolist()))
    wanted.append(common / (2 * inside.sum() - common))
  assert rows['adv2']['patch_iou_all'] == pytest.approx(np.mean(wanted), abs=1e-6)


def test_random_patches_are_circles_and_boxes_of_the_declared_size():
  maps = np.stack([_targets.random_patch(0, i, (56, 56)) for i in range(60)])
  patches = maps > 0.5
  assert maps[patches].min() >= 0.9
  assert maps[~patches].max() <= 0.1
  assert all(scipy.ndimage.label(patch)[1] == 1 for patch in patches)
  area = patches.mean((1, 2))
  assert area.min() > 0.9 * np.pi * (30 / 224) ** 2  # a circle of 30 pixels at 224
  assert area.max() < 1.05 * (121 / 224) ** 2
  assert len(np.unique(area.round(3))) > 30
  np.testing.assert_array_equal(maps[7], _targets.random_patch(0, 7, (56, 56)))
  assert ((_targets.random_patch(1, 7, (56, 56)) > 0.5) != patches[7]).any()


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
  clf = zoo.load_classifier('scene_resnet', victim['weights'])
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


def test_images_without_labels_are_of_the_class_they_are_taken_for(victim, tmp_path):
  """Files in one folder, with the least likely class as target; each is named in examples.csv."""
  image = np.load(victim['data_path'])['image']
  for i, one in enumerate(image):
    write_png(tmp_path / f'flat/{i}.png', one)
  folder = {'dataset': 'folder', 'data_path': str(tmp_path / 'flat'), 'labels': 'predicted'}
  changes = {'target_label': 'least_likely', 'num_examples': 2}
  workdir = run(victim | folder, tmp_path / 'run', **changes)
  clf = zoo.load_classifier('scene_resnet', victim['weights'])
  logits = np.asarray(clf(jnp.asarray(from_uint8(image[:2]))).logits)
  with open(workdir / 'examples.csv', newline='') as file:
    found = {(r['id'], r['file'], int(r['label']), int(r['target'])) for r in csv.DictReader(file)}
  best, worst = np.argmax(logits, -1), np.argmin(logits, -1)
  assert found == {(f'{i}', f'{i}.png', best[i], worst[i]) for i in range(2)}
  examples = select(victim | folder)
  assert (examples.num_seen, examples.num_correct) == (5, None)


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
    ([2.5], {'cam': np.zeros((1, 4, 4))}, r'id is float64\[1\]; expected whole numbers'),
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
    ('id,target\n²,3\n', 'line 2: ²,3 are not two whole numbers'),
    ('id,target\n2,{other}\n99,3\n', 'line 3: there is no example 99; ids are 0…9'),
    ('id,target\n9,{other}\n9,{own}\n', 'line 3: example 9 has the target . already'),
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


@pytest.fixture
def named(tmp_path):
  """A data set whose examples have files."""
  for i in range(3):
    write_png(tmp_path / f'images/ant/{i}.png', np.full((4, 4, 3), i, np.uint8))
  return data.load('folder', tmp_path / 'images')


def test_a_target_file_names_examples_by_number_or_file(named, tmp_path, monkeypatch):
  """As spreadsheets write it: a byte-order mark, blanks, decimals; its path with a tilde."""
  (tmp_path / 'targets.csv').write_bytes(
    b'\xef\xbb\xbfid , target\nant/2.png, 4\n1.0,5.0\n./ant/0.png,6\n'
  )
  monkeypatch.setenv('HOME', str(tmp_path))
  target_of = _targets.labels('~/targets.csv', 0, named, 10)
  assert [target_of(i, 0, -1) for i in range(3)] == [6, 5, 4]
  (tmp_path / 'targets.csv').write_text('id,target\n9.png,4\n')
  with pytest.raises(InputError, match=r'line 2: 9\.png,4 are .*file name such as ant/0\.png'):
    _targets.labels('~/targets.csv', 0, named, 10)
  (tmp_path / 'targets.csv').write_text('id,target\n0,4\n')
  with pytest.raises(InputError, match=r'no target for example 1 \(ant/1\.png\)'):
    _targets.labels('~/targets.csv', 0, named, 10)(1, 0, -1)
  np.savez(tmp_path / 'maps.npz', id=[2], cam=np.ones((1, 4, 4)))
  assert _targets.read_maps('~/maps.npz', ['cam'])['cam'][2].all()


@pytest.mark.parametrize('flag', ['²', '--1', '1_0', '٣'])
def test_a_target_class_is_a_whole_number(named, flag):
  """`str.isdigit` takes some of these, and `int` others."""
  with pytest.raises(
    InputError, match='expected random, least_likely, runner_up, untargeted, a class'
  ):
    _targets.labels(flag, 0, named, 10)


def test_a_target_file_in_another_encoding_is_named(named, tmp_path):
  file = tmp_path / 'targets.csv'
  file.write_bytes('id,target,what\n2,3,Käfer\n'.encode('latin-1'))
  with pytest.raises(InputError, match=r'targets\.csv is not a CSV file in UTF-8'):
    _targets.labels(str(file), 0, named, 10)


def test_random_targets_are_classes_that_the_decoder_knows():
  true, known = np.array([217, 0, 574, 217] * 50), (0, 217, 482, 574)
  target_of = _targets.labels('random', 3, data.scenes(n=len(true)), 1000, known)
  targets = np.array([target_of(i, label, -1) for i, label in enumerate(true)])
  places = np.searchsorted(known, targets)
  assert (np.array(known)[places] == targets).all()
  offset = np.random.RandomState(3).randint(1, 4, size=200)
  np.testing.assert_array_equal((places - np.searchsorted(known, true)) % 4, offset)


def test_a_label_that_is_none_of_the_target_classes_gets_each_of_them():
  target_of = _targets.labels('random', 3, data.scenes(n=90), 10, (3, 5, 7))
  assert {target_of(i, 2, -1) for i in range(30)} == {3, 5, 7}
  assert {target_of(i, 9, -1) for i in range(30, 60)} == {3, 5, 7}
  assert {target_of(i, 5, -1) for i in range(60, 90)} == {3, 7}
