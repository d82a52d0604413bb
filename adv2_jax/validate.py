"""Checks of what users hand in, before any work is done; each failure is one clear line."""

import numbers
import os
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from adv2_jax.types import Array, Image, InputError, Label, Map

ROUNDING = 1e-6  # how far beyond [0,1] a resized or decoded image may be


def user_path(path: str | os.PathLike) -> pathlib.Path:
  """The path a user gave, '~' expanded; every path of a user goes through here."""
  return pathlib.Path(os.path.expanduser(path))  # without a HOME, as it is


def printable(text: str) -> str:
  """A name of a class or file as text that can be written and drawn anywhere.

  File names need not be UTF-8: what is not, which Python keeps as halves of surrogate pairs, and
  control characters become �.
  """
  text = re.sub('[\x00-\x1f\x7f-\x9f\ud800-\udc7f\udd00-\udfff]', '\ufffd', text)
  return text.encode('utf-8', 'surrogateescape').decode('utf-8', 'replace')


def whole_number(text: str) -> int | None:
  """The number that a user wrote, such as '12' or '-1'; None where it is no whole number.

  Digits are those of ASCII, 18 at most: `int` takes, and `str.isdigit` tells, far more than that.
  """
  text = text.strip()
  return int(text) if re.fullmatch('[+-]?[0-9]{1,18}', text) else None


def traced(*values: Any) -> bool:
  """Whether one of the arrays is a tracer, whose values cannot be looked at."""
  return any(isinstance(v, jax.core.Tracer) for v in jax.tree.leaves(values))


def per_channel(what: str, values: Any, n: int | None = None, *, std: bool) -> tuple[float, ...]:
  """Means in [0,1], or standard deviations in (0,1], one per channel, n if given; or InputError.

  Those of images in [0,1]: numbers of 0…255 images are the mistake that everybody makes once.
  """
  try:
    numbers = tuple(float(v) for v in values)
  except (TypeError, ValueError):
    numbers = ()
  fits = (lambda v: 0 < v <= 1) if std else (lambda v: 0 <= v <= 1)
  if numbers and n in (None, len(numbers)) and all(map(fits, numbers)):
    return numbers
  count = {None: 'numbers', 1: 'one number', 3: 'three numbers'}.get(n, f'{n} numbers')
  of_bytes = numbers and all(0 <= v <= 255 for v in numbers) and max(numbers) > 1
  shown = ','.join(map(str, values)) if isinstance(values, list) else values
  raise InputError(
    f'{what} is {shown}; expected {count} {"above 0, at most 1" if std else "from 0 to 1"}, one '
    'per channel, of images in [0,1]'
    + (': these look like those of 0…255 images, divide them by 255' if of_bytes else '')
  )


def images(x: Any) -> Image:
  """x as f32[B,H,W,C] in [0,1], or InputError."""
  x = np.asarray(x)
  if x.dtype == np.uint8:
    raise InputError('images are uint8; expected floats in [0,1]: give x.astype("float32") / 255')
  if not np.issubdtype(x.dtype, np.floating):
    raise InputError(f'images are {x.dtype}; expected float32 in [0,1]')
  if x.ndim != 4:
    raise InputError(
      f'images have shape {x.shape}; expected [B,H,W,C]' + (': x[None]' if x.ndim == 3 else '')
    )
  if not x.size:
    raise InputError(f'images have shape {x.shape}; expected at least one image')
  if x.shape[-1] not in (1, 3):
    raise InputError(
      f'images have shape {x.shape}; expected channels last, [B,H,W,3]: transpose NCHW images '
      'with x.transpose(0, 2, 3, 1)'
    )
  bad = ~np.isfinite(x).all(axis=(1, 2, 3))
  if bad.any():
    raise InputError(f'image {int(np.argmax(bad))} has NaN or infinite pixels; expected [0,1]')
  if x.min() < -ROUNDING or x.max() > 1 + ROUNDING:
    raise InputError(
      f'images range over [{x.min():.7g}, {x.max():.7g}]; expected [0,1]: divide 0…255 images by '
      '255, and leave normalisation to the classifier'
    )
  return jnp.asarray(np.clip(x, 0, 1), jnp.float32)


def kind(value: Any) -> str:
  """What a value is, in a word or two: never its content."""
  name = getattr(value, '__name__', None)
  what = type(value).__name__
  return f'the {what} {name}' if name else repr(value) if isinstance(value, str) else f'a {what}'


def at_least(value: Any, least: int, what: str) -> None:
  """InputError unless the value is a whole number from `least` on."""
  if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < least:
    raise InputError(f'{what} is {value!r}; expected a whole number, {least} or more')


