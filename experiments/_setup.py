"""What a run works on: classifier, interpreters, examples with their targets, in batches."""

import functools
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from adv2_jax import api, data, images, interpreters, metrics, nets, validate
from adv2_jax.attacks import goals
from adv2_jax.classifier import Classifier
from adv2_jax.data.base import UNDECODABLE
from adv2_jax.interpreters.base import Interpreter
from adv2_jax.types import Array, Batch, InputError, Key, Map
from adv2_jax.weights import zoo
from experiments import _flags, _targets
from experiments._first_look import FirstLook


class Setup(NamedTuple):
  """What the flags stand for."""

  config: dict[str, Any]
  clf: Classifier
  interpreters: dict[str, Interpreter]
  joint: Interpreter | None  # of all of them at once
  dataset: data.Dataset
  target_of: Callable[[int, int, Any], int]  # (id, label, logits) -> target class


class Examples(NamedTuple):
  """The examples to attack, [N]."""

  id: np.ndarray
  label: np.ndarray
  target: np.ndarray
  other: np.ndarray  # id of another image of the same predicted class; −1 where none was met
  donor: np.ndarray  # id of a correctly classified image of the target class; −1 unless asked for
  num_skipped: int
  num_seen: int  # images gone through; without damaged ones
  num_correct: int | None  # of these; None where labels are predictions
  omitted: Mapping[str, tuple[str, ...]]  # what of the data is not in use; see `Dataset`


class Shard(NamedTuple):
  """One batch on the device, filled up with padding rows, and what its images are judged with."""

  id: np.ndarray
  other: np.ndarray
  donor: np.ndarray
  is_real: np.ndarray
  batch: Batch  # without a target map: that depends on the interpreter
  label: Array
  keys: Key
  keys_again: Key
  mask: np.ndarray | None


def image_size(config: Mapping[str, Any]) -> int:
  """The side in pixels: the flag, or what the model was designed for."""
  return config['image_size'] or nets.DEFAULTS[config['model']].image_size


def set_precision(dtype: str) -> None:
  """Makes float32 products exact on GPUs too, which else round their factors to TF32."""
  jax.config.update('jax_default_matmul_precision', 'highest' if dtype == 'float32' else None)


def models(config: Mapping[str, Any]) -> tuple[Classifier, dict[str, Interpreter]]:
  """The classifier and the interpreters of a config; without the joint of them."""
  set_precision(config['dtype'])
  clf = zoo.load_classifier(
    config['model'],
    config['weights'],
    mean=_flags.floats(config['mean'], 'mean'),
    std=_flags.floats(config['std'], 'std'),
    dtype=config['dtype'],
  )
  size = image_size(config)
  form = 'printed' if config.get('preset') == 'authors' else 'smooth'
  decoder = load_decoder(config) if 'rts' in config['interpreters'] else None
  names = _flags.parts(config['interpreters'])
  return clf, {name: interpreters.build(name, size, form, decoder) for name in names}


def load_decoder(config: Mapping[str, Any]) -> interpreters.Decoder:
  """RTS's, from the flag, or the built-in one that was trained for the model."""
  model = config['model']
  source = config['decoder'] or zoo.built_in_decoder(model, config['weights'])
  if source is None:
    weights = config['weights'] or 'its weights'
    raise InputError(
      f'--interpreters rts: no built-in decoder for {model} with {weights}; give --decoder '
      f'FILE.safetensors, from python -m experiments.train --task rts --model {model}'
    )
  weights = config['weights'] or model
  return zoo.load_decoder(source, model, weights, dtype=config['dtype'])


