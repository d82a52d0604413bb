"""experiments.transfer: the images of a run, seen by those that were not attacked."""

import csv
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest
from conftest import flag_defaults
from parity.weights import numpy_weights

from adv2_jax import metrics, nets
from adv2_jax.types import InputError
from adv2_jax.weights import files as weight_files
from adv2_jax.weights import zoo
from adv2_jax.workdir import figures
from adv2_jax.workdir.results import read_results
from experiments import _flags, _judge, _matrix, _setup, transfer


def call(workdir, **flags):
  defaults = flag_defaults(_flags.define_transfer_flags)
  return transfer.run(defaults | {'workdir': str(workdir)} | flags)


def rows_in(workdir):
  found = json.loads((workdir / 'transfer/transfer.json').read_text())['rows']
  return {(r['attack'], r['attacked'], r['seen_by'], r['model'], r['weights']): r for r in found}


def by(workdir):
  """Of the classifier attacked alone."""
  own = _matrix.classifier_of(read_results(workdir).config)
  return {key[:3]: row for key, row in rows_in(workdir).items() if key[3:] == own}


@pytest.fixture(scope='module')
def copy(finished, tmp_path_factory):
  return shutil.copytree(finished, tmp_path_factory.mktemp('transfer') / 'run')


@pytest.fixture(scope='module')
def seen(copy):
  """A run on GRAD and CAM, seen by GRAD, CAM and Grad-CAM."""
  call(copy, interpreters=['grad', 'cam', 'grad_cam'])
  return copy


@pytest.fixture(scope='module')
def other(tmp_path_factory):
  """(classes, fields of its card) -> weights of another net."""
  folder = tmp_path_factory.mktemp('others')

  def make(classes=10, **card):
    module = nets.build('scene_resnet', num_classes=classes)
    shapes = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
    file = folder / f'net-{classes}-{len(card)}.safetensors'
    weight_files.write_safetensors(file, numpy_weights(zoo.tensor_shapes(shapes), seed=5))
    if card:
      whole = dict.fromkeys(zoo.CARD_FIELDS) | {'mean': [0.5] * 3, 'std': [0.25] * 3}
      file.with_suffix('.json').write_text(json.dumps(whole | card))
    return str(file)

  return make


def test_who_was_attacked_sees_what_the_run_says(seen):
  found, run = by(seen), read_results(seen)
  own = [('adv2', 'grad'), ('adv2', 'cam'), ('pgd', 'grad'), ('pgd', 'cam')]
  for attack, name in own:
    row = found[attack, 'none' if attack == 'pgd' else name, name]
    said = run.row(attack, name)
    checked = [f for f in said if f in row and f not in ('attack', 'asr_ci95')]
    assert {'asr', 'mc', 'map_kendall', 'map_l1_median', 'energy_inside_all'} <= {*checked}
    for field in checked:
      if said[field] is None:
        assert row[field] is None
      else:
        np.testing.assert_allclose(row[field], said[field], atol=1e-5, err_msg=field)
    assert row['asr_ci95'] == said['asr_ci95']


def test_who_was_not_attacked_compares_with_its_own_benign_map(seen):
  results = read_results(seen)
  clf, built = _setup.models(dict(results.config) | {'interpreters': ['grad_cam']})
  ids = results.ids('cam')
  label, target = (
    jnp.array([int(results.example('adv2', 'cam', i)[k]) for i in ids]) for k in ('label', 'target')
  )
  keys = metrics.judge_keys(results.config['seed'], ids)
  explain = jax.jit(built['grad_cam'].explain)
  benign = explain(clf, _judge.read_images(results, 'benign', 'cam', ids), label, keys)
  found = by(seen)
  for attack, attacked in (('adv2', 'cam'), ('adv2', 'grad'), ('pgd', 'none')):
    name = 'cam' if attacked == 'none' else attacked
    fresh = explain(clf, _judge.read_images(results, attack, name, ids), target, keys)
    row = found[attack, attacked, 'grad_cam']
    expected = float(metrics.map_l1(fresh, benign).mean())
    np.testing.assert_allclose(row['map_l1_all'], expected, atol=1e-5)
    assert row['clean_accuracy'] == 1
    assert row['asr'] == found[attack, attacked, 'cam']['asr']  # nobody looks with another net


