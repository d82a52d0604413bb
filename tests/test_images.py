import io
import os

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest
from conftest import PARITY
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


# --- flows ----------------------------------------------------------------------------------------

WARP = jax.jit(images.warp)
STADV = {k: jnp.asarray(v) for k, v in np.load(PARITY / 'stadv.npz').items()}


def test_warp_and_smoothness_agree_with_the_published_ones_and_so_do_their_gradients():
  warped, pull = jax.vjp(lambda flow: WARP(STADV['image'], flow), STADV['flow'])
  np.testing.assert_allclose(warped, STADV['warped'], atol=1e-5)
  np.testing.assert_allclose(pull(STADV['cotangent'])[0], STADV['grad_flow'], rtol=1e-4, atol=1e-4)
  value, pull = jax.vjp(jax.jit(images.flow_smoothness), STADV['flow'])
  np.testing.assert_allclose(value, STADV['penalty'], rtol=1e-4)
  np.testing.assert_allclose(
    pull(jnp.ones_like(value))[0], STADV['penalty_grad'], rtol=1e-4, atol=1e-4
  )


def test_whole_displacements_fetch_pixels_rows_first_clamped_at_the_border():
  x = STADV['image']
  down, left = (jnp.zeros((*x.shape[:3], 2)).at[..., k].set(v) for k, v in ((0, 2), (1, -3)))
  np.testing.assert_allclose(WARP(x, down), np.asarray(x)[:, np.arange(20).clip(-2, 17) + 2])
  columns = (np.arange(24) - 3).clip(0)
  np.testing.assert_allclose(WARP(x, left), np.asarray(x)[:, :, columns])


def test_a_flow_at_rest_changes_nothing_and_has_a_gradient():
  """That of the next pixel; one built on floor and ceil has none."""
  x, rest = STADV['image'], jnp.zeros((2, 20, 24, 2))
  warped, pull = jax.vjp(lambda flow: WARP(x, flow), rest)
  np.testing.assert_array_equal(warped, x)
  gradient = np.asarray(pull(jnp.ones_like(x))[0])
  np.testing.assert_allclose(
    gradient[:, :-1, :, 0], np.diff(np.asarray(x).sum(-1), axis=1), atol=1e-5
  )
  np.testing.assert_allclose(
    gradient[:, :, :-1, 1], np.diff(np.asarray(x).sum(-1), axis=2), atol=1e-5
  )
  assert np.isfinite(jax.grad(lambda f: images.flow_smoothness(f).sum())(rest)).all()


def test_gradients_of_warp_and_smoothness_are_the_finite_differences():
  """Away from whole displacements, where bilinear sampling has kinks."""
  rng = np.random.RandomState(0)
  flow = np.float32(rng.randint(-3, 3, STADV['flow'].shape) + rng.uniform(0.1, 0.9, (2, 20, 24, 2)))
  direction = rng.randn(*flow.shape).astype(np.float32)
  direction /= np.abs(direction).max()

  def f(flow):
    return jnp.sum(WARP(STADV['image'], flow) * STADV['cotangent']), images.flow_smoothness(flow)[0]

  slope = jax.jvp(f, (flow,), (direction,))[1]
  h = 1e-2
  for k, expected in enumerate(slope):
    found = (f(flow + h * direction)[k] - f(flow - h * direction)[k]) / (2 * h)
    np.testing.assert_allclose(found, expected, rtol=1e-2, atol=1e-2)


def test_a_flow_of_another_shape_is_refused():
  with pytest.raises(InputError, match=r'flow has shape \(2, 20, 24\); expected \(2, 20, 24, 2\)'):
    images.warp(STADV['image'], jnp.zeros((2, 20, 24)))
