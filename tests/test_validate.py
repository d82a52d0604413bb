"""Each kind of bad input gets one line that names the value and the remedy."""

import jax.numpy as jnp
import numpy as np
import pytest

from adv2_jax import validate
from adv2_jax.types import InputError


def test_what_is_not_utf_8_can_be_written():
  """In a locale of ASCII, a name in UTF-8 comes in halves of pairs, too."""
  assert validate.printable('caf\udce9\n\ud83d犬') == 'caf\ufffd\ufffd\ufffd犬'
  assert validate.printable('caf\udcc3\udca9') == 'café'


GOOD = np.full((2, 4, 5, 3), 0.5, np.float32)


def with_pixel(value):
  x = GOOD.copy()
  x[1, 2, 3, 0] = value
  return x


@pytest.mark.parametrize(
  ('x', 'message'),
  [
    (GOOD * 510, r'range over \[255, 255\].*divide 0…255 images by 255'),
    (GOOD - 1, r'range over \[-0.5, -0.5\]'),
    (with_pixel(1.0001), r'\[0.5, 1.0001\]'),
    ((GOOD * 255).astype(np.uint8), r'uint8.*astype\(\"float32\"\) / 255'),
    (GOOD.astype(int), 'images are int64'),
    (with_pixel(np.nan), 'image 1 has NaN or infinite pixels'),
    (with_pixel(np.inf), 'image 1 has NaN or infinite pixels'),
    (GOOD[0], r'shape \(4, 5, 3\); expected \[B,H,W,C\]: x\[None\]'),
    (GOOD[0, 0], r'shape \(5, 3\); expected \[B,H,W,C\]$'),
    (GOOD[:0], 'at least one image'),
    (np.moveaxis(GOOD, -1, 1), r'NCHW.*x\.transpose\(0, 2, 3, 1\)'),
    ('photo.png', 'images are <U9'),
    (None, 'images are object'),
  ],
)
def test_bad_images(x, message):
  with pytest.raises(InputError, match=message) as error:
    validate.images(x)
  assert '\n' not in str(error.value)


def test_good_images_become_float32():
  x = validate.images(GOOD.astype(np.float64))
  assert x.dtype == jnp.float32
  np.testing.assert_array_equal(x, GOOD)
  assert validate.images(GOOD[..., :1]).shape == (2, 4, 5, 1)
  validate.images(with_pixel(0.0))
  validate.images(with_pixel(1.0))
  rounded = validate.images(with_pixel(np.nextafter(np.float32(1), np.float32(2))))
  assert float(rounded.max()) == 1.0


@pytest.mark.parametrize(
  ('values', 'message'),
  [
    ([0, 10], r'target of image 1 is 10; the classifier has the classes 0…9'),
    ([-1, 0], r'target of image 0 is -1'),
    ([0.0, 1.0], 'target is float64; expected integers'),
    ([True, False], 'target is bool; expected integers'),
    ([1], r'target has shape \(1,\); expected \(2,\)'),
    (3, r'target has shape \(\); expected \(2,\)'),
    ([[1], [2]], r'target has shape \(2, 1\)'),
  ],
)
def test_bad_labels(values, message):
  with pytest.raises(InputError, match=message):
    validate.labels(values, 2, 10, 'target')


def test_good_labels_become_int32():
  labels = validate.labels(np.array([0, 9], np.uint8), 2, 10, 'label')
  assert labels.dtype == jnp.int32
  np.testing.assert_array_equal(labels, [0, 9])


def test_target_and_label_must_differ():
  validate.targets_differ(np.array([1, 2]), np.array([2, 1]))
  with pytest.raises(InputError, match=r'target of image 1 is 2, its own class'):
    validate.targets_differ(np.array([1, 2]), np.array([2, 2]))


@pytest.mark.parametrize(
  ('maps', 'message'),
  [
    (np.zeros((2, 3, 4)), r'shape \(2, 3, 4\); the interpreter makes maps of \(2, 3, 3\)'),
    (np.zeros((3, 3)), r'shape \(3, 3\)'),
    (np.full((2, 3, 3), 1.5), r'range over|ranges over \[1.5, 1.5\]'),
    (np.full((2, 3, 3), -0.1), r'ranges over \[-0.1, -0.1\]'),
    (np.full((2, 3, 3), np.nan), 'finite'),
  ],
)
def test_bad_target_maps(maps, message):
  with pytest.raises(InputError, match=message):
    validate.target_map(maps, (2, 3, 3))


def test_good_target_maps_become_float32():
  assert validate.target_map(np.eye(3)[None], (1, 3, 3)).dtype == jnp.float32


@pytest.mark.parametrize(
  ('text', 'number'),
  [('12', 12), (' 3 ', 3), ('-1', -1), ('+4', 4), ('007', 7)]
  + [(text, None) for text in ('', '²', '--1', '1.0', '1_000', '٣', 'one', '- 1', '9' * 5000)],
)
def test_whole_number(text, number):
  assert validate.whole_number(text) == number


def test_user_path(monkeypatch):
  monkeypatch.setenv('HOME', '/somewhere')
  assert str(validate.user_path('~/x')) == '/somewhere/x'
  assert str(validate.user_path('a/~b')) == 'a/~b'
