"""`experiments.explain` end to end: its files, its figures recomputed, and refusals."""

import csv
import json
import shutil

import jax
import numpy as np
import PIL.Image
import pytest
from conftest import flag_defaults

import adv2_jax as adv2
from adv2_jax import metrics
from adv2_jax.types import InputError
from experiments import _flags, explain


def flags(**changes):
  defaults = flag_defaults(_flags.define_data_flags, _flags.define_explain_flags)
  chosen = {'interpreters': ['cam', 'grad'], 'num_examples': 5, 'batch_size': 3, 'num_devices': 1}
  return defaults | chosen | changes


@pytest.fixture(scope='module')
def finished(tmp_path_factory):
  return explain.run(flags(workdir=str(tmp_path_factory.mktemp('explain') / 'run')))


def test_rows_are_means_of_the_lines_and_these_are_true(finished):
  rows = json.loads((finished / 'explain.json').read_text())['rows']
  assert [row['interpreter'] for row in rows] == ['cam', 'grad']
  with open(finished / 'maps.csv', newline='') as file:
    lines = list(csv.DictReader(file))
  assert len(lines) == 10
  data = adv2.data.load('scenes')
  clf, cam = adv2.load_classifier('scene_resnet'), adv2.interpreters.cam()
  told = [line for line in lines if line['interpreter'] == 'cam']
  ids = [int(line['id']) for line in told]
  x, y = data.images(ids) / np.float32(255), data.labels[ids]
  mask = np.stack([data.mask(i) for i in ids])
  maps = jax.jit(cam.explain)(clf, x, y, jax.random.key(0))
  expected = {
    'marked': np.mean(maps, axis=(1, 2)),
    'energy_inside': metrics.energy_inside(maps, mask),
    'pointing_game': metrics.pointing_game(maps, mask),
    'p': jax.nn.softmax(clf(x).logits)[np.arange(5), y],
    'object': mask.mean((1, 2)),
  }
  for field, values in expected.items():
    found = [float(line[field]) for line in told]
    np.testing.assert_allclose(found, values, atol=1e-4, err_msg=field)
    if field != 'object':
      assert rows[0][field] == pytest.approx(np.mean(found), abs=1e-6)
  assert rows[0]['p_removed_median'] == np.median([float(line['p_removed']) for line in told])
  assert rows[0]['n'] == rows[0]['n_small'] == 5


def test_the_picture_has_a_row_per_image_and_a_column_per_interpreter(finished):
  with PIL.Image.open(finished / 'figures/maps.png') as picture:
    width, height = picture.size
  assert 1.4 < height / width < 2.2  # five rows of three pictures


def test_a_directory_in_use_is_refused_before_any_work(finished):
  before = (finished / 'explain.json').read_bytes()
  with pytest.raises(InputError, match='is not empty'):
    explain.run(flags(workdir=str(finished)))
  assert (finished / 'explain.json').read_bytes() == before


def test_a_run_that_was_stopped_goes_on_and_ends_with_the_same_bytes(finished, tmp_path, bars):
  run = tmp_path / 'run'
  shutil.copytree(finished, run)
  gone = [*run.glob('*.json'), *run.glob('*.csv'), *run.glob('figures/*')]
  gone = [p for p in gone if p.name != 'config.json'] + sorted(run.glob('shards/*'))[::2]
  kept = {p: p.stat().st_mtime_ns for p in sorted(run.glob('shards/*'))[1::2]}
  for file in gone:
    file.unlink()
  explain.run(flags(workdir=str(run), resume=True))
  assert len(kept) == 2
  assert (bars[0].initial, bars[0].n, bars[0].total) == (4, 10, 10)
  assert json.loads((run / 'config.json').read_text())['digests'].keys() == {'data', 'weights'}
  assert {p: p.stat().st_mtime_ns for p in kept} == kept
  for name in ('maps.csv', 'figures/maps.png'):
    assert (run / name).read_bytes() == (finished / name).read_bytes()
  rows = [json.loads((at / 'explain.json').read_text())['rows'] for at in (run, finished)]
  assert rows[0] == rows[1]
  with pytest.raises(InputError, match='was made with --seed 0, now it is 1'):
    explain.run(flags(workdir=str(run), resume=True, seed=1))
  part = max(run.glob('shards/*'))
  part.write_bytes(part.read_bytes()[:-30])
  with pytest.raises(InputError, match=rf'{part.name} is damaged; remove it and run again'):
    explain.run(flags(workdir=str(run), resume=True))


def test_half_precision_on_two_devices(finished, tmp_path):
  run = explain.run(
    flags(workdir=str(tmp_path / 'run'), dtype='bfloat16', num_devices=2, interpreters=['cam'])
  )
  found, whole = (json.loads((at / 'explain.json').read_text())['rows'] for at in (run, finished))
  assert found[0]['n'] == 5
  assert found[0]['p'] == pytest.approx(whole[0]['p'], abs=0.02)


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    ({'num_examples': 0}, '--num_examples is 0; expected at least 1'),
    ({'interpreters': ['cams']}, "interpreter 'cams' is unknown"),
  ],
)
def test_bad_flags(tmp_path, change, message):
  with pytest.raises(InputError, match=message):
    explain.run(flags(workdir=str(tmp_path / 'run'), **change))
  assert not (tmp_path / 'run').exists()
