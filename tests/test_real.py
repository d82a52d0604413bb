"""Real photographs and real weights: the numbers that a user would check first."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import SHARED, shared_data

import adv2_jax as adv2
from adv2_jax import images

pytestmark = pytest.mark.real


@pytest.fixture(scope='module')
def resnet50():
  return adv2.load_classifier('resnet50', shared_data('resnet50_imagenet.npz'))


@pytest.fixture(scope='module')
def photographs():
  return adv2.data.load('packed', shared_data('imagenet_val_500.npz'), image_size=224)


def test_imagenet_predictions_equal_torchs(resnet50, photographs):
  path = SHARED / 'goldens' / 'imagenet_val_500_resnet50.npz'
  if not path.exists():
    pytest.skip('the recorded predictions are not on this machine')
  golden = np.load(path)
  forward = jax.jit(lambda clf, x: clf(x).logits)
  logits = [
    np.asarray(forward(resnet50, images.from_uint8(photographs.images(ids))))
    for ids in np.split(np.arange(500), 20)
  ]
  predicted = np.concatenate(logits).argmax(-1)
  assert (predicted == golden['prediction']).sum() >= 499
  assert (predicted == photographs.labels).mean() == pytest.approx(0.682, abs=0.002)
  p = np.asarray(jax.nn.softmax(np.concatenate(logits)))[np.arange(500), golden['label']]
  in_torch = golden['prediction'] == golden['label']
  np.testing.assert_allclose(p[in_torch], golden['confidence'][in_torch], atol=2e-3)


def test_cam_is_deceived_on_photographs(resnet50, photographs):
  """A quarter of the evaluations that the published schedule spends on its warm start alone."""
  ids = [1, 5, 8, 10]
  x = jnp.asarray(images.from_uint8(photographs.images(ids)))
  y = jnp.argmax(jax.jit(lambda clf, x: clf(x).logits)(resnet50, x), axis=-1)
  cam = adv2.interpreters.cam()
  result = adv2.attack(resnet50, cam, x, target=(y + 300) % 1000, label=y, steps=50)
  benign = cam.explain(resnet50, x, y, jax.random.key(0))
  assert np.asarray(result.success).all()
  assert np.mean(adv2.metrics.map_l1(result.maps, benign)) <= 0.03
  assert not np.asarray(adv2.metrics.out_of_set(result.x, x, 0.031)).any()
