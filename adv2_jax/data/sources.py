"""Where images come from: folders, npz files, packed npz files, prepared tfds sets.

Each function returns a `Dataset` whose images are decoded when asked for. Whatever can be wrong
with the files as a whole is found here; single images are checked by `Dataset.check`.
"""

import contextlib
import csv
import io
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from adv2_jax import images as image_lib
from adv2_jax.data.base import CHECK_ALL_UP_TO, Dataset
from adv2_jax.types import InputError
from adv2_jax.validate import user_path

Path = str | pathlib.Path | None
IMAGE_SUFFIXES = ('.png', '.jpg', '.jpeg', '.webp', '.bmp', '.tif', '.tiff', '.ppm')
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
  """(line number, {column: text}) of every line; a line that is too short has ''.

  Raises:
    InputError: not text in UTF-8, not CSV, or one of the columns is missing.
  """
  try:
    with path.open(newline='', encoding='utf-8') as file:
      reader = csv.DictReader(file, restval='')
      if not set(columns) <= set(reader.fieldnames or ()):
        raise InputError(
          f'{path} starts with {reader.fieldnames}; expected the columns {",".join(columns)}'
        )
      return [(reader.line_num, row) for row in reader]
  except (UnicodeDecodeError, csv.Error) as error:
    raise InputError(f'{path} is not a CSV file in UTF-8 ({error}); save it as one') from None


def _array(arrays: Mapping[str, np.ndarray], key: str, path: pathlib.Path) -> np.ndarray:
  if key not in arrays:
    raise InputError(f'{path} has no array {key!r}; it has: {", ".join(sorted(arrays))}')
  return arrays[key]


def _classes(labels: np.ndarray, names: Any = None) -> tuple[int, tuple[str, ...] | None]:
  """Number of classes and their names, where the names cover the labels."""
  highest = int(labels.max()) + 1 if labels.size and labels.dtype.kind in 'iu' else 1
  if names is None or len(names) < highest:
    return highest, None
  return len(names), tuple(str(name) for name in names)


def folder(data_path: Path, **options: Any) -> Dataset:
  """Image files: one sub-folder per class (sorted), or labels.csv with columns file,label.

  Labels in labels.csv are class numbers, or else names (numbered in sorted order).
  """
  root = _existing(data_path, 'folder')
  if not root.is_dir():
    raise InputError(f'--data_path {root} is not a folder')
  names: list[str] | None
  if (root / 'labels.csv').exists():
    files, raw = _read_labels_csv(root)
    if all(label.lstrip('-').isdigit() for label in raw):
      names, labels = None, [int(label) for label in raw]
    else:
      names = sorted(set(raw))
      labels = [names.index(label) for label in raw]
  else:
    names = sorted(p.name for p in root.iterdir() if p.is_dir() and not p.name.startswith('.'))
    found = [
      (f'{name}/{path.name}', label)
      for label, name in enumerate(names)
      for path in sorted((root / name).iterdir())
      if path.suffix.lower() in IMAGE_SUFFIXES
    ]
    if not found:
      raise InputError(
        f'folder {root} has no images: expected one sub-folder per class, or labels.csv'
      )
    files, labels = [file for file, _ in found], [label for _, label in found]
  array = np.array(labels, np.int64)
  num_classes, class_names = _classes(array, names)

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
    labels=array,
    num_classes=num_classes,
    class_names=class_names,
    decode=lambda i: image_lib.read_image(root / files[i]),
    describe=lambda i: str(root / files[i]),
    stamps=stamps,
    file_of=lambda i: files[i],
    **options,
  )


def _read_labels_csv(root: pathlib.Path) -> tuple[list[str], list[str]]:
  path = root / 'labels.csv'
  files, labels = [], []
  for line, row in read_csv(path, ('file', 'label')):
    image, label = root / row['file'], row['label'].strip()
    if not image.is_file():
      raise InputError(f'{path} line {line}: {image} does not exist')
    if not label:
      raise InputError(f'{path} line {line}: {image} has no label')
    files.append(row['file'])
    labels.append(label)
  if not files:
    raise InputError(f'{path} lists no images')
  return files, labels


def npz(data_path: Path, **options: Any) -> Dataset:
  """Arrays image u8[N,H,W,3] and label i[N]."""
  path = _existing(data_path, 'npz')
  arrays = read_npz(path)
  image, labels = _array(arrays, 'image', path), _array(arrays, 'label', path)
  if image.dtype != np.uint8:
    seen = 'NaN' if image.dtype.kind == 'f' and np.isnan(image).any() else f'{image.dtype}'
    if image.size and seen == f'{image.dtype}':
      seen += f' from {image.min():g} to {image.max():g}'
    raise InputError(f'image in {path} is {seen}: expected uint8 from 0 to 255')
  if image.ndim != 4 or image.shape[-1] != 3:
    raise InputError(f'image in {path} has shape {list(image.shape)}: expected [N,H,W,3]')
  _check_length(labels, len(image), path)
  num_classes, class_names = _classes(labels, arrays.get('classes'))
  return Dataset(
    name='npz',
    labels=labels,
    num_classes=num_classes,
    class_names=class_names,
    decode=lambda i: image[i],
    describe=lambda i: f'{i} of {path}',
    stamps=lambda: [str(image.shape).encode(), np.ascontiguousarray(image).reshape(-1).data],
    **options,
  )


def packed(data_path: Path, label_key: str = LABEL_KEY, **options: Any) -> Dataset:
  """Encoded image files end to end: `blob` u8, `offsets` i[N+1] and the labels `label_key` i[N]."""
  path = _existing(data_path, 'packed')
  arrays = read_npz(path)
  blob, offsets = _array(arrays, 'blob', path), _array(arrays, 'offsets', path)
  labels = _array(arrays, label_key, path)
  if blob.dtype != np.uint8 or blob.ndim != 1:
    raise InputError(f'blob in {path} is {blob.dtype}{list(blob.shape)}: expected uint8 [bytes]')
  if offsets.dtype.kind not in 'iu' or offsets.ndim != 1 or not len(offsets):
    raise InputError(
      f'offsets in {path} is {offsets.dtype}{list(offsets.shape)}: expected integers [N+1]'
    )
  if offsets[0] < 0 or offsets[-1] > len(blob) or (np.diff(offsets.astype(np.int64)) < 0).any():
    raise InputError(f'offsets in {path} do not rise from 0 to {len(blob)}, the length of blob')
  _check_length(labels, len(offsets) - 1, path)
  names = arrays.get('classes', arrays.get('names'))
  num_classes, class_names = _classes(labels, names)

  def decode(i: int) -> np.ndarray:
    file = io.BytesIO(blob[offsets[i] : offsets[i + 1]].tobytes())
    return image_lib.read_image(file, f'{i} of {path}')

  return Dataset(
    name='packed',
    labels=labels,
    num_classes=num_classes,
    class_names=class_names if label_key == LABEL_KEY else None,
    decode=decode,
    describe=lambda i: f'{i} of {path}',
    stamps=lambda: [offsets.astype(np.int64).data, blob.data],
    **options,
  )


def _check_length(labels: np.ndarray, n: int, path: pathlib.Path) -> None:
  if labels.shape != (n,):
    raise InputError(f'labels in {path} have shape {list(labels.shape)} for {n} images: not [{n}]')


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
      f'{name} is not prepared for random access ({error}): pip install "adv2_jax[tfds]" and run '
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
    stamps=lambda: [f'{builder_name} {builder.version} {split} {len(source)}'.encode()],
    **options,
  )
