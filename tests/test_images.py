import io
import os

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from adv2_jax import images
from adv2_jax.types import InputError

ALL_BYTES = np.arange(256, dtype=np.uint8)


@pytest.mark.parametrize('wrap', [lambda f: f, jax.jit])
def test_the_8_bit_grid_is_exact_on_device_and_host(wrap):
  host = images.from_uint8(ALL_BYTES)
  device = np.asarray(wrap(images.quantise)(jnp.asarray(host)))
  np.testing.assert_array_equal(device, host)
  np.testing.assert_array_equal(host * np.float32(255), ALL_BYTES.astype(np.float32))
  np.testing.assert_array_equal(images.to_uint8(host), ALL_BYTES)


@settings(max_examples=50, deadline=None)
@given(hnp.arrays(np.float32, (3, 4), elements=st.floats(-0.5, 1.5, width=32)))
def test_quantise_rounds_to_the_nearest_and_agrees_with_to_uint8(x):
  q = np.asarray(images.quantise(jnp.asarray(x)))
  assert np.abs(q - np.clip(x, 0, 1)).max() <= 0.5 / 255 + 1e-6
  np.testing.assert_array_equal(images.to_uint8(q), np.round(q * 255))
  np.testing.assert_array_equal(images.from_uint8(images.to_uint8(x)), q)


def test_upsample_has_half_pixel_centres():
  # A ramp stays a ramp between the outermost cell centres, which half-pixel alignment puts at
  # (i + .5)·scale − .5, and is constant beyond them.
  ramp = jnp.arange(4.0).reshape(1, 1, 4) * jnp.ones((2, 3, 1))
  up = np.asarray(images.upsample(ramp, (6, 16)))
  expected = np.clip((np.arange(16) + 0.5) / 4 - 0.5, 0, 3)
  np.testing.assert_allclose(up, np.broadcast_to(expected, (2, 6, 16)), atol=1e-5)


@pytest.mark.parametrize('hw', [(146, 200), (200, 146), (50, 64)])
def test_resize_crop_keeps_a_ramp_a_ramp_and_its_middle_in_the_middle(hw):
  """The shorter side becomes 73 pixels, the middle 64 of both sides stay; half-pixel centres.

  A linear filter gives back a ramp, so pixel (i, j) shows the place it came from:
  (left + j + .5) · width/new width − .5, with new width and left rounded to whole pixels.
  """
  rows, columns = np.mgrid[: hw[0], : hw[1]]
  image = np.stack([rows, columns, np.full(hw, 99)], axis=-1).astype(np.uint8)
  out = images.resize_crop(image, 64).astype(float)
  assert out.shape == (64, 64, 3)
  for axis, side in enumerate(hw):
    new = 73 if side == min(hw) else int(side * 73 / min(hw))
    ramp = (round((new - 64) / 2) + np.arange(64) + 0.5) * side / new - 0.5
    expected = np.broadcast_to(ramp.reshape((-1, 1) if axis == 0 else (1, -1)), (64, 64))
    np.testing.assert_allclose(out[..., axis], expected, atol=0.51)
  assert (out[..., 2] == 99).all()


def test_resizing_smooths_what_the_small_image_cannot_show():
  """Stripes one pixel wide become grey; without antialiasing they would stay stripes."""
  stripes = np.tile(np.uint8([0, 255]), 128).reshape(1, 256, 1) * np.ones((256, 1, 3), np.uint8)
  out = images.resize_crop(stripes, 56)  # the shorter side becomes 64: a quarter
  assert np.abs(out.astype(int) - 127.5).max() < 12


def test_resize_crop_leaves_the_right_size_alone_and_moves_masks_along():
  image = np.zeros((100, 80, 3), np.uint8)
  image[30:60, 20:50] = 255
  np.testing.assert_array_equal(images.resize_crop(image[:64, :64], 64), image[:64, :64])
  mask = images.resize_crop(image[..., 0] > 0, 56, nearest=True)
  assert mask.dtype == bool
  disagree = mask != (images.resize_crop(image, 56)[..., 0] > 127)
  assert disagree.mean() < 0.01
  assert 0.1 < mask.mean() < 0.3


