"""Where images come from: folders, npz files, packed npz files, prepared tfds sets.

Each function returns a `Dataset` whose images are decoded when asked for. Whatever can be wrong
with the files as a whole is found here; single images are checked by `Dataset.check`.
"""

import contextlib
import csv
import io
import os
import pathlib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from adv2_jax import images as image_lib
from adv2_jax.data.base import CHECK_ALL_UP_TO, Dataset
from adv2_jax.types import InputError
from adv2_jax.validate import printable, user_path, whole_number

Path = str | pathlib.Path | None
IMAGE_SUFFIXES = (
  *('.png', '.jpg', '.jpeg', '.jpe', '.jfif', '.webp', '.bmp', '.gif'),
  *('.tif', '.tiff', '.ppm', '.pgm', '.pnm'),
)
NEEDED = 'one sub-folder of images per class, or labels.csv with the columns file,label'
# What Windows, macOS and network drives leave in folders, in small letters; beside what begins
# with a dot.
_SYSTEM = frozenset(
  {
    *('__macosx', 'thumbs.db', 'ehthumbs.db', 'desktop.ini', '$recycle.bin'),
    *('system volume information', 'lost+found', '@eadir'),
  }
)
LABEL_KEY = 'y'
IMAGENET_KEY = 'y_imagenet'
# Imagenette's ten classes, in its order, among ImageNet's.
IMAGENETTE = np.array([0, 217, 482, 491, 497, 566, 569, 571, 574, 701])

# Our name -> tfds builder and its evaluation split.
TFDS = {
  'cifar10': ('cifar10', 'test'),
  'imagenette': ('imagenette/full-size-v2', 'validation'),
  'imagenet2012': ('imagenet2012', 'validation'),
}


def _existing(data_path: Path, what: str) -> pathlib.Path:
  if data_path is None:
    raise InputError(f'--dataset {what} needs --data_path')
  path = user_path(data_path)
  if not path.exists():
    raise InputError(f'--data_path {path} does not exist')
  return path


def read_npz(path: pathlib.Path) -> Mapping[str, np.ndarray]:
  """The arrays of an .npz file; pickled objects are refused.

  Raises:
    InputError: not an .npz file, cut short, or an array in it is a pickle.
  """
  try:
    with path.open('rb') as file:
      arrays = np.load(file, allow_pickle=False)
      if not isinstance(arrays, np.lib.npyio.NpzFile):
        raise ValueError('a single array, not an archive')
      return {key: arrays[key] for key in arrays.files}
  except Exception as error:  # zip, zlib, numpy and OS errors: all mean the file is unusable.
    reason = 'it contains pickled objects' if 'allow_pickle' in str(error) else error
    raise InputError(f'{path} is not a readable .npz of plain arrays: {reason}') from None


def read_csv(path: pathlib.Path, columns: Sequence[str]) -> list[tuple[int, dict[str, str]]]:
  """(line number, {column: text}) of every line, these columns only, blanks about texts cut off.

  A line that is too short has ''. A byte-order mark, as spreadsheets write it, is passed over.

  Raises:
    InputError: not text in UTF-8, not CSV, or one of the columns is missing.
  """
  try:
    with path.open(newline='', encoding='utf-8-sig') as file:
      reader = csv.DictReader(file, restval='', skipinitialspace=True)
      reader.fieldnames = header = [name.strip() for name in reader.fieldnames or ()]
      if not set(columns) <= set(header):
        raise InputError(f'{path} starts with {header}; expected the columns {",".join(columns)}')
      return [(reader.line_num, {name: row[name].strip() for name in columns}) for row in reader]
  except (UnicodeDecodeError, csv.Error) as error:
    raise InputError(f'{path} is not a CSV file in UTF-8 ({error}); save it as one') from None
  except OSError as error:
    raise InputError(f'cannot read {path}: {error.strerror}; check the file') from None


def table_number(text: str) -> int | None:
  """A whole number as tables hold it, '3' or '3.0'; None where it is none."""
  return whole_number(re.sub(r'\.0*$', '', text))


def _array(arrays: Mapping[str, np.ndarray], key: str, path: pathlib.Path) -> np.ndarray:
  if key not in arrays:
    raise InputError(f'{path} has no array {key!r}; it has: {", ".join(sorted(arrays))}')
  return arrays[key]


