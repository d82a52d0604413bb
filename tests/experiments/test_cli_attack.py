"""`experiments.attack` end to end on a tiny data set: files, fields, resuming, and examples."""

import csv
import itertools
import json
import re
import shutil
import subprocess

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest
from cli import EPSILON, SEED, SIZE, WHOLE, contents, defaults, rows_of, run, select

from adv2_jax import data, interpreters, metrics
from adv2_jax.attacks import presets
from adv2_jax.images import encode_png, from_uint8
from adv2_jax.interpreters import masking
from adv2_jax.types import InputError
from adv2_jax.weights import files as weight_files
from adv2_jax.weights import zoo
from experiments import _digests, _judge, _setup, attack, evaluate

FIELDS = {
  *('interpreter', 'attack', 'framework', 'target_map', 'n', 'n_skipped', 'asr', 'asr_ci95', 'mc'),
  *('map_l1', 'map_l2', 'map_mse', 'map_iou', 'map_spearman', 'map_ssim', 'two_class_l1'),
  *('pointing_game', 'energy_inside', 'linf_max', 'l2_mean', 'out_of_set', 'nonfinite'),
  *('gradient_evaluations', 'network_passes', 'seconds', 'seconds_compile'),
}
COLUMNS = [
  *('id', 'attack', 'interpreter', 'label', 'target', 'prediction', 'confidence', 'success'),
  *('map_l1', 'map_iou', 'file'),
]


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
    assert {f'{field}_median' for field in FIELDS if field.startswith('map_')} <= row.keys()
    assert row['nonfinite'] == row['flat_maps'] == 0
    attacked = row['attack'] in ('pgd', 'adv2')
    assert row['zero_gradient'] == row['nonfinite_gradient'] == (0 if attacked else None)
    if row['attack'] != 'other':
      assert row['n'] == 5
      assert row['out_of_set'] == 0
    for field in ('pointing_game_all', 'energy_inside_all'):
      assert 0 <= row[field] <= 1
  assert told['health'] == {
    **dict.fromkeys(('zero_gradient', 'nonfinite_gradient', 'flat_maps', 'already_at_target'), 0),
    **{'clean_accuracy': 5 / 7, 'num_seen': 7, 'files_left_out': {}},
  }
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


@pytest.mark.parametrize('preset', ['fast', 'authors'])
def test_mask_has_its_ceiling_beside_it(victim, tmp_path, monkeypatch, preset):
  """The clean image explained with another key; evaluate re-scores what is kept; resumable."""
  quick = masking.CIFAR._replace(steps=8, area=0.0)  # this net is never sure enough for an area
  monkeypatch.setattr(masking, 'CIFAR', quick)
  flags = {'interpreters': ['mask'], 'num_examples': 2, 'preset': preset, 'steps_s1': 0}
  path = run(victim, tmp_path / 'run', **flags)
  assert len(evaluate.rescore(str(path))) == 3
  whole = rows_of(path)
  shards = (path / 'shards').glob('*.json')
  gone = [p for p in shards if 'again' in p.name or 'adv2' in p.name]
  assert len(gone) == 2
  for record in gone:
    record.unlink()
  images = contents(path, 'examples')
  run(victim, path, resume=True, **flags)
  assert contents(path, 'examples') == images
  assert rows_of(path) == whole
  rows = {row['attack']: row for row in whole}
  assert list(rows) == ['benign', 'again', 'other', 'pgd', 'adv2']
  assert rows['benign']['map_l1_all'] == 0
  assert 1e-3 < rows['again']['map_l1_all'] < 0.3  # rounding alone would be less
  if preset == 'fast':
    # The path; 4 steps, each with 2 masks on the clean and the attacked image; the last is scored.
    scored = 9 + 2 * 2  # by a draft
    assert rows['adv2']['network_passes'] == 2 * 8 + 1 + 4 * (2 + 2 * (2 + 4)) + scored
  for kind in ('target', 'benign', 'pgd', 'adv2'):
    assert np.load(path / f'maps/{kind}/mask/000002.npy').shape == (8, 8)
  assert not (path / 'maps/again').exists()


