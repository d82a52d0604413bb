"""Data sets: `load(name, data_path, …)` gives a `Dataset`; see `base` for what that is."""

import dataclasses
import functools
import itertools
import pathlib
from typing import Any

import numpy as np

from adv2_jax.data import scene_painter, sources
from adv2_jax.data.base import CHECK_ALL_UP_TO, Dataset, omissions
from adv2_jax.data.masks import read_masks
from adv2_jax.types import InputError
from adv2_jax.validate import user_path

__all__ = ['NAMES', 'TFDS', 'Dataset', 'load', 'omissions', 'scenes']

TFDS = tuple(sources.TFDS)
NAMES = ('scenes', *TFDS, 'folder', 'npz', 'packed')


def scenes(
  split: str = 'test',
  n: int = 2000,
  seed: int = 0,
  *,
  image_size: int | None = None,
  skip_corrupt: bool = False,
) -> Dataset:
  """The built-in scenes with their exact masks, drawn when asked for; see `data.scene_painter`.

  Args:
    split: 'train', 'validation' or 'test': disjoint streams of scenes.
    n: how many; the first n of the stream.
    seed: of the whole data set.
    image_size: side to resize and crop to; None: 64 pixels.
    skip_corrupt: has no effect; nothing here can be damaged.

  Raises:
    InputError: unknown split.
  """
  if split not in scene_painter.SPLITS:
    raise InputError(
      f'scenes have no split {split!r}; they have: {", ".join(scene_painter.SPLITS)}'
    )
  if not 0 <= n <= 2**31:
    raise InputError(f'number of scenes {n} is not in 0…2³¹')
  # The last few are kept: image and mask of one example are usually asked for together.
  render = functools.lru_cache(maxsize=64)(functools.partial(scene_painter.render, seed, split))
  return Dataset(
    name='scenes',
    labels=np.arange(n) % len(scene_painter.CLASS_NAMES),
    num_classes=len(scene_painter.CLASS_NAMES),
    class_names=scene_painter.CLASS_NAMES,
    decode=lambda i: render(i)[0],
    describe=lambda i: f'scene {i} of {split}',
    stamps=lambda: [f'{split} {seed} {n}'.encode()],
    mask_of=lambda i: render(i)[1],
    image_size=image_size,
    skip_corrupt=skip_corrupt,
  )


def _with_masks(dataset: Dataset, masks: str | pathlib.Path | None) -> Dataset:
  if masks is None:
    return dataset
  path = user_path(masks)
  return dataclasses.replace(
    dataset,
    mask_of=read_masks(path, len(dataset)),
    stamps=lambda: itertools.chain(dataset.stamps(), [path.read_bytes()]),  # a file at a time
  )


def load(
  name: str,
  data_path: str | pathlib.Path | None = None,
  image_size: int | None = None,
  split: str | None = None,
  label_key: str = sources.LABEL_KEY,
  masks: str | pathlib.Path | None = None,
  skip_corrupt: bool = False,
  is_labelled: bool = True,
) -> Dataset:
  """Opens a data set, and finds what is wrong with it before any work is done.

  Sets of up to 1000 images are decoded once here; of a larger one, `check` the ids to be used.

  Args:
    name: one of `NAMES`.
    data_path: the folder or file; for prepared tfds sets the tfds data directory (optional).
    image_size: resize the shorter side to S·256/224 and cut the middle S×S out, where images have
      another size; None keeps them.
    split: for scenes and tfds sets one of theirs, None for the one to evaluate on; for files
      'train' or 'held_out' (see `Dataset.part`), None for all.
    label_key: which array of a packed file holds the labels; imagenette has 'y_imagenet' too, the
      numbers of its classes among ImageNet's.
    masks: file with the objects' masks or boxes, see `data.masks.read_masks`.
    skip_corrupt: leave damaged images out (see `Dataset.damaged`) instead of stopping.
    is_labelled: False: labels need not be there and are not looked at; all are −1.

  Raises:
    InputError: whatever is wrong, in one line that names the file or value.
  """
  if name not in NAMES:
    raise InputError(f'unknown data set {name!r}; expected one of {", ".join(NAMES)}')
  options: dict[str, Any] = {'image_size': image_size, 'skip_corrupt': skip_corrupt}
  several = name == 'packed' or (name, label_key) == ('imagenette', sources.IMAGENET_KEY)
  if label_key != sources.LABEL_KEY and not several:
    raise InputError(
      f'--label_key {label_key!r}: only packed data sets have several label arrays, and imagenette '
      f'has {sources.IMAGENET_KEY}'
    )
  if name == 'scenes':
    if data_path is not None:
      raise InputError(
        f'{data_path}: the scenes are drawn, not read; say what the file is with --dataset packed, '
        'npz or folder'
      )
    drawn = dataclasses.replace(scenes(split or 'test', **options), is_labelled=is_labelled)
    return _with_masks(drawn, masks)
  options['is_labelled'] = is_labelled
  if name in sources.TFDS:
    dataset = sources.prepared_tfds(name, data_path, split, label_key, **options)
  elif name == 'packed':
    dataset = sources.packed(data_path, label_key, **options)
  else:
    dataset = {'folder': sources.folder, 'npz': sources.npz}[name](data_path, **options)
  if split is not None and name not in sources.TFDS:
    dataset = dataset.part(split)
  dataset = _with_masks(dataset, masks)
  return dataset.check() if len(dataset.ids) <= CHECK_ALL_UP_TO else dataset