def test_the_files(seen, capsys):
  found = rows_in(seen)
  assert len(found) == 9
  with open(seen / 'transfer/transfer.csv', newline='') as file:
    lines = list(csv.DictReader(file))
  for line, row in zip(lines, found.values(), strict=True):
    assert line['seen_by'] == row['seen_by']
    assert float(line['map_iou_all']) == pytest.approx(row['map_iou_all'])
    assert float(line['asr_high']) == pytest.approx(row['asr_ci95'][1])
  text = (seen / 'transfer/transfer.md').read_text()
  line = next(line for line in text.splitlines() if line.startswith('| cam |'))
  shown = [
    found['adv2', 'cam', name, *next(iter(found))[3:]]['map_iou'] for name in ('grad', 'cam')
  ]
  shown = ['–' if v is None else f'{v:.3f}' for v in shown]
  assert line.startswith(f'| cam | {shown[0]} | **{shown[1]}** | ')
  with PIL.Image.open(seen / 'transfer/transfer.png') as picture:
    assert picture.size[0] > picture.size[1] > 200


def test_rows_of_earlier_calls_stay(seen, other):
  """Another classifier beside the one attacked; of the same images only."""
  before = rows_in(seen)
  weights = other()
  call(seen, weights=weights, interpreters=['cam'])
  after = rows_in(seen)
  assert {k: v for k, v in after.items() if k in before} == before
  new = [row for key, row in after.items() if key not in before]
  assert [(r['attacked'], r['seen_by'], r['weights']) for r in new] == [
    (name, 'cam', weights) for name in ('none', 'grad', 'cam')
  ]
  results = read_results(seen)
  clf = zoo.load_classifier('scene_resnet', weights)
  ids = results.ids('cam')
  for row, (attack, name) in zip(
    new, (('pgd', 'cam'), ('adv2', 'grad'), ('adv2', 'cam')), strict=True
  ):
    predicted = _judge.predictions(clf, _judge.read_images(results, attack, name, ids))
    target = [results.example(attack, name, i)['target'] for i in ids]
    assert row['asr'] == np.mean(np.asarray(predicted) == target)
  text = (seen / 'transfer/transfer.md').read_text()
  assert '| cam, scene_resnet net-10-0.safetensors |' in text
  file = seen / 'transfer/transfer.json'
  file.write_text(json.dumps(json.loads(file.read_text()) | {'run': 'of other images'}))
  call(seen, interpreters=['cam'])
  assert len(rows_in(seen)) == 3


def test_images_of_the_joint_attack(copy, tmp_path):
  """Its own columns are `joint`; who was left out sees `joint-without-` itself."""
  path = shutil.copytree(copy, tmp_path / 'run', ignore=shutil.ignore_patterns('transfer'))
  shutil.copytree(path / 'examples/adv2/cam', path / 'examples/adv2_joint')
  result = json.loads((path / 'metrics.json').read_text())
  result['rows'] += [r | {'attack': 'adv2_joint'} for r in result['rows'] if r['attack'] == 'adv2']
  (path / 'metrics.json').write_text(json.dumps(result))
  text = (path / 'examples.csv').read_text()
  joint = [line.replace(',adv2,', ',adv2_joint,') for line in text.splitlines() if ',adv2,' in line]
  (path / 'examples.csv').write_text(text + '\n'.join(joint) + '\n')
  call(path, interpreters=['cam', 'grad_cam'])
  found = by(path)
  for attacked, name in (('joint', 'cam'), ('joint-without-grad_cam', 'grad_cam')):
    joint, alone = found['adv2_joint', attacked, name], found['adv2', 'cam', name]
    assert joint['map_l1_all'] == alone['map_l1_all']
  assert '| joint | ' in (path / 'transfer/transfer.md').read_text()