def test_the_joint_attack_is_one_image_judged_by_each(victim, tmp_path, bars):
  """Its files and rows; what is not among --attacks is not done; transfer and evaluate take it."""
  flags = {'interpreters': ['grad', 'cam', 'joint'], 'attacks': ['pgd', 'adv2_joint']}
  path = run(victim, tmp_path / 'run', **flags, num_examples=3)
  assert bars[0].total == bars[0].n == 6  # PGD's images and these
  names = [f'{i:06d}' for i in range(2, 5)]
  images = {f'examples/{a}/{i}.png' for a in ('benign', 'pgd', 'adv2_joint') for i in names}
  assert contents(path, 'examples').keys() == images
  rows = rows_of(path)
  found = [(r['interpreter'], r['attack']) for r in rows]
  assert found == [(n, a) for n in ('grad', 'cam') for a in ('benign', 'pgd', 'adv2_joint')]
  joint = [r for r in rows if r['attack'] == 'adv2_joint']
  parts = [interpreters.build(n, SIZE, 'smooth') for n in ('grad', 'cam')]
  spent = interpreters.joint(dict(zip('gc', parts, strict=True))).passes
  for row, name in zip(joint, ('grad', 'cam'), strict=True):
    assert row['gradient_evaluations'] == 4
    assert row['network_passes'] == 4 * spent[1] + spent[2] + spent[0]
    for i in names:
      assert (path / f'maps/adv2_joint/{name}/{i}.npy').exists()
  assert joint[0]['asr'] == joint[1]['asr']
  assert joint[0]['map_l1_all'] != joint[1]['map_l1_all']
  assert len(evaluate.rescore(str(path))) == 6
  for record in (path / 'shards').glob('adv2_joint-cam-*.json'):
    record.unlink()
  before = contents(path, 'examples', 'maps', 'examples.csv')
  run(victim, path, resume=True, **flags, num_examples=3)
  assert contents(path, 'examples', 'maps', 'examples.csv') == before
  assert rows_of(path) == rows


def test_each_line_of_examples_csv_is_true(finished, victim):
  """Recomputed from the PNGs by the real net, in this test's own words."""
  clf = zoo.load_classifier('scene_resnet', victim['weights'])
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
    column = {name: np.array([float(line[name]) for line in told]) for name in COLUMNS[3:-1]}
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
def test_resume_makes_what_is_missing_byte_for_byte(finished, victim, tmp_path, bars, gone):
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
  assert (workdir / 'history.json').read_bytes() == (finished / 'history.json').read_bytes()
  (bar,) = bars  # it begins where the run is: 5 images of PGD, and of ADV² on two interpreters
  assert bar.total == 15
  assert 0 < bar.initial < 15
  assert bar.n == 15


def test_resume_counts_each_example_once_whatever_the_batches_were(finished, victim, tmp_path):
  """A shard as another number of devices cut it: of its batch, one example is done already."""
  workdir = tmp_path / 'run'
  shutil.copytree(finished, workdir)
  for name in ('pgd-cam-000002', 'adv2-grad-000002'):
    (workdir / f'shards/{name}.json').unlink()
  for kind in ('pgd-grad', 'adv2-cam'):
    shard = json.loads((workdir / f'shards/{kind}-000002.json').read_text())
    curves = {k: v if k == 'step' else [row[1:] for row in v] for k, v in shard['curves'].items()}
    shard |= {'records': shard['records'][1:], 'curves': curves}
    assert [r['id'] for r in shard['records']] == [3]
    (workdir / f'shards/{kind}-000002.json').unlink()
    (workdir / f'shards/{kind}-000003.json').write_text(json.dumps(shard))
  run(victim, workdir, resume=True, **WHOLE)
  for name in ('history.json', 'examples.csv'):
    assert (workdir / name).read_bytes() == (finished / name).read_bytes()
  assert rows_of(workdir) == rows_of(finished)


@pytest.mark.parametrize('changed', ['data', 'weights'])
def test_resume_with_another_content_is_refused(finished, victim, tmp_path, monkeypatch, changed):
  """Before any work; old and new results would stand in one table."""
  shutil.copytree(finished, tmp_path / 'run')
  config = json.loads((finished / 'config.json').read_text())
  assert config['digests'].keys() == {'data', 'masks', 'weights'}
  config['digests'][changed] = 'another'
  (tmp_path / 'run/config.json').write_text(json.dumps(config))
  monkeypatch.setattr(_setup, 'select', lambda *_, **__: pytest.fail('work was done'))
  with pytest.raises(InputError, match=rf'^{changed} .*(npz|safetensors) changed since the run in'):
    run(victim, tmp_path / 'run', resume=True, **WHOLE)


def test_digests_follow_the_content_of_every_file(victim, tmp_path):
  """Also of a card, whose mean and names count, and not of a name that is no file."""
  weights = shutil.copy(victim['weights'], tmp_path)
  maps = tmp_path / 'maps.npz'
  maps.write_bytes(b'1')
  config = defaults() | {'weights': str(weights), 'target_map': str(maps)}
  found = [_digests.of_inputs(config)]
  maps.write_bytes(b'2')
  found.append(_digests.of_inputs(config))
  tensors = weight_files.read_safetensors(weights)
  weight_files.write_safetensors(weights, tensors | {'fc.bias': tensors['fc.bias'] + 1})
  found.append(_digests.of_inputs(config))
  card = dict.fromkeys(zoo.CARD_FIELDS, 0) | {'sha256': None, 'mean': [0.5, 0.5, 0.5]}
  (tmp_path / 'net.json').write_text(json.dumps(card))
  found.append(_digests.of_inputs(config))
  changes = [{k for k in a if a[k] != b[k]} for a, b in itertools.pairwise(found)]
  assert changes == [{'target_map'}, {'weights'}, {'weights'}]
  built_in = _digests.of_inputs(defaults() | {'interpreters': ['rts']})
  assert built_in.keys() == {'weights', 'decoder'}