def _classes(
  labels: np.ndarray, names: Any = None
) -> tuple[np.ndarray, int, tuple[str, ...] | None]:
  """Labels, the number of classes and their names, where the names cover the labels.

  Names that are all numbers are no names: the classes have these numbers.
  """
  if labels.dtype.kind not in 'iu' or not labels.size:
    return labels, 1, None  # refused when the `Dataset` is made
  names = np.array(() if names is None else names)
  if names.ndim != 1 or labels.min() < 0 or labels.max() >= len(names):
    return labels, int(labels.max()) + 1, None
  if names.dtype.kind == 'S':
    names = np.char.decode(names, 'utf-8', 'replace')
  texts = tuple(printable(str(name)) for name in names)
  numbers = [table_number(text) for text in texts]
  if None in numbers:
    return labels, len(texts), texts
  values = np.array(numbers, np.int64)
  return values[labels], int(values.max()) + 1, None


class _Listing(NamedTuple):
  """What a folder holds, by name, sorted; hidden and system entries aside."""

  folders: list[str]
  images: list[str]
  others: list[str]


def _is_hidden(name: str) -> bool:
  return name.startswith('.') or name.lower() in _SYSTEM


def _list(path: pathlib.Path) -> _Listing:
  try:
    with os.scandir(path) as entries:
      found = sorted((e.name, e.is_dir()) for e in entries if not _is_hidden(e.name))
  except OSError as error:
    raise InputError(f'folder {path} cannot be read: {error.strerror}') from None
  listing = _Listing([], [], [])
  for name, is_folder in found:
    is_image = pathlib.PurePath(name).suffix.lower() in IMAGE_SUFFIXES
    (listing.folders if is_folder else listing.images if is_image else listing.others).append(name)
  return listing


def _images_below(root: pathlib.Path, name: str) -> Iterator[str]:
  """Names below `root` of all images in this folder and in the folders in it."""
  listing = _list(root / name)
  yield from (f'{name}/{image}' for image in listing.images)
  for inner in listing.folders:
    yield from _images_below(root, f'{name}/{inner}')


class _Found(NamedTuple):
  """Files below the data path, their labels as texts, and what was left out, reason -> names."""

  files: list[str]
  labels: list[str]
  omitted: dict[str, tuple[str, ...]]


def folder(data_path: Path, is_labelled: bool = True, **options: Any) -> Dataset:
  """Image files: one sub-folder per class, or labels.csv with the columns file,label.

  Labels, names of folders too, are class numbers if all of them are; else names, numbered in sorted
  order. Without labels, the files may lie in the folder itself.
  """
  root = _existing(data_path, 'folder')
  if not root.is_dir():
    raise InputError(f'--data_path {root} is not a folder')
  read = _read_labels_csv if (root / 'labels.csv').exists() else _read_class_folders
  files, raw, omitted = read(root, is_labelled)
  number = {name: k for k, name in enumerate(sorted(set(raw)))}
  strange = [name for name in number if table_number(name) is None]
  if is_labelled and 0 < len(strange) <= len(number) / 2:
    raise InputError(
      f'class {strange[0]!r} of {root} is no number, as {len(number) - len(strange)} others are: '
      'give numbers for all, or names for all'
    )
  labels, num_classes, class_names = _classes(np.array([number[name] for name in raw]), [*number])

  def stamps() -> Iterator[bytes]:
    for file in files:
      yield os.fsencode(file)
      with contextlib.suppress(OSError):  # `check` tells what cannot be read
        if len(files) <= CHECK_ALL_UP_TO:
          yield (root / file).read_bytes()
        else:
          stat = (root / file).stat()
          yield b'%d %d' % (stat.st_size, stat.st_mtime)

  return Dataset(
    name='folder',
    labels=labels,
    num_classes=num_classes,
    class_names=class_names if is_labelled else None,
    decode=lambda i: image_lib.read_image(root / files[i]),
    describe=lambda i: str(root / files[i]),
    stamps=stamps,
    file_of=lambda i: printable(files[i]),
    omitted={reason: tuple(map(printable, names)) for reason, names in omitted.items() if names},
    is_labelled=is_labelled,
    **options,
  )


