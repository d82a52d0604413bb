"""experiments.attack with the other frameworks, and evaluate on what it left."""

import json

import numpy as np
import pytest
from cli import EPSILON, contents, make_victim, rows_of, run

from adv2_jax import images
from adv2_jax.types import InputError
from experiments import evaluate

SPACES = {
  'stadv': {'framework': 'stadv', 'epsilon': None},
  'cw': {'framework': 'cw', 'epsilon': None, 'steps_s2': 12},
  'l2': {'norm': 'l2', 'epsilon': 0.9},
}


@pytest.fixture(scope='module')
def victim(tmp_path_factory):
  return make_victim(tmp_path_factory.mktemp('victim')) | {'num_examples': 3}


@pytest.fixture(scope='module', params=SPACES)
def finished(request, victim, tmp_path_factory):
  folder = tmp_path_factory.mktemp('runs') / request.param
  return request.param, run(victim, folder, **SPACES[request.param])


def test_the_images_are_in_the_set_and_evaluate_agrees(finished):
  kind, path = finished
  rows = {row['attack']: row for row in rows_of(path)}
  for attack in ('pgd', 'adv2'):
    row = rows[attack]
    assert row['framework'] == SPACES[kind].get('framework', 'pgd')
    assert row['out_of_set'] == 0
    assert row['n'] == 3
    assert 0 < row['l2_mean'] <= (0.9 + 0.5 / 255 * (32 * 32 * 3) ** 0.5 if kind == 'l2' else 99)
    assert (row['flow_max'] is not None) == (kind == 'stadv')
  again = {row['attack']: row for row in evaluate.rescore(str(path))}
  np.testing.assert_allclose(again['adv2']['map_l1_all'], rows['adv2']['map_l1_all'], atol=1e-4)
  if kind == 'stadv':
    for field in ('flow_max', 'flow_smoothness'):
      np.testing.assert_allclose(again['adv2'][field], rows['adv2'][field], rtol=1e-4)


def test_the_flow_that_made_an_image_is_kept(finished):
  kind, path = finished
  if kind != 'stadv':
    assert not (path / 'flows').exists()
    return
  rows = {row['attack']: row for row in rows_of(path)}
  largest = 0.0
  for attack, folder in (('pgd', 'pgd'), ('adv2', 'adv2/cam')):
    files = sorted((path / 'flows' / folder).glob('*.npy'))
    assert len(files) == 3
    for file in files:
      flow = np.load(file)
      assert flow.shape == (32, 32, 2)
      assert flow.dtype == np.float32
      clean, x8 = (
        images.from_uint8(images.read_image(path / 'examples' / f / f'{file.stem}.png'))
        for f in ('benign', folder)
      )
      warped = images.quantise(images.warp(clean[None], flow[None]))[0]
      assert np.abs(warped - x8).max() <= 1.001 / 255
      largest = max(largest, np.hypot(*flow.reshape(-1, 2).T).max())
    if attack == 'pgd':
      np.testing.assert_allclose(rows['pgd']['flow_max'], largest, rtol=1e-5)


def test_the_report_tells_what_was_allowed_and_shows_the_displacement(finished):
  kind, path = finished
  page = (path / 'report.html').read_text()
  said = {'stadv': 'by moving their pixels', 'cw': 'as could be found', 'l2': 'at most 0.9 in L2'}
  assert said[kind] in page
  assert ('displacement' in page) == (kind == 'stadv')
  # What bounds nothing is not praised for keeping to a bound, and what is its point is a column.
  assert ('Every pixel is within [0, 1].' in page) == (kind != 'l2')
  heads = {'stadv': 'moved', 'cw': 'L2', 'l2': 'L2'}
  assert f'>{heads[kind]}</th>' in page
  assert '>max change</th>' not in page
  assert ('up to' in page and ' px' in page) or kind != 'stadv'


def test_a_flow_that_makes_another_image_is_noticed(victim, tmp_path):
  path = run(victim, tmp_path / 'run', num_examples=2, **SPACES['stadv'])
  file = next((path / 'flows/adv2/cam').glob('*.npy'))
  np.save(file, np.load(file) + np.float32(2))
  with pytest.raises(evaluate.Disagreement, match=rf'flows/adv2/cam/{file.name} warps'):
    evaluate.rescore(str(path))


@pytest.mark.parametrize(
  ('flags', 'message'),
  [
    ({'framework': 'stadv'}, 'epsilon is the radius of pgd; stadv has none'),
    ({'framework': 'cw', 'norm': 'l2', 'epsilon': None}, "norm 'l2' goes with framework 'pgd'"),
    ({'norm': 'l2', 'epsilon': None}, "norm 'l2' without epsilon"),
    ({'tau': 0.1}, "tau is 0.1 for framework 'pgd'"),
    ({'framework': 'stadv', 'epsilon': None, 'tau': 0.0}, "tau is 0.0 for framework 'stadv'"),
    ({'framework': 'cw', 'epsilon': None, 'kappa': -2.0}, "kappa is -2.0 for framework 'cw'"),
  ],
)
def test_what_makes_no_sense_is_refused_before_any_work(victim, tmp_path, flags, message):
  assert victim['epsilon'] == EPSILON
  with pytest.raises(InputError, match=message):
    run(victim, tmp_path / 'run', **flags)
  assert not contents(tmp_path, 'run')


def test_the_radius_is_left_out_of_the_config(finished):
  kind, path = finished
  config = json.loads((path / 'metrics.json').read_text())['config']
  assert config['epsilon'] == SPACES[kind]['epsilon']
