r"""Trains a network: `python -m experiments.train --task classifier --dataset scenes`.

In --workdir: state.msgpack (what --resume continues from), log.csv, and at the end
<model>.safetensors with its card <model>.json. The built-in checkpoint was made by

    python -m experiments.train --task classifier --dataset scenes
    cp runs/train-classifier-scene_resnet/scene_resnet.* checkpoints/

and a CIFAR-10 net is made by

    python -m experiments.train --model cifar_resnet20 --dataset packed \
      --data_path cifar10_train.npz --test_path cifar10_test.npz \
      --batch_size 128 --epochs 20 --learning_rate 0.2 --label_smoothing 0
"""

import csv
import os
import pathlib
import platform
import shlex
import sys
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import tqdm

from adv2_jax import checkpoints, data, images, interpreters, metrics, nets, store, training
from adv2_jax.classifier import IMAGENET_MEAN, IMAGENET_STD
from adv2_jax.types import InputError, Key, PyTree
from experiments import _flags

LOG = 'log.csv'
NUM_SCENES = 16000
SAVE_EVERY = 250  # steps


class Arrays(NamedTuple):
  """Examples in memory: image u8[N,H,W,3], label i32[N]."""

  dataset: data.Dataset
  image: np.ndarray
  label: np.ndarray
  description: str


def in_memory(dataset: data.Dataset, ids: np.ndarray, description: str) -> Arrays:
  """Decodes the examples `ids`; raises InputError for a damaged one or unequal sizes."""
  first = dataset.image(ids[0])
  image = np.empty((len(ids), *first.shape), np.uint8)
  for row, i in enumerate(tqdm.tqdm(ids, desc=description, unit='image', mininterval=1)):
    one = dataset.image(i)
    if one.shape != first.shape:
      raise InputError(f'image {dataset.describe(i)} is {one.shape}, not {first.shape}: '
                       'give --image_size')  # fmt: skip
    image[row] = one
  return Arrays(dataset, image, dataset.labels[ids], f'{description}, {len(ids)} images')


class Opened(NamedTuple):
  """A data set, and which of its examples to use."""

  dataset: data.Dataset
  ids: np.ndarray

  def decode(self, what: str) -> Arrays:
    """All images; raises InputError for a damaged one."""
    seed = ' (seed 0)' if self.dataset.name == 'scenes' else ''
    return in_memory(self.dataset, self.ids, f'{self.dataset.name} {what}{seed}')


