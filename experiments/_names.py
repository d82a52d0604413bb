"""What the classes of a run are called in its report, where that can be known."""

import contextlib
import json
import pathlib
import re
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp

from adv2_jax.validate import user_path
from adv2_jax.weights import zoo
from experiments import _setup

INDEX = 'imagenet_class_index.json'  # {number: [wnid, name]}, as Keras has it
LIST = 'classes.txt'  # a name per line
CIFAR10 = (
  *('airplane', 'automobile', 'bird', 'cat', 'deer'),
  *('dog', 'frog', 'horse', 'ship', 'truck'),
)


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
  if any(re.match('cifar.?10(?!0)', place.stem) for place in places):
    yield CIFAR10


def beside(path: pathlib.Path) -> Iterator[Sequence[str]]:
  """The names in files in `path`, or in the folder it lies in; one that cannot be read has none."""
  for folder in (path, path.parent) if path.is_dir() else (path.parent,):
    for read in (_index, _list):
      with contextlib.suppress(OSError, ValueError, LookupError, TypeError, AttributeError):
        yield read(folder)


def _index(folder: pathlib.Path) -> Sequence[str]:
  index = json.loads((folder / INDEX).read_text(encoding='utf-8'))
  return [str(index[str(i)][1]).replace('_', ' ') for i in range(len(index))]


def _list(folder: pathlib.Path) -> Sequence[str]:
  return (folder / LIST).read_text(encoding='utf-8-sig').rstrip().splitlines()
