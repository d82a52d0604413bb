"""Heat maps over images."""

from typing import Any

import numpy as np

from adv2_jax import images
from adv2_jax.types import InputError


def overlay(x: Any, m: Any) -> np.ndarray:
  """The map as a heat map over its image, on the host.

  The map is up-sampled bilinearly and coloured with matplotlib's 'inferno'; the more important a
  place, the more its colour covers the image, which shows in grey beneath.

  Args:
    x: image [H,W,3] in [0,1], or u8; or a batch of them.
    m: map [h,w] in [0,1]; or a batch of them.

  Returns:
    u8[H,W,3], or u8[B,H,W,3] for a batch.

  Raises:
    InputError: for shapes that do not belong together.
  """
  import matplotlib  # slow to import, and only pictures need it

  x, m = np.asarray(x), np.asarray(m, np.float32)
  if x.ndim == 3 and m.ndim == 2:
    return overlay(x[None], m[None])[0]
  if x.ndim != 4 or m.ndim != 3 or x.shape[0] != m.shape[0] or x.shape[3] not in (1, 3):
    raise InputError(
      f'image has shape {x.shape} and map {m.shape}; expected [H,W,3] and [h,w], or both batched'
    )
  x = images.from_uint8(x) if x.dtype == np.uint8 else x.astype(np.float32)
  value = np.clip(np.asarray(images.upsample(m, (x.shape[1], x.shape[2]))), 0, 1)[..., None]
  grey = x.mean(-1, keepdims=True) * 0.75
  heat = matplotlib.colormaps['inferno'](value[..., 0])[..., :3]
  alpha = 0.85 * np.sqrt(value)
  return images.to_uint8(grey * (1 - alpha) + heat * alpha)