def test_untargeted_images_succeed_in_any_wrong_class(copy, other, tmp_path):
  """On another classifier too, which takes them for what it likes."""
  path = shutil.copytree(copy, tmp_path / 'run', ignore=shutil.ignore_patterns('transfer'))
  result = json.loads((path / 'metrics.json').read_text())
  config = result['config'] | {'target_label': 'untargeted'}
  (path / 'metrics.json').write_text(json.dumps(result | {'config': config}))
  weights = other()
  call(path, weights=weights, interpreters=['cam'])
  results, clf = read_results(path), zoo.load_classifier('scene_resnet', weights)
  ids = results.ids('cam')
  label = [results.example('pgd', 'cam', i)['label'] for i in ids]
  for row, (attack, name) in zip(
    rows_in(path).values(), (('pgd', 'cam'), ('adv2', 'grad'), ('adv2', 'cam')), strict=True
  ):
    predicted = _judge.predictions(clf, _judge.read_images(results, attack, name, ids))
    assert row['asr'] == np.mean(np.asarray(predicted) != label) > 0


@pytest.mark.parametrize(
  ('flags', 'message'),
  [
    ({'interpreters': ['cam', 'lime']}, "interpreter 'lime' is unknown; expected one of grad"),
    ({'interpreters': ['cam', 'cam']}, 'expected one or more distinct names'),
    ({'interpreters': ['cam', 'rts']}, 'no built-in decoder for scene_resnet with'),
    ({'decoder': 'rts.safetensors'}, 'only rts has one'),
    ({'model': 'vgg16'}, 'vgg16'),
    ({'model': 'resnet50'}, 'resnet50'),
    ({'mean': ['0.5'] * 3}, 'give --model or --weights, too'),
  ],
)
def test_bad_flags_are_told(finished, flags, message):
  refused(finished, message, **flags)


def refused(workdir, message, **flags):
  with pytest.raises(InputError, match=message) as error:
    call(workdir, **flags)
  assert '\n' not in str(error.value)
  assert not (workdir / 'transfer').exists()


def test_a_classifier_of_other_classes_is_refused(finished, other, tmp_path):
  refused(
    finished,
    'has 7 classes, the one attacked in .* 10; give',
    weights=other(7),
    interpreters=['cam'],
  )
  path = shutil.copytree(finished, tmp_path / 'run')
  result = json.loads((path / 'metrics.json').read_text())
  known = {str(k): f'name {k}' for k in range(10)}
  (path / 'metrics.json').write_text(json.dumps(result | {'class_names': known}))
  names = [f'other {k}' for k in range(10)]
  weights = other(class_names=names)
  refused(
    path,
    "knows class 0 as 'other 0', the run in .* as 'name 0'",
    weights=weights,
    interpreters=['cam'],
  )


def test_what_is_no_finished_run_is_refused(finished, tmp_path):
  refused(tmp_path, 'the run is not finished; go on with it by --resume')
  path = shutil.copytree(finished, tmp_path / 'run')
  result = json.loads((path / 'metrics.json').read_text())
  clean = [r for r in result['rows'] if r['attack'] == 'benign']
  (path / 'metrics.json').write_text(json.dumps(result | {'rows': clean}))
  refused(path, 'has no attacked images')
  (path / 'metrics.json').write_text(json.dumps(result))
  (path / 'examples/adv2/cam/000003.png').unlink()
  refused(path, r'examples/adv2/cam/000003\.png is missing', interpreters=['cam'])


def test_heat_maps_mark_what_is_missing_and_what_was_attacked():
  heat = figures.Heat(np.array([[0.25, np.nan]]), np.array([[True, False]]), (0.0, 1.0))
  with figures.style():
    figure = figures.heat_maps({'IoU': heat, 'L1': heat._replace(limits=(None, 0.0))}, ['a'], 'bc')
  for axis in figure.axes:
    assert [t.get_text() for t in axis.texts] == ['.250', '–']
    assert len(axis.patches) == 1