def load(config: dict[str, Any]) -> Setup:
  """Classifier, interpreters and data of a config; InputError before any work is done."""
  size = image_size(config)
  clf, built = models(config)
  dataset = data.load(
    config['dataset'],
    config['data_path'],
    image_size=size,
    split=config['split'],
    label_key=config['label_key'],
    masks=config['masks'],
    skip_corrupt=config['skip_corrupt'],
    is_labelled=config['labels'] == 'given',
  )
  if dataset.omitted:
    print(data.omissions(dataset.omitted), file=sys.stderr)
  shape = jax.eval_shape(clf, jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)).logits.shape
  card = zoo.read_card(zoo.resolve(config['weights'] or config['model']))
  dataset = dataset.numbered_for(shape[-1], card.get('class_names'))
  check_fit(clf, built, size)
  known = next((v.classes for v in built.values() if v.classes is not None), None)  # RTS's
  if (chosen := _flags.target_classes(config.get('target_classes'), shape[-1])) is not None:
    if known is not None and not set(chosen) <= set(known):
      raise InputError(
        f'--target_classes {",".join(map(str, chosen))} has some that rts never saw in its '
        f'training; it knows {", ".join(map(str, known))}'
      )
    known = chosen
  goal = _targets.goal_of(config)
  if goal.holds:
    target_of = lambda i, label, logits: label  # noqa: E731
  else:
    target_of = _targets.labels(config['target_label'], config['seed'], dataset, shape[-1], known)
  if goal.untargeted:
    for interpreter in built.values():
      what = '--target_label untargeted: the class predicted'
      validate.explicable(np.arange(shape[-1]), interpreter, what)
  # Copied to all devices here, once; else with every batch. A dict as a whole would be sorted.
  place = functools.partial(jax.device_put, device=NamedSharding(mesh_of(config), P()))
  built = {name: place(interpreter) for name, interpreter in built.items()}
  joint = interpreters.joint(built) if 'joint' in config['interpreters'] else None
  return Setup(config, place(clf), built, joint, dataset, target_of)


def check_fit(clf: Classifier, built: Mapping[str, Interpreter], size: int) -> None:
  """InputError where an interpreter does not fit this model or images of this size."""
  x = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
  one = jax.ShapeDtypeStruct((1,), jnp.int32)
  for interpreter in built.values():
    jax.eval_shape(interpreter.explain, clf, x, one, jax.random.key(0))


def devices_of(config: dict[str, Any]) -> list[jax.Device]:
  """The local devices that share a batch."""
  return jax.local_devices()[: config['num_devices']]


def mesh_of(config: dict[str, Any]) -> jax.sharding.Mesh:
  """These devices in a row, along which the batch is cut."""
  devices = devices_of(config)
  auto = (jax.sharding.AxisType.Auto,)
  return jax.make_mesh((len(devices),), ('data',), axis_types=auto, devices=devices)


@jax.jit
def _predict(clf: Classifier, x: Array) -> Array:
  return clf(x).logits.astype(jnp.float32)


def predictions(setup: Setup, ids: np.ndarray) -> Iterator[tuple[int, np.ndarray | None]]:
  """(id, logits f32[K]) one after the other, computed in batches.

  A damaged image has None for logits, or raises InputError without --skip_corrupt.
  """
  size = setup.config['batch_size']
  for start in range(0, len(ids), size):
    some = ids[start : start + size]
    damaged = setup.dataset.check(some).damaged  # only small sets were checked as a whole
    sound = [i for i in some.tolist() if i not in damaged]
    logits = {}
    if sound:
      x = images.from_uint8(setup.dataset.images(np.resize(sound, size)))
      logits = dict(zip(sound, np.asarray(_predict(setup.clf, x)), strict=False))
    yield from ((i, logits.get(i)) for i in some.tolist())


def order(setup: Setup) -> np.ndarray:
  """The split's ids in the order in which they are gone through: as stored, or shuffled."""
  n = len(setup.dataset)
  ids = np.random.default_rng(0).permutation(n) if setup.config['shuffle'] else np.arange(n)
  return ids[~np.isin(ids, list(setup.dataset.left_out))]


def _readable(setup: Setup, start: int = 0) -> np.ndarray:
  ids = order(setup)[start:]
  return ids[np.isin(ids, setup.dataset.ids)]


