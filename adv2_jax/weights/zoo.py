"""Weights: torchvision's tensor names on one side, Flax variables on the other; never a pickle.

A checkpoint is a flat dict of tensors under torch's names and layouts (`layer1.0.conv1.weight`,
OIHW). The nets name their modules as torch does, so the mapping needs no table: a parameter's path,
joined by dots, is its tensor's name, up to the leaf.

    ('params', 'layer1.0', 'conv1', 'kernel')              layer1.0.conv1.weight, HWIO <-> OIHW
    ('params', 'fc', 'kernel')                             fc.weight, transposed
    ('params', 'layer1.0', 'bn1', 'norm', 'scale')         layer1.0.bn1.weight
    ('batch_stats', 'layer1.0', 'bn1', 'norm', 'mean')     layer1.0.bn1.running_mean

Weights may come with a card: a JSON file of the same stem with `CARD_FIELDS`. A card's sha256 is
checked before its weights are used.
"""

import functools
import hashlib
import itertools
import json
import os
import pathlib
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from adv2_jax import images, nets, validate
from adv2_jax.classifier import IMAGENET_MEAN, IMAGENET_STD, Classifier, from_linen
from adv2_jax.interpreters.rts import Decoder
from adv2_jax.nets import saliency_unet
from adv2_jax.types import Image, InputError, Label, PyTree
from adv2_jax.weights import files as weight_files
from adv2_jax.weights.files import Tensors

Path = tuple[str, ...]

CARD_FIELDS = ('model', 'num_classes', 'mean', 'std', 'accuracy', 'command', 'sha256')
BUILT_IN_DECODERS = {'scene_resnet': 'scene_rts'}  # net -> weights
DECODER_FIELDS = ('black_box', 'encoder', 'widths', 'confidence', 'classes')  # further ones of RTS
SOURCES = (
  'a built-in name, FILE.npz, FILE.safetensors, an orbax directory or hf://owner/name[/FILE]'
)

_PACKAGE = pathlib.Path(__file__).parents[1]
_LEAVES = {
  'kernel': 'weight',
  'scale': 'weight',
  'embedding': 'weight',
  'mean': 'running_mean',
  'var': 'running_var',
}
_DTYPES = ('float32', 'float16', 'bfloat16', 'float64')
_OLD_DENSENET = re.compile(r'(denselayer\d+\.(?:norm|conv))\.(\d)\.')


# --- names and layouts ----------------------------------------------------------------------------


def torch_name(path: Path) -> str:
  """The tensor name of a variable's path; see the module's table."""
  _, *modules, leaf = path
  if modules[-1] == 'norm':  # the nn.BatchNorm inside layers.BatchNorm
    modules.pop()
  return '.'.join([*modules, _LEAVES.get(leaf, leaf)])


def to_tensors(variables: PyTree) -> Tensors:
  """Flax variables {'params', 'batch_stats'} as tensors with torch's names and layouts."""
  return {
    torch_name(path): _torch_layout(path, np.asarray(leaf)) for path, leaf in _flat(variables)
  }


