"""`experiments.mask_curves` end to end: its curves recomputed, its files, its refusal."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest
from conftest import flag_defaults

import adv2_jax as adv2
from adv2_jax import metrics
from adv2_jax.interpreters import masking
from adv2_jax.types import InputError, fold_keys
from experiments import _flags, mask_curves


def flags(**changes):
  defaults = flag_defaults(_flags.define_data_flags, _flags.define_example_flags)
  return defaults | {'num_examples': 2, 'batch_size': 2, 'num_devices': 1} | changes


@pytest.fixture(scope='module')
def finished(tmp_path_factory):
  return mask_curves.run(flags(workdir=str(tmp_path_factory.mktemp('curves') / 'run')))


def test_the_ends_of_a_curve_recomputed(finished):
  found = json.loads((finished / 'curves.json').read_text())['solvers']
  assert list(found) == ['published', 'fast', 'usual']
  assert [row['steps'] for row in found.values()] == [300, 100, 50]
  clf, data = adv2.load_classifier('scene_resnet'), adv2.data.load('scenes')
  x, y = jnp.asarray(data.images(range(2)) / np.float32(255)), jnp.asarray(data.labels[:2], int)
  keys, c = metrics.judge_keys(0, np.arange(2)), masking.SCENES
  views = [masking.jittered(x, fold_keys(keys, 10**6 + i), c.jitter) for i in range(4)]
  objective = jax.jit(lambda clf, m, view: masking.mask_objective(clf, m, view, y, c))
  solution = jax.jit(lambda clf, x: masking.solve(clf, x, y, keys, c).mask)(clf, x)
  values = [
    np.mean([objective(clf, m, view) for view in views])
    for m in (masking.start(c, x).mask, solution)
  ]
  np.testing.assert_allclose(found['usual']['objective'][:: mask_curves.POINTS], values, rtol=0.1)
  for row in found.values():
    assert row['iterations'][-1] == row['steps']
    assert row['objective'][-1] < 0.6 * row['objective'][0]
  assert found['fast']['objective'][-1] < 1.1 * found['published']['objective'][-1]


def test_the_picture(finished):
  with PIL.Image.open(finished / 'curves.png') as picture:
    assert picture.size == (980, 560)


def test_a_directory_in_use_is_refused(finished):
  with pytest.raises(InputError, match='is not empty; choose another --workdir'):
    mask_curves.run(flags(workdir=str(finished)))