def _read_class_folders(root: pathlib.Path, is_labelled: bool) -> _Found:
  top = _list(root)
  classes = {name: _list(root / name) for name in top.folders}
  files = [f'{name}/{image}' for name in classes for image in classes[name].images]
  others = [f'{name}/{other}' for name in classes for other in classes[name].others]
  deeper = [
    image
    for name in classes
    for inner in classes[name].folders
    for image in _images_below(root, f'{name}/{inner}')
  ]
  omitted = {
    'in no image format that is read': (*others,),
    'in folders within class folders': (*deeper,),
    'beside the class folders': (*top.images, *top.others),
  }
  if files:
    empty = next((name for name in classes if not classes[name].images), None)
    if is_labelled and empty:
      inner = next((image for image in deeper if image.startswith(f'{empty}/')), None)
      what = f'has only deeper images such as {inner}: move them up' if inner else 'has no images'
      raise InputError(
        f'class folder {root / empty} {what}; fill it or remove it, as each sub-folder is a class'
      )
    return _Found(files, [pathlib.PurePath(file).parts[0] for file in files], omitted)
  if not top.images:
    problem = f'has no images ({" ".join(IMAGE_SUFFIXES)}): expected {NEEDED}'
    if deeper:
      problem = f'has images in folders within folders only, such as {deeper[0]}: expected {NEEDED}'
  elif is_labelled:
    problem = (
      f'has {len(top.images)} images but no labels: expected {NEEDED}; or take what the net '
      'predicts for labels, by --labels predicted'
    )
  else:
    flat = {
      'in no image format that is read': (*others, *top.others),
      'in folders within the folder': (*deeper,),
    }
    return _Found(top.images, [''] * len(top.images), flat)
  raise InputError(f'folder {root} {problem}')


def _read_labels_csv(root: pathlib.Path, is_labelled: bool) -> _Found:
  path = root / 'labels.csv'
  files, labels, hidden = [], [], []
  for line, row in read_csv(path, ('file', 'label') if is_labelled else ('file',)):
    file, label = pathlib.PurePath(row['file']), row.get('label', '')
    if _is_hidden(file.name) or _SYSTEM.intersection(part.lower() for part in file.parts):
      hidden.append(str(file))
      continue
    if not (root / file).is_file():
      raise InputError(f'{path} line {line}: {root / file} does not exist')
    if is_labelled and not label:
      raise InputError(f'{path} line {line}: {root / file} has no label')
    files.append(file.as_posix())
    labels.append(label)
  if not files:
    raise InputError(f'{path} lists no images')
  return _Found(files, labels, {'hidden or of the system': (*hidden,)})


def npz(data_path: Path, is_labelled: bool = True, **options: Any) -> Dataset:
  """Arrays image u8[N,H,W,3] and label i[N]."""
  path = _existing(data_path, 'npz')
  arrays = read_npz(path)
  image = _array(arrays, 'image', path)
  if image.dtype != np.uint8:
    seen = 'NaN' if image.dtype.kind == 'f' and np.isnan(image).any() else f'{image.dtype}'
    if image.size and seen == f'{image.dtype}':
      seen += f' from {image.min():g} to {image.max():g}'
    raise InputError(f'image in {path} is {seen}: expected uint8 from 0 to 255')
  if image.ndim != 4 or image.shape[-1] != 3:
    raise InputError(f'image in {path} has shape {list(image.shape)}: expected [N,H,W,3]')
  labels = _labels(arrays, 'label', path, len(image), is_labelled)
  labels, num_classes, class_names = _classes(labels, arrays.get('classes'))
  return Dataset(
    name='npz',
    labels=labels,
    num_classes=num_classes,
    class_names=class_names,
    decode=lambda i: image[i],
    describe=lambda i: f'{i} of {path}',
    stamps=lambda: [str(image.shape).encode(), np.ascontiguousarray(image).reshape(-1).data],
    is_labelled=is_labelled,
    **options,
  )


