"""8-bit images on disk and on the device: reading, writing, rounding, resizing."""

import io
import os
import pathlib
import tempfile
from collections.abc import Sequence
from typing import Any, BinaryIO

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
import PIL.ImageOps

from adv2_jax.types import Array, Image, InputError, Map

_TIFF_BITS = 258  # the tag of bits per sample


def quantise(x: Image) -> Image:
  """Rounds to the 8-bit grid, round(255·x)/255: what survives being saved.

  The result is bit-equal to `from_uint8` of the saved file. Its gradient is zero.

  Args:
    x: f32[...] in [0,1]; values outside are clipped.

  Returns:
    f32[...] with `255·result` integral.
  """
  # A table, because XLA turns a division by 255 into a product with 1/255, off by the last bit.
  level = jnp.round(jnp.clip(x, 0.0, 1.0) * 255.0).astype(jnp.int32)
  return jnp.asarray(from_uint8(np.arange(256)))[level]


def to_uint8(x: Any) -> np.ndarray:
  """[0,1] floats to u8, by the same rounding as `quantise`, on the host."""
  return np.round(np.clip(np.asarray(x, np.float32), 0, 1) * np.float32(255)).astype(np.uint8)


def from_uint8(image: Any) -> np.ndarray:
  """u8 to f32 in [0,1]: k/255, correctly rounded, on the host."""
  return np.asarray(image, np.uint8).astype(np.float32) / np.float32(255)


def normalised(x: Any, mean: Sequence[float], std: Sequence[float]) -> Any:
  """(x − mean) / std per channel, [B,H,W,C]."""
  if not len(mean) == len(std) == x.shape[-1]:
    raise InputError(
      f'images have {x.shape[-1]} channels, mean {len(mean)} and std {len(std)} numbers; expected '
      'one number per channel: give mean=(…) and std=(…) that fit the images'
    )
  mean_, std_ = (np.asarray(v, np.float32).reshape(1, 1, 1, -1) for v in (mean, std))
  return (x - mean_) / std_


def upsample(maps: Map, hw: tuple[int, int]) -> Map:
  """Bilinear interpolation with half-pixel centres, f32[B,h,w] to f32[B,H,W]."""
  return jax.image.resize(maps, (maps.shape[0], *hw), 'bilinear', antialias=False)


def warp(x: Image, flow: Array) -> Image:
  """Moves pixels by bilinear sampling: out[i,j] = x[i + u0, j + u1] (Xiao et al. 2018).

  Places outside of the image are those of its border. At whole displacements, 0 among them, the
  gradient is the difference to the next pixel: there is one to follow from the first step on.

  Args:
    x: f32[B,H,W,C].
    flow: f32[B,H,W,2] in pixels; [...,0] along rows, [...,1] along columns.

  Raises:
    InputError: a flow of another shape.
  """
  height, width = x.shape[1:3]
  if flow.shape != (len(x), height, width, 2):
    raise InputError(
      f'flow has shape {tuple(flow.shape)}; expected {(len(x), height, width, 2)}: rows and '
      'columns of displacement for each pixel of each image'
    )
  row = jnp.arange(height, dtype=flow.dtype).reshape(1, -1, 1) + flow[..., 0]
  column = jnp.arange(width, dtype=flow.dtype).reshape(1, 1, -1) + flow[..., 1]
  # Indices are clamped, not places: so the part within a cell keeps its derivative everywhere.
  top, left = jnp.floor(row), jnp.floor(column)
  down, right = (row - top)[..., None], (column - left)[..., None]
  rows = [jnp.clip(top + k, 0, height - 1).astype(jnp.int32) for k in (0, 1)]
  columns = [jnp.clip(left + k, 0, width - 1).astype(jnp.int32) for k in (0, 1)]
  at = jax.vmap(lambda image, i, j: image[i, j])
  upper, lower = (at(x, i, columns[0]) * (1 - right) + at(x, i, columns[1]) * right for i in rows)
  return upper * (1 - down) + lower * down


def flow_smoothness(flow: Array) -> Array:
  """Σ √(Δu² + Δv² + 1e-8) over pixels and their four diagonal neighbours, f32[B]; small is smooth.

  Beyond the border stands the nearest pixel. The published total variation of StAdv.
  """
  height, width = flow.shape[1:3]
  padded = jnp.pad(flow, ((0, 0), (1, 1), (1, 1), (0, 0)), 'edge')
  total = jnp.zeros(len(flow), flow.dtype)
  for i, j in ((0, 0), (0, 2), (2, 0), (2, 2)):
    step = flow - padded[:, i : i + height, j : j + width]
    total += jnp.sum(jnp.sqrt(jnp.sum(jnp.square(step), -1) + 1e-8), (1, 2))
  return total