def from_tensors(template: PyTree, tensors: Mapping[str, np.ndarray], source: str) -> PyTree:
  """The inverse of `to_tensors`, in float32.

  Args:
    template: variables or their shapes (`jax.eval_shape`): what there must be.
    tensors: by torch name, of any float dtype.
    source: what the message calls the weights.

  Raises:
    InputError: the first tensor, in order of names, that is missing, unexpected, mis-shaped or not
      finite; and which net of the zoo the tensors do fit, if one.
  """
  paths = {torch_name(path): path for path, _ in _flat(template)}
  shapes = tensor_shapes(template)
  for name in sorted(shapes.keys() | tensors.keys()):
    if name not in tensors:
      problem = f'tensor {name!r} {list(shapes[name])} is missing'
    elif name not in shapes:
      problem = f'tensor {name!r} {list(tensors[name].shape)} is unexpected'
    elif tensors[name].shape != shapes[name]:
      problem = (
        f'tensor {name!r} has shape {list(tensors[name].shape)}, expected {list(shapes[name])}'
      )
    elif not np.isfinite(tensors[name].astype(np.float32)).all():
      raise InputError(
        f'{source}: tensor {name!r} holds NaN or infinite values; get the file again or retrain'
      )
    else:
      continue
    found = identify(tensors)
    if found:
      classes = _num_classes(tensors, nets.DEFAULTS[found].head)
      remedy = f'these are the weights of {found} with {classes} classes'
    else:
      remedy = 'no net of the zoo fits them; give the complete weights of the chosen model'
    raise InputError(f'{source}: {problem}; {remedy}')
  return traverse_util.unflatten_dict(
    {
      path: jnp.asarray(_flax_layout(path, np.asarray(tensors[name], np.float32)))
      for name, path in paths.items()
    }
  )


def load_variables(
  module: nn.Module, tensors: Mapping[str, np.ndarray], source: str = 'weights'
) -> PyTree:
  """The variables {'params', 'batch_stats'} of a zoo net from tensors; errors: `from_tensors`."""
  return from_tensors(_template(module), tensors, source)


def identify(tensors: Mapping[str, np.ndarray]) -> str | None:
  """The zoo's net that has exactly these names and shapes, or None."""
  shapes = {name: tensor.shape for name, tensor in tensors.items()}
  for name, defaults in nets.DEFAULTS.items():
    classes = _num_classes(tensors, defaults.head)
    if classes and _zoo_shapes(name, classes) == shapes:
      return name
  return None


@functools.cache
def _zoo_shapes(name: str, num_classes: int) -> dict[str, tuple[int, ...]]:
  return tensor_shapes(_template(nets.build(name, num_classes=num_classes)))


def _num_classes(tensors: Mapping[str, np.ndarray], head: str) -> int | None:
  weight = tensors.get(f'{head}.weight')
  return weight.shape[0] if weight is not None and weight.ndim == 2 else None


def _template(module: nn.Module) -> PyTree:
  return jax.eval_shape(
    module.init, jax.random.key(0), jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
  )


def _flat(variables: PyTree) -> list[tuple[Path, Any]]:
  return list(traverse_util.flatten_dict(dict(variables)).items())


def tensor_shapes(variables: PyTree) -> dict[str, tuple[int, ...]]:
  """The shapes that `to_tensors` gives; of variables, or of their shapes."""
  empty = ((path, np.broadcast_to(np.float32(0), leaf.shape)) for path, leaf in _flat(variables))
  return {torch_name(path): _torch_layout(path, leaf).shape for path, leaf in empty}


def _torch_layout(path: Path, x: np.ndarray) -> np.ndarray:
  if path[-1] != 'kernel':
    return x
  return x.transpose(3, 2, 0, 1) if x.ndim == 4 else x.T


def _flax_layout(path: Path, x: np.ndarray) -> np.ndarray:
  if path[-1] != 'kernel':
    return x
  return x.transpose(2, 3, 1, 0) if x.ndim == 4 else x.T


def canonical(tensors: Mapping[str, np.ndarray], source: str | os.PathLike = 'weights') -> Tensors:
  """Tensors under the names used here.

  Drops `num_batches_tracked` (a counter that torch keeps), takes off what all names begin with
  (`module.`, `_orig_mod.`, `model.`: wrappers), with a warning, and writes the `norm.1` of old
  DenseNet files as `norm1`.

  Raises:
    InputError: a tensor of integers, or of another dtype that is no usual float.
  """
  tensors = {k: v for k, v in tensors.items() if not k.endswith('num_batches_tracked')}
  for name, tensor in tensors.items():
    if tensor.dtype.name not in _DTYPES:
      raise weight_files.dtype_error(source, name, tensor.dtype)
  prefix = wrapper(tensors)
  if prefix:
    warnings.warn(f'{source}: the prefix {prefix!r} of all names is left out', stacklevel=3)
  return {
    _OLD_DENSENET.sub(r'\1\2.', name.removeprefix(prefix)): tensor
    for name, tensor in tensors.items()
  }


