"""What a data set is here: labels up front, images decoded one by one when asked for."""

import dataclasses
import hashlib
import itertools
import json
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np

from adv2_jax import images as image_lib
from adv2_jax.types import InputError

# Sets up to this size are decoded once when loaded, so that a damaged image stops a run at once.
CHECK_ALL_UP_TO = 1000
UNDECODABLE = 'cannot be decoded'
FROM_ONE = (
  'the labels seem to count from 1, while the classifier counts its classes from 0: take 1 off each'
)
FROM_MINUS_ONE = 'the classifier seems to have one more class before the first: add 1 to each label'


@dataclasses.dataclass(frozen=True)
class Dataset:
  """A labelled set of 8-bit images; an example's id is its index in the set.

  Attributes:
    name: e.g. 'scenes'.
    labels: i32[N]; −1 throughout where `is_labelled` is False.
    num_classes: labels are below it.
    decode: id -> u8[H,W,3] as stored.
    describe: id -> the example's name in messages, e.g. its file.
    stamps: () -> bytes that change when an image as stored does; see `digest`.
    file_of: id -> its file's name below the data path, where it has one.
    class_names: in label order, where known.
    image_size: side to resize and crop to; None keeps images as they are.
    mask_of: id -> bool[H,W] of the object in the image as stored, or as resized; None if unknown.
    skip_corrupt: leave damaged images out, instead of stopping.
    damaged: ids found damaged by `check`.
    left_out: ids of another split.
    omitted: what lies in the data path but is not in use, reason -> names of files.
    is_labelled: False: nobody knows the labels, or they are not to be looked at.
  """

  name: str
  labels: np.ndarray
  num_classes: int
  decode: Callable[[int], np.ndarray]
  describe: Callable[[int], str]
  stamps: Callable[[], Iterable[bytes | memoryview]]
  file_of: Callable[[int], str] | None = None
  class_names: tuple[str, ...] | None = None
  image_size: int | None = None
  mask_of: Callable[[int], np.ndarray | None] | None = None
  skip_corrupt: bool = False
  damaged: frozenset[int] = frozenset()
  left_out: frozenset[int] = frozenset()
  omitted: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
  is_labelled: bool = True

  def __post_init__(self):
    labels = self.labels if self.is_labelled else np.zeros(len(self.labels), np.int32)
    labels = check_labels(labels, self.num_classes, self.name) - (not self.is_labelled)
    object.__setattr__(self, 'labels', labels)
    if self.image_size is not None and self.image_size < 1:
      raise InputError(f'image_size {self.image_size} is not a positive number of pixels')

  def __len__(self) -> int:
    """Number of examples in the set, damaged ones and those left out included."""
    return len(self.labels)

  @property
  def ids(self) -> np.ndarray:
    """The examples to use, i64[n] in order: all of the split, less those found damaged."""
    return np.setdiff1d(np.arange(len(self)), list(self.damaged | self.left_out))

  def file(self, i: int) -> str:
    """The name of example i's file below the data path; '' where it has none."""
    (i,) = self._known([i])
    return '' if self.file_of is None else self.file_of(i)

  def digest(self) -> str:
    """SHA-256, in hex, of what results depend on: images, masks, labels, split and image size.

    Files of a folder of more than `CHECK_ALL_UP_TO` count by name, size and time (to the second).
    """
    fields = [self.name, self.image_size, self.num_classes, sorted(self.left_out)]
    own = [json.dumps(fields).encode(), self.labels.tobytes()]
    whole = hashlib.sha256()
    for piece in itertools.chain(own, self.stamps()):
      whole.update(hashlib.sha256(piece).digest())  # of one length: no piece runs into the next
    return whole.hexdigest()

  def part(self, split: str) -> 'Dataset':
    """The part 'train' or 'held_out' of a set that has no splits of its own; ids stay as they are.

    The latter is a tenth, drawn at random but always the same: what `experiments.train` holds out.

    Raises:
      InputError: another split.
    """
    if split not in ('train', 'held_out'):
      raise InputError(
        f'--split {split!r}: a {self.name} data set has no splits but train and held_out'
      )
    n = len(self)
    held_out = np.random.default_rng(0).permutation(n) < max(1, n // 10)
    others = np.flatnonzero(held_out == (split == 'train'))
    return dataclasses.replace(self, left_out=frozenset(others.tolist()))

  def _known(self, ids: Sequence[int] | np.ndarray) -> list[int]:
    """These ids as plain numbers, or InputError: the rule for all that is asked for by id."""
    found = np.asarray(ids)
    if found.ndim != 1 or not found.size or found.dtype.kind not in 'iu':
      raise InputError(f'{ids} are no ids of {self.name}: expected whole numbers, such as range(8)')
    outside = found[(found < 0) | (found >= len(self))]
    if outside.size:
      raise InputError(f'{self.name} has no example {outside[0]}: its ids are 0…{len(self) - 1}')
    return found.tolist()

  def image(self, i: int) -> np.ndarray:
    """Example i as u8[H,W,3], resized and cropped to `image_size` if that is set.

    Raises:
      InputError: there is no such example, or its image cannot be decoded.
    """
    (i,) = self._known([i])
    image = self.decode(i)
    return image if self.image_size is None else image_lib.resize_crop(image, self.image_size)

  def images(self, ids: Sequence[int] | np.ndarray) -> np.ndarray:
    """Examples stacked, u8[n,H,W,3].

    Raises:
      InputError: they differ in size, or one of them is not in the set.
    """
    ids = self._known(ids)
    stack = [self.image(i) for i in ids]
    for i, image in zip(ids, stack, strict=True):
      self._check_shape(i, image.shape, ids[0], stack[0].shape)
    return np.stack(stack)

  def mask(self, i: int) -> np.ndarray | None:
    """Where the object is in `image(i)`, bool[H,W]; None if not known or outside the crop.

    Raises:
      InputError: the mask fits neither the stored image nor the resized one.
    """
    (i,) = self._known([i])
    mask = None if self.mask_of is None else self.mask_of(i)
    if mask is None:
      return None
    stored = self.decode(i).shape[:2]
    final = stored if self.image_size is None else (self.image_size,) * 2
    if mask.shape not in (stored, final):
      sizes = ('×'.join(map(str, shape)) for shape in (mask.shape, stored, final))
      raise InputError(
        'the mask of image {} is {} pixels; expected {} as stored, or {} as used: choose '
        '--image_size to suit --masks'.format(self.describe(i), *sizes)
      )
    if mask.shape == stored and self.image_size is not None:
      mask = image_lib.resize_crop(mask, self.image_size, nearest=True)
    return mask if mask.any() else None

  def check(self, ids: Sequence[int] | np.ndarray | None = None) -> 'Dataset':
    """Decodes examples once, before any work: all, or those of `ids`.

    Returns:
      The same set; with `skip_corrupt`, less the damaged examples (ids stay as they are).

    Raises:
      InputError: an image is damaged (named), or of another size than the first; or none is left.
    """
    damaged, first = set(self.damaged), None
    for i in self.ids.tolist() if ids is None else self._known(ids):
      try:
        shape = self.image(i).shape
      except InputError:
        if not self.skip_corrupt:
          raise
        damaged.add(i)
        continue
      self.mask(i)
      first = first or (i, shape)
      self._check_shape(i, shape, *first)
    checked = self.without(damaged)
    if not len(checked.ids):
      raise InputError(f'data set {self.name} has no readable image: check --data_path')
    return checked

  def without(self, damaged: Iterable[int]) -> 'Dataset':
    """The same set, these examples counted among the damaged ones."""
    damaged = self.damaged.union(damaged)
    names = tuple(self.file(i) or self.describe(i) for i in sorted(damaged))
    omitted = {**self.omitted, UNDECODABLE: names} if names else self.omitted
    return dataclasses.replace(self, damaged=damaged, omitted=omitted)

  def numbered_for(self, num_classes: int, class_names: Sequence[str] | None = None) -> 'Dataset':
    """The same set, its labels numbered as a classifier of `num_classes` numbers its classes.

    Where both have names, a label follows its name; else the numbers are taken as they are.

    Raises:
      InputError: a label beyond the classifier's, a name it does not have, or names for some of its
        classes only, when its own are not known.
    """
    own, names = self.class_names, tuple(class_names or ())
    if not self.is_labelled:
      return dataclasses.replace(self, num_classes=num_classes, class_names=names or None)
    check_labels(self.labels, num_classes, self.name)
    if own is None or own == names:
      return self
    remedy = 'give a labels.csv with the columns file,label and class numbers'
    if not names:
      if len(own) < num_classes:
        raise InputError(
          f'{self.name} has {len(own)} named classes, the classifier {num_classes} without names: '
          f'which is which cannot be told; {remedy}'
        )
      return self
    strange = [name for name in own if name not in names]
    if strange:
      raise InputError(
        f"class {strange[0]!r} of {self.name} is none of the classifier's "
        f'({", ".join(names[:3])}, …): rename it, or {remedy}'
      )
    number = np.array([names.index(name) for name in own])
    return dataclasses.replace(
      self, labels=number[self.labels], num_classes=num_classes, class_names=names
    )

  def _check_shape(self, i, shape, first, first_shape) -> None:
    if shape != first_shape:
      size, first_size = ('×'.join(map(str, s[:2])) for s in (shape, first_shape))
      raise InputError(
        f'image {self.describe(int(i))} is {size} pixels, {self.describe(int(first))} is '
        f'{first_size}: bring them to one size with --image_size'
      )


def check_labels(labels: np.ndarray, num_classes: int, name: str) -> np.ndarray:
  """Labels as i32[N], all in [0, num_classes).

  Raises:
    InputError: there are none, or one is outside, or they are not integers.
  """
  labels = np.asarray(labels)
  if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer):
    raise InputError(
      f'labels of {name} are {labels.dtype}{list(labels.shape)}: expected integers [N]'
    )
  if not len(labels):
    raise InputError(f'data set {name} is empty: check --data_path and --split')
  num_classes = min(num_classes, 2**31)
  outside = np.flatnonzero((labels < 0) | (labels >= num_classes))
  if len(outside):
    i = outside[0]
    from_one = labels.min() > 0 and labels.max() == num_classes
    raise InputError(
      f'label {labels[i]} of example {i} of {name} is outside 0…{num_classes - 1}: '
      + (FROM_ONE if from_one else 'check --label_key and --model')
    )
  return labels.astype(np.int32)


def omissions(omitted: Mapping[str, tuple[str, ...]]) -> str:
  """`Dataset.omitted` in one line."""
  told = []
  for reason, names in omitted.items():
    more = ', …' if len(names) > 3 else ''
    told.append(f'{len(names)} {reason} ({", ".join(names[:3])}{more})')
  return f'left out of the data: {"; ".join(told)}'
