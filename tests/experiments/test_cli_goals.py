"""`experiments.attack`: the goals, untargeted attacks and targets along a path."""

import csv

import jax
import numpy as np
import pytest
from cli import rows_of, run

from adv2_jax import interpreters
from adv2_jax.images import from_uint8
from adv2_jax.weights import zoo
from experiments import _targets, evaluate


def lines_of(path, attack):
  with open(path / 'examples.csv', newline='') as file:
    return [row for row in csv.DictReader(file) if row['attack'] == attack]


def test_map_only_keeps_the_class_and_leaves_the_benign_map(victim, tmp_path):
  flags = {'goal': 'map_only', 'target_map': 'away', 'num_examples': 2}
  path = run(victim, tmp_path / 'run', **flags)
  rows = {row['attack']: row for row in rows_of(path)}
  assert {row['goal'] for row in rows.values()} == {'map_only'}
  assert all(line['target'] == line['label'] for line in lines_of(path, 'adv2'))
  assert rows['benign']['asr'] == rows['adv2']['asr'] == 1
  assert rows['adv2']['map_l1'] > 0.02 > rows['benign']['map_l1_all'] == 0
  for i in (2, 3):
    target, benign = (np.load(path / f'maps/{k}/cam/{i:06d}.npy') for k in ('target', 'benign'))
    np.testing.assert_array_equal(target, benign)
  assert len(evaluate.rescore(str(path))) == 3
  page = (path / 'report.html').read_text()
  assert 'the class stays the true one' in page
  assert 'How far the map has gone' in page
  assert 'hides better' not in page
  assert 'target map</b>' not in page  # the benign one is there already


def test_class_only_has_the_row_of_pgd_alone(victim, tmp_path):
  path = run(victim, tmp_path / 'run', goal='class_only', num_examples=2)
  assert [row['attack'] for row in rows_of(path)] == ['benign', 'other', 'pgd']


def test_untargeted_any_wrong_class_counts(victim, tmp_path):
  path = run(victim, tmp_path / 'run', target_label='untargeted', num_examples=2)
  for line in lines_of(path, 'adv2') + lines_of(path, 'pgd'):
    assert line['target'] != line['label']
    assert (line['success'] == '1') == (line['prediction'] != line['label'])
  assert len(evaluate.rescore(str(path))) == 3


def test_the_runner_up_is_the_most_probable_wrong_class():
  target_of = _targets.labels('runner_up', 0, [], 3)
  logits = np.array([2.0, 5.0, 3.0])
  assert [target_of(0, label, logits) for label in range(3)] == [1, 2, 1]


@pytest.mark.parametrize('share', [0.0, 0.25])
def test_targets_on_the_path_lead_from_the_benign_map_to_the_target_class_s(
  victim, tmp_path, share
):
  path = run(victim, tmp_path / 'run', target_map=f'path:{share}', num_examples=2)
  clf = zoo.load_classifier('scene_resnet', victim['weights'])
  told = lines_of(path, 'adv2')
  ids = [int(line['id']) for line in told]
  x = from_uint8(np.load(victim['data_path'])['image'][ids])
  target = np.array([int(line['target']) for line in told])
  own = interpreters.cam().explain(clf, x, target, jax.random.key(0))
  benign, wanted = (
    np.stack([np.load(path / f'maps/{k}/cam/{i:06d}.npy') for i in ids])
    for k in ('benign', 'target')
  )
  assert np.abs(own - benign).max() > 0.1
  np.testing.assert_allclose(wanted, (1 - share) * benign + share * own, atol=1e-4)