def wrapper(names: Iterable[str]) -> str:
  """The modules around the net, 'module._orig_mod.'; '' where there are none.

  No net here is one module alone, so what all names begin with is around it; a layer alone, such
  as 'fc.', is none.
  """
  split = [name.split('.') for name in names]
  deep = min((len(parts) for parts in split), default=0) - 2  # a layer and its tensor stay
  first = itertools.takewhile(lambda column: len({*column}) == 1, zip(*split, strict=False))
  return ''.join(f'{column[0]}.' for column in itertools.islice(first, max(deep, 0)))


# --- reading --------------------------------------------------------------------------------------


def built_in() -> dict[str, pathlib.Path]:
  """The built-in weights by name: `_builtin/` once installed, `checkpoints/` in the tree."""
  folder = _PACKAGE / '_builtin'
  if not folder.is_dir():
    folder = _PACKAGE.parent / 'checkpoints'
  return {path.stem: path for path in sorted(folder.glob('*.safetensors'))}


def built_in_decoder(black_box: str, weights: str | None = None) -> str | None:
  """Name of the saliency net of RTS for a net with its built-in weights; None: there is none."""
  name = BUILT_IN_DECODERS.get(black_box)
  return name if weights in (None, black_box) and name in built_in() else None


def resolve(source: str | os.PathLike) -> pathlib.Path:
  """The local file or directory of a weights source; downloads from the hub if need be.

  Raises:
    InputError: nothing is there, or it is a pickle, which is never opened.
  """
  text = os.fspath(source)
  if text.endswith(weight_files.PICKLES) and not validate.user_path(text).is_dir():
    raise weight_files.pickle_error(text)
  if text.startswith('hf://'):
    return weight_files.download(text)
  path = built_in().get(text, validate.user_path(text))
  if not path.exists():
    known = ', '.join(built_in()) or 'none'
    raise InputError(f'no weights at {str(path)!r}; expected {SOURCES} (built in: {known})')
  return path


def read_card(path: pathlib.Path) -> dict[str, Any]:
  """The card beside the weights at `path`; {} when there is none and they are not built in."""
  card_path, required = path.with_suffix('.json'), path in built_in().values()
  if not card_path.exists() and not required:
    return {}
  try:
    card = json.loads(card_path.read_text(encoding='utf-8'))
  except (OSError, ValueError) as e:
    raise InputError(f'{card_path}: not a readable card ({e}); write it again or remove it') from e
  missing = [field for field in CARD_FIELDS if field not in card]
  if missing and required:
    raise InputError(f'{card_path}: the card lacks {missing[0]!r}; train the checkpoint again')
  return {} if missing else card


def read_tensors(source: str | os.PathLike) -> Tensors:
  """All tensors of a weights source, by canonical torch name, in the dtypes stored.

  Args:
    source: a built-in name, FILE.npz, FILE.safetensors, a directory that orbax wrote from Flax
      variables, or hf://owner/name[/FILE] (FILE defaults to model.safetensors).

  Raises:
    InputError: missing, empty, truncated or of another format; differs from its card's sha256;
      tensors that are no floats; a pickle, which is refused with the command that converts it.
  """
  path = resolve(source)
  if path.is_dir():
    return canonical(to_tensors(weight_files.read_orbax(path)), path)
  if path.stat().st_size == 0:
    raise InputError(f'{path}: the file is empty; get it again')
  expected = read_card(path).get('sha256') or weight_files.hub_sha256(path)
  if expected and weight_files.sha256(path.read_bytes()) != expected:
    raise InputError(f'{path}: the sha256 is not the recorded {expected}; get the file again')
  if path.suffix == '.npz':
    return canonical(weight_files.read_npz(path), path)
  if path.suffix == '.safetensors':
    return canonical(weight_files.read_safetensors(path), path)
  raise InputError(f'{path}: unknown weights format {path.suffix!r}; expected {SOURCES}')


