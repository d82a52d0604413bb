"""`experiments.attack --epsilon A,B`: all of it once for each radius."""

import json
import shutil

import numpy as np
import pytest
from cli import EPSILON, contents, rows_of, run

from adv2_jax.types import InputError
from adv2_jax.workdir import results
from experiments import _flags, evaluate

RADII = [0.01, EPSILON]
TWO = {'epsilon': RADII, 'num_examples': 2}
FILES = ('examples', 'maps', 'examples.csv', 'history.json')


@pytest.fixture(scope='module')
def finished(victim, tmp_path_factory):
  return run(victim, tmp_path_factory.mktemp('runs') / 'run', **TWO)


def test_each_radius_is_a_run_of_its_own(finished, victim, tmp_path):
  alone = run(victim, tmp_path / 'run', num_examples=2, epsilon=EPSILON)
  assert contents(finished / 'eps-0.05', *FILES) == contents(alone, *FILES)
  rows = json.loads((finished / 'metrics.json').read_text())['rows']
  assert [row['epsilon'] for row in rows] == [0.01] * 4 + [EPSILON] * 4
  assert rows == [row for e in ('0.01', '0.05') for row in _rows(finished / f'eps-{e}')]
  timeless = lambda row: {k: v for k, v in row.items() if not k.startswith('seconds')}  # noqa: E731
  assert list(map(timeless, rows[4:])) == list(map(timeless, _rows(alone)))
  for row in rows:
    if row['attack'] in ('pgd', 'adv2'):
      assert 0 < row['linf_max'] <= row['epsilon'] + 0.5 / 255 + 1e-6
  assert not (finished / 'examples.csv').exists()


def _rows(path):
  return json.loads((path / 'metrics.json').read_text())['rows']


def test_the_report_leads_to_each(finished):
  page = (finished / 'report.html').read_text()
  for epsilon in ('0.01', '0.05'):
    assert f'href="eps-{epsilon}/report.html"' in page
    assert (finished / f'eps-{epsilon}' / 'report.html').exists()
  assert '<th title="The perturbation limit.">ε</th>' in page
  assert 'Against ε' in page
  assert (finished / 'figures/radii.png').exists()
  assert '>ε</th>' not in (finished / 'eps-0.01/report.html').read_text()


def test_a_killed_run_goes_on(finished, victim, tmp_path):
  workdir = tmp_path / 'run'
  shutil.copytree(finished, workdir)
  (workdir / 'metrics.json').unlink()
  for name in ('metrics.json', 'examples.csv', 'shards/adv2-cam-000002.json'):
    (workdir / 'eps-0.05' / name).unlink()
  with pytest.raises(InputError, match=r'--epsilon \[0.01, 0.05\], now it is \[0.01, 0.04\]'):
    run(victim, workdir, resume=True, **TWO | {'epsilon': [0.01, 0.04]})
  run(victim, workdir, resume=True, **TWO)
  for part in ('eps-0.01', 'eps-0.05'):
    assert contents(workdir / part, *FILES) == contents(finished / part, *FILES)
  assert rows_of(workdir) == rows_of(finished)


def test_evaluate_goes_through_all(finished):
  rows = evaluate.rescore(str(finished))
  assert [(row['epsilon'], row['attack']) for row in rows] == [
    (e, a) for e in RADII for a in ('benign', 'pgd', 'adv2')
  ]
  own = {(r['epsilon'], r['attack']): r['map_l1_all'] for r in _rows(finished)}
  for row in rows:
    np.testing.assert_allclose(
      row['map_l1_all'], own[row['epsilon'], row['attack']], rtol=0, atol=1e-4
    )
  parts = results.read_parts(finished)
  assert [part.config['epsilon'] for part in parts] == RADII


def test_numbers_and_fractions_are_read():
  assert _flags.radii(None) is None
  assert _flags.radii(['0.031']) == 0.031
  assert _flags.radii(['1/255', '8/255']) == [1 / 255, 8 / 255]


@pytest.mark.parametrize('given', [['x'], ['1/0'], [''], [], ['0.1', 'y']])
def test_others_are_refused(given):
  with pytest.raises(InputError, match=r'--epsilon is .*; expected a number or a fraction'):
    _flags.radii(given)


@pytest.mark.parametrize(
  ('epsilon', 'message'),
  [
    ([0.1, 0.1], '--epsilon is 0.1,0.1; expected each radius once'),
    ([0.1, 0.0], '--epsilon is 0.0; expected 0 < epsilon'),
  ],
)
def test_radii_without_sense_are_refused(victim, tmp_path, epsilon, message):
  with pytest.raises(InputError, match=message):
    run(victim, tmp_path / 'run', epsilon=epsilon)
  assert not (tmp_path / 'run').exists()
