"""What the classes of a run are called in its report, where that can be known."""

import json
import pathlib
import re
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp

from adv2_jax.validate import user_path
from adv2_jax.weights import zoo
from experiments import _setup

CIFAR10 = 'airplane automobile bird cat deer dog frog horse ship truck'.split()
INDEX = 'imagenet_class_index.json'  # {number: [wnid, name]}, as Keras and torchvision ship it
LIST = 'classes.txt'  # a name per line


def of(setup: _setup.Setup) -> Sequence[str] | None:
  """By the data set, the weights' card, or a file `INDEX` or `LIST` beside weights or data."""
  size = _setup.image_size(setup.config)
  x = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
  n = jax.eval_shape(setup.clf, x).logits.shape[-1]
  return next((names for names in _known(setup) if len(names) == n), None)


def _known(setup: _setup.Setup) -> Iterator[Sequence[str]]:
  config = setup.config
  weights = zoo.resolve(config['weights'] or config['model'])
  yield setup.dataset.class_names or ()
  yield zoo.read_card(weights).get('class_names') or ()
  places = [weights, *([user_path(config['data_path'])] if config['data_path'] else [])]
  for place in places:
    yield from beside(place)
  if any(
    re.match('cifar.?10(?!0)', text) for text in (config['dataset'], *(p.stem for p in places))
  ):
    yield CIFAR10


def beside(path: pathlib.Path) -> Iterator[Sequence[str]]:
  """The names in the files of `path`, or of the folder it lies in; what cannot be read is none."""
  for folder in (path, path.parent) if path.is_dir() else (path.parent,):
    try:
      index = json.loads((folder / INDEX).read_text(encoding='utf-8'))
      yield [index[str(i)][1].replace('_', ' ') for i in range(len(index))]
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
      pass
    try:
      yield (folder / LIST).read_text(encoding='utf-8-sig').rstrip().splitlines()
    except (OSError, ValueError):
      pass