def test_png_round_trip_is_lossless_and_atomic(tmp_path, monkeypatch):
  image = np.random.default_rng(0).integers(0, 256, (7, 5, 3), np.uint8)
  path = tmp_path / 'new' / '000001.png'
  images.write_png(path, image)
  np.testing.assert_array_equal(images.read_image(path), image)
  assert os.listdir(path.parent) == ['000001.png']

  def full_disk(*_):
    raise OSError(28, 'No space left on device')

  monkeypatch.setattr(os, 'fsync', full_disk)
  with pytest.raises(OSError, match='No space'):
    images.write_png(path, 255 - image)
  monkeypatch.undo()
  np.testing.assert_array_equal(images.read_image(path), image)
  assert os.listdir(path.parent) == ['000001.png']


def test_write_png_refuses_floats(tmp_path):
  with pytest.raises(InputError, match='float32'):
    images.write_png(tmp_path / 'a.png', np.zeros((2, 2, 3), np.float32))
  assert not list(tmp_path.iterdir())


def _encoded(image: PIL.Image.Image, fmt: str, **options) -> io.BytesIO:
  buffer = io.BytesIO()
  image.save(buffer, fmt, **options)
  buffer.seek(0)
  return buffer


def test_every_colour_mode_becomes_rgb():
  rgb = np.random.default_rng(0).integers(0, 256, (6, 4, 3), np.uint8)
  grey = rgb[..., 0]
  image = PIL.Image.fromarray(rgb)
  three = np.repeat(grey[..., None], 3, axis=-1)
  read = images.read_image
  np.testing.assert_array_equal(read(_encoded(PIL.Image.fromarray(grey), 'PNG')), three)
  sixteen = PIL.Image.fromarray(grey.astype(np.uint16) * 257)
  np.testing.assert_array_equal(read(_encoded(sixteen, 'PNG')), three)
  rgba = np.dstack([rgb, np.full((6, 4), 128, np.uint8)])
  np.testing.assert_array_equal(read(_encoded(PIL.Image.fromarray(rgba), 'PNG')), rgb)
  palette = image.quantize(4)
  colours = np.asarray(palette.convert('RGB'))
  np.testing.assert_array_equal(read(_encoded(palette, 'PNG', transparency=b'\0\x80')), colours)
  cmyk = read(_encoded(image.resize((32, 48)).convert('CMYK'), 'JPEG', quality=98))
  assert np.abs(cmyk.astype(int) - np.asarray(image.resize((32, 48)))).mean() < 12


def test_exif_rotation_is_applied():
  rgb = np.random.default_rng(0).integers(0, 256, (6, 4, 3), np.uint8)
  exif = PIL.Image.Exif()
  exif[0x0112] = 6  # stored lying on its side: turn by 270° to view
  turned = images.read_image(_encoded(PIL.Image.fromarray(rgb), 'PNG', exif=exif))
  np.testing.assert_array_equal(turned, np.rot90(rgb, 3))


@pytest.mark.parametrize('content', [b'', b'not an image', 'half'])
def test_a_damaged_image_is_named(tmp_path, content):
  path = tmp_path / 'broken.png'
  if content == 'half':
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    content = images.encode_png(noise)[:3000]
  path.write_bytes(content)
  with pytest.raises(InputError, match=r'broken\.png.*skip_corrupt'):
    images.read_image(path)
  with pytest.raises(InputError, match=r'absent\.png does not exist'):
    images.read_image(tmp_path / 'absent.png')


def grey(dtype, value=0):
  return PIL.Image.fromarray(np.full((4, 4), value, dtype))


@pytest.mark.parametrize(
  ('image', 'options', 'message'),
  [
    (grey(np.int32, 70000), {}, r'odd\.tif has pixels of mode I \(32 bits\), whose range is not'),
    (grey(np.float32, 0.5), {}, r'odd\.tif has pixels of mode F'),
    (grey(np.uint8), {'save_all': True, 'append_images': [grey(np.uint8, 9)]}, 'series of 2 pic'),
  ],
)
def test_pixels_without_a_known_range_and_series_are_refused(tmp_path, image, options, message):
  """Clipped at 255, or the first of several: an image of something else, without a word."""
  path = tmp_path / 'odd.tif'
  image.save(path, **options)
  with pytest.raises(InputError, match=message):
    images.read_image(path)


def test_16_bit_grey_is_scaled_in_every_format():
  """PIL opens that of PGM files as 32-bit integers."""
  for fmt in ('PNG', 'PPM', 'TIFF'):
    assert (images.read_image(_encoded(grey(np.uint16, 257 * 9), fmt)) == 9).all()


def test_a_photograph_with_a_preview_is_one_image():
  pair = _encoded(grey(np.uint8, 200), 'MPO', save_all=True, append_images=[grey(np.uint8, 9)])
  assert (images.read_image(pair) > 190).all()
