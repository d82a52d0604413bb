import hashlib

import jax
import numpy as np
import pytest
from scipy import ndimage

from adv2_jax import data, images
from adv2_jax.data import scene_painter
from adv2_jax.types import InputError
from adv2_jax.weights import zoo

IMAGES_SHA256 = 'd14333e8682fc9ebb58c9704f574499b7b8a6e1074c692dab52f2b09f9f29bd8'
MASKS_SHA256 = '4b7bd02c58bde2b856ffc813b53b093f9c568a13fede7d7a571cfe28eba9e79c'


@pytest.fixture(scope='module')
def sample():
  """Images u8[n,64,64,3] and masks bool[n,64,64] of 120 test scenes."""
  drawn = [scene_painter.render(0, 'test', i) for i in range(120)]
  return tuple(np.stack(part) for part in zip(*drawn, strict=True))


def test_scenes_are_the_same_everywhere(sample):
  # The built-in checkpoint, README's figures and everyone's tables rest on these very pixels.
  pictures, masks = sample
  assert hashlib.sha256(pictures[:20].tobytes()).hexdigest() == IMAGES_SHA256
  assert hashlib.sha256(np.packbits(masks[:20]).tobytes()).hexdigest() == MASKS_SHA256


def test_streams_differ_by_seed_split_and_index(sample):
  first = sample[0][0]
  others = [
    scene_painter.render(1, 'test', 0)[0],
    scene_painter.render(0, 'train', 0)[0],
    sample[0][10],
  ]
  assert all((first != other).mean() > 0.5 for other in others)


def test_objects_cover_6_to_25_percent_and_lie_inside(sample):
  _, masks = sample
  area = masks.mean((1, 2))
  assert area.min() >= 0.06
  assert area.max() <= 0.25
  assert area.std() > 0.03
  assert not masks[:, [0, -1]].any()
  assert not masks[:, :, [0, -1]].any()
  centres = np.array([np.argwhere(mask).mean(0) for mask in masks])
  assert (centres.std(0) > 6).all()  # not always in the middle


@pytest.mark.parametrize('name', scene_painter.SHAPES)
def test_distance_is_signed_and_euclidean(name):
  # Along its gradient a distance grows by 1 per unit, and its zero set encloses `unit area`.
  u, v = np.meshgrid(*[np.linspace(-1.5, 1.5, 301)] * 2)
  distance = scene_painter._DISTANCE[name](u, v)
  slope = np.hypot(*np.gradient(distance, u[0, 1] - u[0, 0]))
  assert abs(np.median(slope) - 1) < 1e-3
  assert np.quantile(slope, 0.99) < 1.01
  assert distance[150, 150] < 0 < distance[0, 0]


def test_mask_is_where_the_object_was_painted():
  # The object is drawn once more on grey: what changes, shadow aside, is the mask.
  rng = np.random.default_rng(0)
  for shape in scene_painter.SHAPES:
    image = np.full((64, 64, 3), 0.5)
    mask = scene_painter._paint(rng, image, shape, 'striped', 600.0, np.array([30.0, 34.0]), 0.3)
    grey = np.ptp(image, axis=-1) < 1e-9  # shadow darkens grey, the object is coloured
    rim = ndimage.binary_dilation(mask, np.ones((3, 3))) & ~ndimage.binary_erosion(mask)
    np.testing.assert_array_equal(mask[~rim], ~grey[~rim])
    assert abs(mask.sum() - 600) < 15


def test_the_rest_of_the_scene_says_nothing_of_the_class():
  # Background and distractors are drawn before the class is looked at: their mean colour outside
  # the object differs between classes by no more than chance, 4 standard errors.
  means = {}
  for i in range(200):
    image, mask = scene_painter.render(3, 'train', i)
    means.setdefault(i % 10, []).append(image[~mask].mean(0))
  per_class = np.array([np.mean(v, 0) for v in means.values()])
  spread = np.std([m for v in means.values() for m in v], axis=0) / np.sqrt(20)
  assert (np.abs(per_class - per_class.mean(0)) < 4 * spread).all()


def test_a_linear_classifier_stays_far_below_half():
  from sklearn.linear_model import LogisticRegression

  from experiments.train import pixels_and_histogram

  train = data.scenes('train', 500)
  test = data.scenes('test', 200)
  x, x_test = (pixels_and_histogram(s.images(s.ids)) for s in (train, test))
  scale = x.std(0) + 1e-6
  model = LogisticRegression(C=1e-3, tol=1e-2).fit(x / scale, train.labels)
  assert model.score(x / scale, train.labels) > 0.3  # it does learn what it sees
  assert model.score(x_test / scale, test.labels) < 0.3


def test_dataset_of_scenes():
  test = data.load('scenes')
  assert (len(test), test.num_classes, test.name) == (2000, 10, 'scenes')
  assert test.class_names[:3] == ('striped disc', 'spotted disc', 'striped square')
  image, mask = scene_painter.render(0, 'test', 17)
  np.testing.assert_array_equal(test.image(17), image)
  np.testing.assert_array_equal(test.mask(17), mask)
  assert test.labels[17] == 7
  assert data.scenes('validation', 5, seed=4).images([0, 3]).shape == (2, 64, 64, 3)
  small = data.load('scenes', image_size=32)
  assert small.image(0).shape == (32, 32, 3)
  assert small.mask(0).shape == (32, 32)


def test_unknown_split_lists_those_there_are():
  with pytest.raises(InputError, match=r"no split 'val'.*validation"):
    data.load('scenes', split='val')


def test_the_built_in_checkpoint_knows_unseen_scenes():
  unseen = data.scenes('validation', 300)  # no part of training or of the card's measurement
  classifier = zoo.load_classifier('scene_resnet')
  x = images.from_uint8(unseen.images(unseen.ids))
  predicted = np.asarray(jax.jit(lambda clf, x: clf(x).logits.argmax(-1))(classifier, x))
  assert (predicted == unseen.labels).mean() >= 0.97