def open_data(config: Mapping[str, Any]) -> tuple[Opened, Opened]:
  """Training and held-out data, opened and checked but not decoded."""
  name, limit, path = config['dataset'], config['num_examples'], config['data_path']
  options = {'image_size': config['image_size']}
  if name == 'scenes':
    train = data.scenes('train', limit or NUM_SCENES, **options)
    test = data.scenes('test', **options)
    return Opened(train, train.ids), Opened(test, test.ids)
  options['label_key'] = config['label_key']
  split = 'train' if name in data.TFDS else None
  train = data.load(name, path, split=split, **options)
  if config['test_path'] or split:
    test = data.load(name, config['test_path'] or path, **options)
    test.check_classes(train.num_classes)
    return Opened(train, train.ids[:limit]), Opened(test, test.ids)
  ids = train.ids[:limit]
  held_out = np.random.default_rng(0).permutation(len(ids)) < max(1, len(ids) // 10)
  return Opened(train, ids[~held_out]), Opened(train, ids[held_out])


def linear_baseline(train: Arrays, test: Arrays) -> float | None:
  """Accuracy of logistic regression on 16×16 pixels and colour histograms; None without sklearn.

  Far below the network's when colour and brightness do not give the classes away.
  """
  try:
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler
  except ImportError:
    return None
  features = [pixels_and_histogram(split.image) for split in (train, test)]
  scaler = StandardScaler().fit(features[0])
  model = LogisticRegression(C=1e-2, max_iter=300)
  model.fit(scaler.transform(features[0]), train.label)
  return float(model.score(scaler.transform(features[1]), test.label))


def pixels_and_histogram(image: np.ndarray, cells: int = 16, bins: int = 16) -> np.ndarray:
  """f32[N,F]: means of cells×cells blocks, and each channel's histogram and mean."""
  n, height, width, channels = image.shape
  cut = image[:, : height // cells * cells, : width // cells * cells].astype(np.float32) / 255
  blocks = cut.reshape(n, cells, height // cells, cells, width // cells, channels).mean((2, 4))
  counts = [
    np.stack([np.bincount(c.ravel(), minlength=bins) for c in np.moveaxis(one, -1, 0)])
    for one in image // (256 // bins)
  ]
  histogram = np.array(counts, np.float32) / (height * width)
  mean = blocks.mean((1, 2))
  return np.concatenate([blocks.reshape(n, -1), histogram.reshape(n, -1), mean], axis=1)


def pointing_game(
  model: str, weights: str, dataset: data.Dataset, n: int = 500
) -> dict[str, float]:
  """Interpreter -> share of maps (of the true class) whose maximum lies on the object.

  Beside them, as `chance`, the share that a random pixel would score.
  """
  clf = checkpoints.load_classifier(model, weights)
  masks = np.stack([np.asarray(dataset.mask(i)) for i in range(n)])
  batches = [np.arange(start, start + 50) for start in range(0, n, 50)]
  scores = {'chance': float(masks.mean())}
  for name in interpreters.FACTORIES:
    interpreter = interpreters.build(name, masks.shape[1])
    explain = jax.jit(interpreter.explain)
    hits = []
    for ids in batches:
      x, keys = images.from_uint8(dataset.images(ids)), metrics.judge_keys(0, ids)
      maps = explain(clf, x, dataset.labels[ids], keys)
      hits.append(metrics.pointing_game(maps, jnp.asarray(masks[ids])))
    scores[name] = float(np.mean(hits))
  return scores


class Job(NamedTuple):
  """A training, ready to start."""

  config: Mapping[str, Any]
  path: pathlib.Path
  train: Arrays
  test: Arrays
  module: nn.Module
  mean: tuple[float, ...]
  std: tuple[float, ...]
  tx: optax.GradientTransformation
  state: training.TrainState
  batch_at: Callable[[int], training.TrainBatch]
  per_epoch: int
  steps: int
  evaluate: Callable[[PyTree], float]  # variables -> accuracy on the held-out images


def prepare(config: Mapping[str, Any]) -> Job:
  """Refuses whatever is wrong; makes the working directory last."""
  c = config
  mean = _flags.floats(c['mean'], 'mean') or IMAGENET_MEAN
  std = _flags.floats(c['std'], 'std') or IMAGENET_STD
  nets.build(c['model'])  # Wrong names are told before anything is decoded.
  tensors = checkpoints.read_tensors(c['weights']) if c['weights'] else None
  path = c['workdir'] or f'runs/train-{c["task"]}-{c["model"]}'
  store.check_workdir(path, c, c['resume'])
  opened = open_data(c)
  train, test = opened[0].decode('train'), opened[1].decode('held out')
  module = nets.build(c['model'], num_classes=train.dataset.num_classes)
  batch_at = training.shuffled(train.image, train.label, c['batch_size'], c['seed'])
  per_epoch = len(train.label) // c['batch_size']
  steps = c['steps'] or c['epochs'] * per_epoch
  tx = training.optimiser(c['optimiser'], c['learning_rate'], steps, weight_decay=c['weight_decay'])
  state = training.init_state(module, tx, train.image.shape[1:], _keys(c)[0])
  if tensors:
    state = state.replace(variables=checkpoints.load_variables(module, tensors, c['weights']))
  evaluate = training.make_evaluate(module, test.image, test.label, mean=mean, std=std)
  made = store.Workdir.create(path, c, c['resume']).path
  return Job(
    c, made, train, test, module, mean, std, tx, state, batch_at, per_epoch, steps, evaluate
  )


def _keys(config: Mapping[str, Any]) -> Key:
  """Of the initial weights, and of the steps."""
  return jax.random.split(jax.random.key(config['seed']))


def fit(job: Job) -> PyTree:
  """Trains, from the last saved state if there is one; returns the variables."""
  c, state, checkpoint = job.config, job.state, job.path / 'state.msgpack'
  if c['resume'] and checkpoint.exists():
    state = training.load_state(checkpoint, state)
  augment = training.mirror_and_relight if c['dataset'] == 'scenes' else training.pad_crop_flip
  step = training.classifier_step(
    job.module,
    job.tx,
    mean=job.mean,
    std=job.std,
    augment=augment,
    label_smoothing=c['label_smoothing'],
  )
  columns = ('step', 'loss', 'accuracy', 'seconds', 'images_per_second', 'held_out_accuracy')
  with (job.path / LOG).open('a', newline='', buffering=1) as file:
    writer = csv.DictWriter(file, columns, restval='')
    if not file.tell():
      writer.writeheader()
    return training.fit(
      step, state, job.batch_at, job.steps, _keys(c)[1], checkpoint=checkpoint,
      save_every=SAVE_EVERY, evaluate=job.evaluate, evaluate_every=job.per_epoch,
      log=writer.writerow,
    ).variables  # fmt: skip


def write_card(job: Job, variables: PyTree) -> None:
  """Writes the weights and their card; the accuracy on it is that of the file, read back."""
  c, weights = job.config, job.path / f'{job.config["model"]}.safetensors'
  with (job.path / LOG).open(newline='') as file:
    seconds = sum(float(row['seconds'] or 0) for row in csv.DictReader(file))
  arguments = [a for a in sys.argv[1:] if a.lstrip('-') != 'resume']
  card: dict[str, Any] = {
    'model': c['model'],
    'num_classes': job.train.dataset.num_classes,
    'mean': job.mean,
    'std': job.std,
    'accuracy': None,
    'command': shlex.join(['python', '-m', 'experiments.train', *arguments]),
    'data': {'train': job.train.description, 'held_out': job.test.description},
    'class_names': job.train.dataset.class_names,
    'seed': c['seed'],
    'steps': job.steps,
    'seconds': round(seconds),
    'machine': f'{platform.machine()}, {os.cpu_count()} cores, jax {jax.__version__} on '
    f'{jax.default_backend()}',
  }
  checkpoints.save_checkpoint(weights, variables, card)
  stored = checkpoints.load_variables(job.module, checkpoints.read_tensors(weights), str(weights))
  card['accuracy'], full = job.evaluate(stored), job.evaluate(variables)
  if c['dataset'] == 'scenes':
    card['linear_baseline_accuracy'] = linear_baseline(job.train, job.test)
    card['pointing_game'] = pointing_game(c['model'], str(weights), job.test.dataset)
  checkpoints.save_checkpoint(weights, variables, card)
  print(f'held-out accuracy {card["accuracy"]:.4f} (before rounding the weights {full:.4f})')
  print(weights)


def train_classifier(config: Mapping[str, Any]) -> None:
  """The whole command."""
  job = prepare(config)
  with store.writing(job.path):
    write_card(job, fit(job))


def main(config: Mapping[str, Any]) -> None:
  """Runs the task."""
  {'classifier': train_classifier}[config['task']](config)


if __name__ == '__main__':
  _flags.define_train_flags()
  _flags.start(main)