def select(setup: Setup, attacked: bool = True) -> Examples:
  """The first N examples, in `order`, that are classified correctly and have a target.

  All other images up to the last one are counted as skipped: misclassified, damaged, or of the very
  class that is the `--target_label`. With `--labels predicted` every image is of the class that it
  is taken for. `attacked`: the targets are to be explained, too.
  """
  c, dataset = setup.config, setup.dataset
  holds = _targets.goal_of(c).holds  # then the target is the true class
  chosen: list[int] = []
  labels: list[int] = []
  targets: list[int] = []
  damaged: list[int] = []
  met: dict[int, list[int]] = {}  # predicted class -> ids
  look = FirstLook()
  place = {int(i): n for n, i in enumerate(order(setup))}
  seen = len(place)
  for i, logits in predictions(setup, _readable(setup)):
    if logits is None:
      damaged.append(i)
      continue
    best = int(logits.argmax())
    label = int(dataset.labels[i]) if dataset.is_labelled else best
    met.setdefault(best, []).append(i)
    look.add(logits, label)
    if best == label and ((target := setup.target_of(i, label, logits)) != label or holds):
      chosen.append(i)
      labels.append(label)
      targets.append(target)
    if len(chosen) == c['skip_examples'] + c['num_examples']:
      seen = place[i] + 1
      break
  if damaged:
    told = {UNDECODABLE: dataset.without(damaged).omitted[UNDECODABLE]}
    print(data.omissions(told), file=sys.stderr)
  if wrong := look.shifted():
    raise InputError(f'{look.told()}, {wrong}')
  if len(chosen) <= c['skip_examples']:
    raise InputError(
      f'{look.told()}, {len(chosen)} of them with another class as target, none beyond '
      f'--skip_examples {c["skip_examples"]}: check --weights, --mean, --std and --label_key'
    )
  if doubt := look.doubt():
    print(doubt, file=sys.stderr)
  some = slice(c['skip_examples'], None)
  chosen, labels, targets = chosen[some], labels[some], targets[some]
  classes = sorted(set(labels))
  if len(classes) == 1 and len(chosen) > 4 and not c['shuffle']:
    print(
      f'all {len(chosen)} examples are of class {classes[0]}: if the data set is sorted by class, '
      '--shuffle takes them from all over it',
      file=sys.stderr,
    )
  for label in classes:
    if len(met[label]) == 1 and (other := _first(setup, label, seen)) >= 0:
      met[label].append(other)
  for interpreter in setup.interpreters.values():
    validate.explicable(labels, interpreter, 'label', chosen)
    if attacked:
      validate.explicable(targets, interpreter, 'target (see --target_label)', chosen)
  others = [_next(met[label], i) for i, label in zip(chosen, labels, strict=True)]
  donors = [-1] * len(chosen)
  if c['target_map'] == 'random_class':
    if holds:
      donors = others
      if -1 in others:
        raise InputError(
          f'--target_map random_class: example {chosen[others.index(-1)]} is the only one taken '
          f'for class {labels[others.index(-1)]}; take --target_map random_patch or away'
        )
    else:
      of_class = {target: _donor(setup, target) for target in sorted(set(targets))}
      donors = [of_class[target] for target in targets]
  ints = functools.partial(np.array, dtype=np.int32)
  return Examples(
    ints(chosen),
    ints(labels),
    ints(targets),
    ints(others),
    ints(donors),
    num_skipped=seen - c['skip_examples'] - len(chosen),
    num_seen=look.n,
    num_correct=look.right() if dataset.is_labelled else None,
    omitted=dataset.without(damaged).omitted,
  )


def _next(ids: list[int], i: int) -> int:
  """The id after i, cyclically; −1 when there is no other."""
  return ids[(ids.index(i) + 1) % len(ids)] if len(ids) > 1 else -1