def _crop_box(hw: tuple[int, int], size: int) -> tuple[tuple[int, int], tuple[int, int, int, int]]:
  """(width, height) to resize to, and the (left, top, right, bottom) to cut out of that."""
  short = round(size * 256 / 224)
  scale = short / min(hw)
  height, width = (short if side == min(hw) else int(side * scale) for side in hw)
  left, top = round((width - size) / 2), round((height - size) / 2)
  return (width, height), (left, top, left + size, top + size)


def resize_crop(image: np.ndarray, size: int, nearest: bool = False) -> np.ndarray:
  """Resizes the shorter side to round(size·256/224) and cuts the middle out.

  Nothing happens to an image that is size×size already. Bilinear with antialiasing, torchvision's
  `Resize` and `CenterCrop` on PIL images.

  Args:
    image: u8[H,W,3], or bool[H,W] with `nearest`.
    size: side of the result in pixels.
    nearest: take the nearest pixel instead of interpolating; for masks.

  Returns:
    Array of the same type, [size,size,…].
  """
  if image.shape[:2] == (size, size):
    return image
  resized, box = _crop_box(image.shape[:2], size)
  method = PIL.Image.Resampling.NEAREST if nearest else PIL.Image.Resampling.BILINEAR
  return np.asarray(PIL.Image.fromarray(image).resize(resized, method).crop(box))


def _refuse_without_range(image: PIL.Image.Image, name: str) -> None:
  """InputError for pixels that are neither 8 bits per channel nor 16-bit grey."""
  bits = getattr(image, 'tag_v2', {}).get(_TIFF_BITS, (16,))[0]
  sixteen = image.mode.startswith('I;16') or image.format in ('PNG', 'PPM')  # hold no wider grey
  if image.mode[0] == 'F' or (image.mode[0] == 'I' and not (sixteen and bits == 16)):
    raise InputError(
      f'image {name} has pixels of mode {image.mode} ({bits} bits), whose range is not known: '
      'save it with 8 bits per channel or as 16-bit grey'
    )


def _to_rgb(image: PIL.Image.Image) -> np.ndarray:
  image = PIL.ImageOps.exif_transpose(image)
  if image.mode.startswith('I'):  # 16-bit grey: PIL would clip at 255 instead of scaling.
    grey = np.clip(np.round(np.asarray(image, np.float64) / 257), 0, 255).astype(np.uint8)
    return np.repeat(grey[..., None], 3, axis=-1)
  if 'transparency' in image.info:
    image = image.convert('RGBA')
  return np.asarray(image.convert('RGB'))


def read_image(file: str | os.PathLike | BinaryIO, name: str | None = None) -> np.ndarray:
  """Decodes any common image file to u8[H,W,3].

  EXIF rotation is applied; grey, palette, CMYK and 16-bit images become RGB; an alpha channel is
  dropped.

  Args:
    file: path, or an open binary file.
    name: what to call the file in an error; the path if not given.

  Raises:
    InputError: the file is missing, cut short or no image; it is a series of images; or its pixels
      are floats or integers of another width, whose range is not known.
  """
  name = name or str(file)
  try:
    with PIL.Image.open(file) as image:
      frames = getattr(image, 'n_frames', 1)
      if frames > 1 and image.format != 'MPO':  # cameras put a preview second
        raise InputError(f'image {name} is a series of {frames} pictures: save the one to use')
      _refuse_without_range(image, name)
      image.load()
      return _to_rgb(image)
  except InputError:
    raise
  except FileNotFoundError:
    raise InputError(f'image {name} does not exist') from None
  except Exception as error:  # PIL's decoders raise nearly everything on damaged files.
    raise InputError(
      f'image {name} cannot be decoded ({error}): replace it, or pass --skip_corrupt'
    ) from None


def write_atomic(path: str | os.PathLike, content: bytes) -> None:
  """Writes a whole file or none: to a temporary name beside it, synced, then renamed."""
  path = pathlib.Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f'.{path.name}.', delete=False) as file:
    try:
      file.write(content)
      file.flush()
      os.fsync(file.fileno())
      os.chmod(file.name, 0o644)
      os.replace(file.name, path)
    except BaseException:
      os.unlink(file.name)
      raise


def write_png(path: str | os.PathLike, image: np.ndarray) -> None:
  """Writes u8[H,W,3] (or u8[H,W]) losslessly and atomically."""
  if image.dtype != np.uint8:
    raise InputError(f'write_png takes uint8, got {image.dtype}: use images.to_uint8 first')
  write_atomic(path, encode_png(image))


def encode_png(image: np.ndarray) -> bytes:
  """PNG bytes of u8[H,W,3] or u8[H,W]."""
  buffer = io.BytesIO()
  PIL.Image.fromarray(image).save(buffer, 'PNG')
  return buffer.getvalue()