def packed(
  data_path: Path, label_key: str = LABEL_KEY, is_labelled: bool = True, **options: Any
) -> Dataset:
  """Encoded image files end to end: `blob` u8, `offsets` i[N+1] and the labels `label_key` i[N]."""
  path = _existing(data_path, 'packed')
  arrays = read_npz(path)
  blob, offsets = _array(arrays, 'blob', path), _array(arrays, 'offsets', path)
  if blob.dtype != np.uint8 or blob.ndim != 1:
    raise InputError(f'blob in {path} is {blob.dtype}{list(blob.shape)}: expected uint8 [bytes]')
  if offsets.dtype.kind not in 'iu' or offsets.ndim != 1 or not len(offsets):
    raise InputError(
      f'offsets in {path} is {offsets.dtype}{list(offsets.shape)}: expected integers [N+1]'
    )
  if offsets[0] < 0 or offsets[-1] > len(blob) or (np.diff(offsets.astype(np.int64)) < 0).any():
    raise InputError(f'offsets in {path} do not rise from 0 to {len(blob)}, the length of blob')
  labels = _labels(arrays, label_key, path, len(offsets) - 1, is_labelled)
  names = arrays.get('classes', arrays.get('names')) if label_key == LABEL_KEY else None
  labels, num_classes, class_names = _classes(labels, names)

  def decode(i: int) -> np.ndarray:
    file = io.BytesIO(blob[offsets[i] : offsets[i + 1]].tobytes())
    return image_lib.read_image(file, f'{i} of {path}')

  return Dataset(
    name='packed',
    labels=labels,
    num_classes=num_classes,
    class_names=class_names,
    decode=decode,
    describe=lambda i: f'{i} of {path}',
    stamps=lambda: [offsets.astype(np.int64).data, blob.data],
    is_labelled=is_labelled,
    **options,
  )


def _labels(
  arrays: Mapping[str, np.ndarray], key: str, path: pathlib.Path, n: int, is_labelled: bool
) -> np.ndarray:
  if not is_labelled:
    return np.zeros(n, np.int32)
  labels = _array(arrays, key, path)
  if labels.shape != (n,):
    raise InputError(f'labels in {path} have shape {list(labels.shape)} for {n} images: not [{n}]')
  return labels


def prepared_tfds(
  name: str,
  data_path: Path = None,
  split: str | None = None,
  label_key: str = LABEL_KEY,
  **options: Any,
) -> Dataset:
  """A set prepared by tensorflow_datasets, read at random through its `data_source`.

  Reading needs no TensorFlow; preparing image sets does. The set must be prepared in a
  random-access file format (array_record).

  Args:
    name: a key of `TFDS`.
    data_path: tfds's data directory; None for its default.
    split: a split of the set; None for the one to evaluate on.
    label_key: 'y_imagenet' numbers imagenette's classes as ImageNet does.
    **options: further fields of `Dataset`.

  Raises:
    InputError: the set is not prepared there; the message says how to do it.
  """
  import tensorflow_datasets as tfds

  builder_name, default_split = TFDS[name]
  data_path = None if data_path is None else user_path(data_path)
  split = split or default_split
  where = f', data_dir={str(data_path)!r}' if data_path else ''
  try:
    builder = tfds.builder(builder_name, data_dir=data_path)
    if not builder.data_path.exists():
      raise FileNotFoundError(builder.data_path)
    if split.split('[')[0] not in builder.info.splits:
      raise InputError(f'{name} has no split {split!r}; it has: {", ".join(builder.info.splits)}')
    # The files as they are: `read_image` decodes them, without TensorFlow.
    source = builder.as_data_source(split=split, decoders={'image': tfds.decode.SkipDecoding()})
  except InputError:
    raise
  except Exception as error:
    raise InputError(
      f'{name} is not prepared for random access ({error}): pip install ".[tfds]" in the '
      f'checkout, and run '
      f'python -c "import tensorflow_datasets as tfds; tfds.builder({builder_name!r}{where}, '
      "file_format='array_record').download_and_prepare()\""
    ) from None
  labels = np.array([source[i]['label'] for i in range(len(source))], np.int64)
  names, num_classes = builder.info.features['label'].names, None
  if label_key == IMAGENET_KEY:
    labels, num_classes, names = IMAGENETTE[labels], 1000, None

  def decode(i: int) -> np.ndarray:
    return image_lib.read_image(io.BytesIO(source[i]['image']), f'{i} of {name} {split}')

  return Dataset(
    name=name,
    labels=labels,
    num_classes=num_classes or len(names),
    class_names=names and tuple(names),
    decode=decode,
    describe=lambda i: f'{i} of {name} {split}',
    file_of=lambda i: printable(os.fsdecode(source[i].get('file_name', b''))),
    stamps=lambda: [f'{builder_name} {builder.version} {split} {len(source)}'.encode()],
    **options,
  )