def test_resume_of_a_finished_run_attacks_nothing(finished, victim, tmp_path, monkeypatch, bars):
  workdir = tmp_path / 'run'
  shutil.copytree(finished, workdir)
  monkeypatch.setattr(attack.api, 'attack_batch', lambda *_, **__: pytest.fail('attacked again'))
  run(victim, workdir, resume=True, **WHOLE)
  assert bars[0].initial == bars[0].n == bars[0].total
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


@pytest.mark.slow
def test_a_run_goes_on_with_other_devices(finished, victim, tmp_path):
  """Killed with one of its interpreters half done. Sums may be rounded in another order."""
  workdir = tmp_path / 'run'
  shutil.copytree(finished, workdir)
  for kind in ('adv2-grad-000004', 'adv2-grad-000006', 'adv2-cam-000002', 'pgd-cam-000002'):
    (workdir / f'shards/{kind}.json').unlink()
  run(victim, workdir, resume=True, num_devices=2, **WHOLE)
  found, whole = (
    json.loads((at / 'history.json').read_text())['curves'] for at in (workdir, finished)
  )
  assert found.keys() == whole.keys()
  for kind, curves in whole.items():
    for name, values in curves.items():
      np.testing.assert_allclose(found[kind][name], values, rtol=1e-3, err_msg=f'{kind} {name}')
  texts = [(at / 'examples.csv').read_text() for at in (workdir, finished)]
  lines = [list(csv.DictReader(text.splitlines())) for text in texts]
  for one, other in zip(*lines, strict=True):
    for name, value in one.items():
      if name in ('confidence', 'map_l1', 'map_iou') and value:
        assert float(value) == pytest.approx(float(other[name]), abs=2e-3)
      else:
        assert value == other[name]


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


@pytest.mark.parametrize('whole', [False, True])
def test_what_was_gone_through_is_counted_and_what_was_left_out_is_named(
  damaged, monkeypatch, capsys, whole
):
  if whole:  # checked when loaded, not when used
    monkeypatch.setattr(data, 'CHECK_ALL_UP_TO', 10)
  examples = select(damaged, skip_corrupt=True, num_examples=3)
  assert (examples.num_seen, examples.num_correct, examples.num_skipped) == (5, 3, 3)
  ((reason, (name,)),) = examples.omitted.items()
  assert reason == 'cannot be decoded'
  assert name.startswith('3 of ')
  assert capsys.readouterr().err == f'left out of the data: 1 cannot be decoded ({name})\n'


def test_a_damaged_image_stops_the_run_before_it_starts(damaged, tmp_path):
  with pytest.raises(InputError, match=r'image 3 of .*packed\.npz cannot be decoded'):
    run(damaged, tmp_path / 'run')
  assert not (tmp_path / 'run').exists()


def test_examples_are_passed_over(victim):
  examples = select(victim, skip_examples=2, num_examples=3)
  assert examples.id.tolist() == [4, 5, 6]
  assert examples.num_skipped == 2


def test_shuffled_examples_come_from_all_over_the_set(victim):
  right = select(victim, num_examples=64).id
  places = np.random.default_rng(0).permutation(10).tolist()
  expected = [i for i in places if i in right][:3]
  examples = select(victim, shuffle=True, num_examples=3)
  assert examples.id.tolist() == expected != right[:3].tolist()
  assert examples.num_skipped == places.index(expected[-1]) + 1 - 3


@pytest.mark.parametrize('shuffle', [False, True])
def test_the_other_part_of_a_set_is_neither_attacked_nor_counted(victim, shuffle):
  setup = _setup.load(defaults() | victim | {'split': 'train', 'shuffle': shuffle})
  (left_out,) = setup.dataset.left_out
  everything = select(victim, num_examples=64, shuffle=shuffle)
  examples = select(victim, num_examples=64, shuffle=shuffle, split='train')
  np.testing.assert_array_equal(examples.id, everything.id[everything.id != left_out])
  assert left_out not in examples.other
  assert len(examples.id) + examples.num_skipped == 9


def test_examples_of_one_class_only_are_remarked(victim, tmp_path, capsys):
  arrays = np.load(victim['data_path'])
  same = {name: np.repeat(arrays[name][2:3], 6, axis=0) for name in ('image', 'label')}
  np.savez(tmp_path / 'same.npz', **same)
  select(victim | {'data_path': str(tmp_path / 'same.npz'), 'masks': None}, num_examples=6)
  assert 'all 6 examples are of class' in capsys.readouterr().err
  select(victim, num_examples=6)
  assert not capsys.readouterr().err


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
  assert re.fullmatch('[0-9a-f]{7,}', _judge.commit_of(tmp_path))
  assert _judge.commit_of(tmp_path / 'site-packages') is None