# --- writing --------------------------------------------------------------------------------------


def save_checkpoint(path: str | os.PathLike, variables: PyTree, card: Mapping[str, Any]) -> None:
  """Writes weights (kernels as float16) and, beside them, their card completed by the sha256.

  Raises:
    InputError: the card lacks one of `CARD_FIELDS`, or a kernel is beyond float16.
  """
  path = validate.user_path(path)
  missing = [field for field in CARD_FIELDS if field not in card and field != 'sha256']
  if missing:
    raise InputError(f'the card of {path} lacks {missing[0]!r}; expected {", ".join(CARD_FIELDS)}')
  tensors = to_tensors(variables)
  for name, tensor in tensors.items():
    if not np.abs(tensor).max() < np.finfo(np.float16).max:
      raise InputError(f'{path}: tensor {name!r} is not finite in float16; lower the learning rate')
  half = {k: v.astype(np.float16) if v.ndim > 1 else v for k, v in tensors.items()}
  sha256 = weight_files.write_safetensors(path, half)
  text = json.dumps({**card, 'sha256': sha256}, indent=2) + '\n'
  images.write_atomic(path.with_suffix('.json'), text.encode())


# --- classifiers ----------------------------------------------------------------------------------


def load_classifier(
  name: str = 'scene_resnet',
  weights: str | os.PathLike | None = None,
  *,
  mean: Sequence[float] | None = None,
  std: Sequence[float] | None = None,
  num_classes: int | None = None,
  dtype: Any = None,
) -> Classifier:
  """A zoo net with its weights, ready to be attacked: images f32[B,H,W,3] in [0,1].

  Loading the same net twice gives the same static functions, so nothing is traced anew.

  Args:
    name: a name of `nets.ZOO`.
    weights: see `read_tensors`; None: the built-in weights of that name.
    mean: per channel, of images in [0,1]; default: the card's, else ImageNet's.
    std: as mean.
    num_classes: default: as many as the head's tensor has.
    dtype: of the computation, 'float32' (default) or 'bfloat16'; logits are always float32.

  Raises:
    InputError: unknown name, weights that cannot be read or do not fit, bad mean, std or dtype.
  """
  nets.build(name)  # an unknown name is told before a file is read
  if weights is None:
    if name not in built_in():
      known = ', '.join(built_in()) or 'none'
      raise InputError(
        f'no built-in weights for {name!r} (built in: {known}); give weights: {SOURCES}'
      )
    weights = name
  dtype_name = dtype if isinstance(dtype, str) else jnp.dtype(dtype or jnp.float32).name
  if dtype_name not in ('float32', 'bfloat16'):
    raise InputError(f'dtype is {dtype_name}; expected float32 or bfloat16')
  if num_classes is not None and num_classes < 1:
    raise InputError(f'num_classes is {num_classes}; expected at least 1')
  path = resolve(weights)
  card = read_card(path)
  mean, std = statistics(path, card, mean, std)
  tensors = read_tensors(path)
  defaults = nets.DEFAULTS[name]
  num_classes = num_classes or _num_classes(tensors, defaults.head) or defaults.num_classes
  half = jnp.bfloat16 if dtype_name == 'bfloat16' else None
  module = nets.build(name, num_classes=num_classes, dtype=half)
  variables = load_variables(module, tensors, f'{weights} as {name}')
  return from_linen(module, variables, mean=mean, std=std)