def _first(setup: Setup, label: int, start: int = 0) -> int:
  """The first id, from that place in `order` on, of this class and taken for it; −1 if none is."""
  ids = _readable(setup, start)
  if setup.dataset.is_labelled:
    ids = ids[setup.dataset.labels[ids] == label]
  found = ((i, logits) for i, logits in predictions(setup, ids) if logits is not None)
  return next((i for i, logits in found if logits.argmax() == label), -1)


def _donor(setup: Setup, target: int) -> int:
  donor = _first(setup, target)
  if donor < 0:
    raise InputError(
      f'--target_map random_class: no correctly classified image of class {target} in the data '
      'set; choose other targets with --target_label, or --target_map random_patch'
    )
  return donor


def shards(setup: Setup, examples: Examples, rows: np.ndarray) -> Iterator[Shard]:
  """These rows of the examples in batches of equal shape; the last is filled by padding rows."""
  config, mesh = setup.config, mesh_of(setup.config)
  per_device = min(config['batch_size'], -(-len(examples.id) // mesh.size))
  size = per_device * mesh.size
  place = functools.partial(jax.device_put, device=NamedSharding(mesh, P('data')))
  for start in range(0, len(rows), size):
    some = rows[start : start + size]
    padded = np.resize(some, size)
    is_real = np.arange(size) < len(some)
    ids = examples.id[padded]
    x = images.from_uint8(setup.dataset.images(ids))
    batch = Batch(place(ids), place(x), place(examples.target[padded]), None, place(is_real))
    yield Shard(
      ids,
      examples.other[padded],
      examples.donor[padded],
      is_real,
      batch,
      place(examples.label[padded]),
      place(metrics.judge_keys(config['seed'], ids)),
      place(metrics.judge_keys(config['seed'], ids, again=True)),
      _masks(setup.dataset, ids, x.shape[1:3]),
    )


def _masks(dataset: data.Dataset, ids: np.ndarray, shape: tuple[int, ...]) -> np.ndarray | None:
  """bool[B,H,W], empty where an example has none; None when no example of the set has any."""
  if dataset.mask_of is None:
    return None
  masks = [dataset.mask(i) for i in ids]
  return np.stack([np.zeros(shape, bool) if m is None else m for m in masks])


def target_map(setup: Setup, shard: Shard, name: str, clean: Array, given: dict) -> Map:
  """The map that the attack on interpreter `name` wants, or is to leave, f32[B,h,w].

  `clean`: the clean image's maps, [2,B,h,w], of the true class (the benign one) and of the target.
  """
  kind = setup.config['target_map']
  if kind == 'benign' or kind in goals.AWAY:
    return clean[0]
  if (share := _flags.path_share(kind)) is not None:
    return (1 - share) * clean[0] + share * clean[1]
  if kind == 'random_patch':
    seed, shape = setup.config['seed'], clean.shape[2:]
    return jnp.asarray([_targets.random_patch(seed, int(i), shape) for i in shard.id])
  if kind == 'random_class':
    x = jnp.asarray(images.from_uint8(setup.dataset.images(shard.donor)))
    return api.explain(setup.clf, setup.interpreters[name], x, shard.batch.target, shard.keys)
  return jnp.asarray(np.stack([given[name][int(i)] for i in shard.id]))


def check_given_maps(setup: Setup, examples: Examples, given: dict) -> None:
  """InputError where a map of FILE.npz is missing or does not fit."""
  file, size = setup.config['target_map'], image_size(setup.config)
  x = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
  y = jax.ShapeDtypeStruct((1,), jnp.int32)
  for name, maps in given.items():
    shape = jax.eval_shape(
      setup.interpreters[name].explain, setup.clf, x, y, jax.random.key(0)
    ).shape[1:]
    for i in examples.id.tolist():
      if i not in maps:
        raise InputError(f'{file} has no target map for example {i}; add it to `id` and `{name}`')
      if maps[i].shape != shape:
        raise InputError(f'{file}: maps of {name} are {maps[i].shape}; expected {shape}')