def epsilon(value: Any, n: int, most: float = 1.0) -> Array:
  """ε as f32[] or, where each image has its own, f32[n], at most `most`; or InputError."""
  try:
    radius = np.asarray(value, np.float32)
    if isinstance(value, str) or radius.shape not in ((), (n,)):
      raise ValueError
  except (TypeError, ValueError):
    shape = getattr(value, 'shape', None)
    given = repr(value) if shape is None else f'an array of shape {tuple(shape)}'
    raise InputError(
      f'epsilon is {given}; expected a number such as 8 / 255, or one per image, [{n}]'
    ) from None
  fits = (radius > 0) & (radius <= most)
  if not fits.all():
    wrong = value if radius.ndim == 0 else radius[~fits].flat[0]
    such = '1, such as 0.031 (8/255)' if most == 1 else f'{most:.3g}, the L2 norm of such an image'
    raise InputError(f'epsilon is {wrong}; expected 0 < epsilon ≤ {such}')
  return jnp.asarray(radius)


def labels(values: Any, n: int, num_classes: int, what: str) -> Label:
  """Classes as i32[n] in [0, num_classes), or InputError."""
  if values is None:
    raise InputError(f'{what} is None; expected integers, one class per image')
  values = np.asarray(values)
  if not np.issubdtype(values.dtype, np.integer):
    raise InputError(f'{what} is {values.dtype}; expected integers, one class per image')
  if values.shape != (n,):
    raise InputError(f'{what} has shape {values.shape}; expected ({n},), one class per image')
  wrong = (values < 0) | (values >= num_classes)
  if wrong.any():
    i = int(np.argmax(wrong))
    raise InputError(
      f'{what} of image {i} is {int(values[i])}; the classifier has the classes 0…{num_classes - 1}'
    )
  return jnp.asarray(values, jnp.int32)


def targets_differ(target: Label, label: Label) -> None:
  """InputError where the target is the true class already."""
  same = np.asarray(target) == np.asarray(label)
  if same.any():
    i = int(np.argmax(same))
    raise InputError(
      f'target of image {i} is {int(target[i])}, its own class; expected another class, '
      'such as (label + 1) % num_classes'
    )


def targets_are_labels(target: Label, label: Label) -> None:
  """InputError where the target is not the true class, which is to stay."""
  other = np.asarray(target) != np.asarray(label)
  if other.any():
    i = int(np.argmax(other))
    raise InputError(
      f'target of image {i} is {int(target[i])}, its class {int(label[i])}: with goal '
      "'map_only' the class stays what it is, so leave target out"
    )


def explicable(values: Any, interpreter: Any, what: str, ids: Any = None) -> None:
  """InputError where a class is none that the interpreter was trained for; ids name the images."""
  if interpreter.classes is None:
    return
  unknown = ~np.isin(np.asarray(values), interpreter.classes)
  if unknown.any():
    i = int(np.argmax(unknown))
    known = ', '.join(map(str, interpreter.classes[:12]))
    more = ', …' if len(interpreter.classes) > 12 else ''
    image = i if ids is None else int(ids[i])
    value = int(np.asarray(values)[i])
    raise InputError(
      f'{what} of image {image} is {value}, a class that {interpreter.name} never '
      f'saw in its training; it knows {known}{more}: choose among these, or train it for more'
    )


def target_maps(values: Any, shapes: Any) -> Any:
  """Maps as f32 in [0,1]: one array of the shape, or a mapping of such by name; or InputError."""
  if not isinstance(shapes, Mapping):
    if isinstance(values, Mapping):
      raise InputError(
        f'target_map is a mapping of {", ".join(map(str, values))}; expected one array of maps: '
        'mappings are for interpreters.joint(…)'
      )
    return target_map(values, shapes)
  names = ', '.join(shapes)
  if not isinstance(values, Mapping) or set(values) != set(shapes):
    given = f'a mapping of {", ".join(map(str, values))}' if isinstance(values, Mapping) else 'one'
    raise InputError(f'target_map is {given}; a joint needs a mapping with maps for each: {names}')
  return {name: target_map(values[name], shape) for name, shape in shapes.items()}


def target_map(values: Any, shape: tuple[int, ...]) -> Map:
  """Maps as f32 of that shape in [0,1], or InputError."""
  values = np.asarray(values)
  if values.shape != tuple(shape):
    raise InputError(
      f'target_map has shape {values.shape}; the interpreter makes maps of {tuple(shape)}'
    )
  if not np.isfinite(values).all() or values.min() < 0 or values.max() > 1:
    raise InputError(
      f'target_map ranges over [{values.min():g}, {values.max():g}]; expected finite values '
      'in [0,1]'
    )
  return jnp.asarray(values, jnp.float32)