def statistics(
  path: pathlib.Path,
  card: Mapping[str, Any],
  mean: Sequence[float] | None = None,
  std: Sequence[float] | None = None,
) -> tuple[tuple[float, ...], tuple[float, ...]]:
  """Mean and std per channel: those given, else those of the card of `path`, else ImageNet's."""

  def of(name: str, given: Any, usual: Sequence[float]) -> tuple[float, ...]:
    if given is not None:
      return validate.per_channel(name, given, 3, std=name == 'std')
    if (known := card.get(name)) is None:  # blank on the card of a training that was cut short
      return validate.per_channel(name, usual, 3, std=name == 'std')
    what = f'{name} of the card {path.with_suffix(".json")}'
    return validate.per_channel(what, known, 3, std=name == 'std')

  return of('mean', mean, IMAGENET_MEAN), of('std', std, IMAGENET_STD)


# --- saliency nets --------------------------------------------------------------------------------


def digest(source: str | os.PathLike) -> str:
  """A fingerprint of weights, the same for every format that holds the same numbers."""
  found = hashlib.sha256()
  for name, tensor in sorted(read_tensors(source).items()):
    found.update(name.encode())
    found.update(np.ascontiguousarray(tensor, np.float32).tobytes())
  return found.hexdigest()


def load_decoder(
  source: str | os.PathLike,
  black_box: str | None = None,
  weights: str | os.PathLike | None = None,
  *,
  dtype: Any = jnp.float32,
) -> Decoder:
  """The saliency net of RTS, encoder included, as `experiments.train --task rts` writes it.

  Args:
    source: see `read_tensors`; its card tells encoder, widths and classes.
    black_box: name of the net that is to be explained; None: not checked.
    weights: of the black box; None: not checked.
    dtype: of the computation.

  Raises:
    InputError: no weights, no card of a decoder beside them, one that was trained for another
      `black_box` or with other `weights`, or tensors that do not fit.
  """
  path = resolve(source)
  card = read_card(path)
  missing = [field for field in DECODER_FIELDS if field not in card]
  if missing:
    raise InputError(
      f'{path}: no card of a saliency decoder beside it ({path.with_suffix(".json").name} with '
      f'{missing[0]!r}); train one: python -m experiments.train --task rts'
    )
  known, num_classes = card['classes'], card['num_classes']
  if known is not None and not (
    len(known) > 1 and sorted({*known}) == known and known[0] >= 0 and known[-1] < num_classes
  ):
    raise InputError(
      f'the card of {path} has the classes {known}; expected two or more of 0…{num_classes - 1}, '
      'rising, as python -m experiments.train --task rts writes them'
    )
  if black_box not in (None, card['black_box']):
    raise InputError(
      f'the decoder {source} was trained to explain {card["black_box"]}, not {black_box}; give '
      'the one of this model, or train it: python -m experiments.train --task rts'
    )
  trained_on = card.get('black_box_digest')
  if weights is not None and trained_on not in (None, digest(weights)):
    raise InputError(
      f'the decoder {source} was trained to explain {card["black_box"]} with other weights than '
      f'{weights}; give these, or train one: python -m experiments.train --task rts'
    )
  module, apply_fn = _empty_decoder(
    card['encoder'],
    num_classes,
    tuple(card['widths']),
    card['confidence'],
    *statistics(path, card),
    jnp.dtype(dtype).name,
  )
  shapes = saliency_unet.variable_shapes(module)
  variables = from_tensors(shapes, read_tensors(path), f'{source} as a saliency net')
  return Decoder(variables, apply_fn, num_classes, None if known is None else tuple(known))


@functools.cache
def _empty_decoder(
  encoder: str,
  num_classes: int,
  widths: tuple[int, ...],
  confidence: float,
  mean: tuple[float, ...],
  std: tuple[float, ...],
  dtype: str,
) -> tuple[saliency_unet.SaliencyUnet, Any]:
  """Memoised because its functions are static: new ones would trace everything anew."""
  module = saliency_unet.build(
    encoder, num_classes, widths, confidence, jnp.bfloat16 if dtype == 'bfloat16' else None
  )

  def apply_fn(variables: PyTree, x: Image, y: Label) -> Any:
    return module.apply(variables, images.normalised(x, mean, std), y)

  return module, apply_fn
