"""Where the object is: masks and boxes from a file, one per example of a data set."""

import json
import pathlib
from collections.abc import Callable

import numpy as np

from adv2_jax.data.sources import read_npz
from adv2_jax.types import InputError
from adv2_jax.validate import user_path

MaskOf = Callable[[int], np.ndarray | None]
BOX_KEY = 'boxes_crop224_xyxy'
BOX_FRAME = 224


def read_masks(path: str | pathlib.Path, n: int) -> MaskOf:
  """Reads the masks of a set of n examples.

  Formats: .npz with `mask` bool[N,H,W], or with `packed` u8[N,⌈HW/8⌉] (`numpy.packbits` of each
  flattened mask) and `shape` (H, W); .json with `boxes_crop224_xyxy`, a list of (x0, y0, x1, y1)
  per example in pixels of its 224×224 crop, where x0 ≥ x1 or y0 ≥ y1 means outside the crop.

  Returns:
    id -> bool[H,W], or None where the object is not in the image.

  Raises:
    InputError: the file is missing, unreadable, or covers another number of examples.
  """
  path = user_path(path)
  if not path.exists():
    raise InputError(f'--masks {path} does not exist')
  mask_of, length = _boxes(path) if path.suffix == '.json' else _bits(path)
  if length != n:
    raise InputError(f'--masks {path} covers {length} examples, the data set has {n}')
  return mask_of


def _bits(path: pathlib.Path) -> tuple[MaskOf, int]:
  arrays = read_npz(path)
  if 'mask' in arrays:
    masks = arrays['mask']
    if masks.ndim != 3 or masks.dtype != np.bool_:
      raise InputError(f'mask in {path} is {masks.dtype}{list(masks.shape)}: expected bool[N,H,W]')
    return lambda i: masks[i] if masks[i].any() else None, len(masks)
  if not {'packed', 'shape'} <= set(arrays):
    raise InputError(f'{path} has {", ".join(arrays)}: expected mask, or packed and shape')
  packed, shape = arrays['packed'], tuple(int(side) for side in arrays['shape'])
  cells = int(np.prod(shape))
  if len(shape) != 2 or packed.dtype != np.uint8 or packed.shape[1:] != (-(-cells // 8),):
    raise InputError(
      f'packed in {path} is {packed.dtype}{list(packed.shape)}: expected uint8 '
      f'[N,{-(-cells // 8)}] for masks of shape {list(shape)}'
    )

  def mask_of(i: int) -> np.ndarray | None:
    mask = np.unpackbits(packed[i], count=cells).reshape(shape).astype(bool)
    return mask if mask.any() else None

  return mask_of, len(packed)


def _boxes(path: pathlib.Path) -> tuple[MaskOf, int]:
  try:
    examples = json.loads(path.read_text(encoding='utf-8'))[BOX_KEY]
    boxes = [np.array(rows, np.float64).reshape(-1, 4) for rows in examples]
  except (OSError, ValueError, KeyError, TypeError) as error:
    raise InputError(
      f'--masks {path} cannot be read ({error!r}): expected JSON with {BOX_KEY}, '
      '[[x0, y0, x1, y1], …] per example'
    ) from None
  centres = np.arange(BOX_FRAME) + 0.5

  def mask_of(i: int) -> np.ndarray | None:
    x0, y0, x1, y1 = boxes[i].T[:, :, None]
    rows, columns = (centres > y0) & (centres < y1), (centres > x0) & (centres < x1)
    mask = (rows[:, :, None] & columns[:, None, :]).any(0)
    return mask if mask.any() else None

  return mask_of, len(boxes)
