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
import dataclasses
import os
import platform
import shlex
import sys
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tqdm
from absl import app, flags

from adv2_jax import checkpoints, data, images, interpreters, metrics, nets, store, training
from adv2_jax.classifier import IMAGENET_MEAN, IMAGENET_STD
from adv2_jax.types import InputError
from experiments import _train_flags

FLAGS = flags.FLAGS
NUM_SCENES = 16000
SAVE_EVERY = 250  # steps


@dataclasses.dataclass(frozen=True)
class Arrays:
  """A data set in memory: image u8[N,H,W,3], label i32[N]."""

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
  return Arrays(image, dataset.labels[ids], f'{description}, {len(ids)} images')


class Opened(NamedTuple):
  """A data set, and which of its examples to use."""

  dataset: data.Dataset
  ids: np.ndarray

  def decode(self, what: str) -> Arrays:
    """All images; raises InputError for a damaged one."""
    seed = ' (seed 0)' if self.dataset.name == 'scenes' else ''
    return in_memory(self.dataset, self.ids, f'{self.dataset.name} {what}{seed}')


def open_data() -> tuple[Opened, Opened]:
  """Training and held-out data, opened and checked but not decoded."""
  name, limit = FLAGS.dataset, FLAGS.num_examples
  if name == 'scenes':
    train = data.scenes('train', limit or NUM_SCENES, image_size=FLAGS.image_size)
    test = data.scenes('test', image_size=FLAGS.image_size)
    return Opened(train, train.ids), Opened(test, test.ids)
  options = {'image_size': FLAGS.image_size, 'label_key': FLAGS.label_key}
  split = 'train' if name in data.TFDS else None
  train = data.load(name, FLAGS.data_path, split=split, **options)
  if FLAGS.test_path or split:
    test = data.load(name, FLAGS.test_path or FLAGS.data_path, **options)
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


def pointing_game(weights: str, dataset: data.Dataset, n: int = 500) -> dict[str, float]:
  """Interpreter -> share of maps (of the true class) whose maximum lies on the object.

  Beside them, as `chance`, the share that a random pixel would score.
  """
  clf = checkpoints.load_classifier(FLAGS.model, weights)
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


def normalisation(text: list[str] | None, default: tuple[float, ...]) -> tuple[float, ...]:
  """Three numbers of a flag, or the default."""
  try:
    values = tuple(float(v) for v in text) if text else default
  except ValueError:
    values = ()
  if len(values) != 3:
    raise InputError(f'--mean or --std is {text}: expected three numbers, such as 0.5,0.5,0.5')
  return values


def train_classifier() -> None:
  """Trains, evaluates on held-out images and writes weights and card."""
  mean, std = normalisation(FLAGS.mean, IMAGENET_MEAN), normalisation(FLAGS.std, IMAGENET_STD)
  module = nets.build(FLAGS.model)  # An unknown name is told before anything is decoded.
  train_data, test_data = open_data()
  config = {flag.name: flag.value for flag in _train_flags.all_flags()}
  # batch_size is free for attacks, whose results do not depend on it; for training it counts.
  config['images_per_step'] = FLAGS.batch_size
  workdir = store.Workdir.create(
    FLAGS.workdir or f'runs/train-{FLAGS.task}-{FLAGS.model}', config, FLAGS.resume
  ).path
  train, test = train_data.decode('train'), test_data.decode('held out')
  dataset = train_data.dataset
  module = nets.build(FLAGS.model, num_classes=dataset.num_classes)

  batch_at = training.shuffled(train.image, train.label, FLAGS.batch_size, FLAGS.seed)
  per_epoch = len(train.label) // FLAGS.batch_size
  steps = FLAGS.steps or FLAGS.epochs * per_epoch
  tx = training.optimiser(
    FLAGS.optimiser, FLAGS.learning_rate, steps, weight_decay=FLAGS.weight_decay
  )
  init_key, step_key = jax.random.split(jax.random.key(FLAGS.seed))
  state = training.init_state(module, tx, train.image.shape[1:], init_key)
  if FLAGS.weights:
    tensors = checkpoints.read_tensors(FLAGS.weights)
    state = state.replace(variables=checkpoints.load_variables(module, tensors, FLAGS.weights))
  checkpoint = workdir / 'state.msgpack'
  if FLAGS.resume and checkpoint.exists():
    state = training.load_state(checkpoint, state)
  augment = training.mirror_and_relight if FLAGS.dataset == 'scenes' else training.pad_crop_flip
  step = training.classifier_step(
    module, tx, mean=mean, std=std, augment=augment, label_smoothing=FLAGS.label_smoothing
  )
  evaluate = training.make_evaluate(module, test.image, test.label, mean=mean, std=std)
  columns = ('step', 'loss', 'accuracy', 'seconds', 'images_per_second', 'held_out_accuracy')
  log_path = workdir / 'log.csv'
  with log_path.open('a', newline='', buffering=1) as file:
    writer = csv.DictWriter(file, columns, restval='')
    if not file.tell():
      writer.writeheader()
    state = training.fit(
      step, state, batch_at, steps, step_key, checkpoint=checkpoint, save_every=SAVE_EVERY,
      evaluate=evaluate, evaluate_every=per_epoch, log=writer.writerow,
    )  # fmt: skip

  with log_path.open(newline='') as file:
    seconds = sum(float(row['seconds'] or 0) for row in csv.DictReader(file))
  arguments = [a for a in sys.argv[1:] if a.lstrip('-') != 'resume']
  # The accuracy on the card is that of the file: written, read back and evaluated.
  weights = workdir / f'{FLAGS.model}.safetensors'
  card: dict[str, Any] = {
    'model': FLAGS.model,
    'num_classes': dataset.num_classes,
    'mean': mean,
    'std': std,
    'accuracy': None,
    'command': shlex.join(['python', '-m', 'experiments.train', *arguments]),
    'data': {'train': train.description, 'held_out': test.description},
    'class_names': dataset.class_names,
    'seed': FLAGS.seed,
    'steps': steps,
    'seconds': round(seconds),
    'machine': f'{platform.machine()}, {os.cpu_count()} cores, jax {jax.__version__} on '
    f'{jax.default_backend()}',
  }
  checkpoints.save_checkpoint(weights, state.variables, card)
  stored = checkpoints.load_variables(module, checkpoints.read_tensors(weights), str(weights))
  card['accuracy'], full = evaluate(stored), evaluate(state.variables)
  if FLAGS.dataset == 'scenes':
    card['linear_baseline_accuracy'] = linear_baseline(train, test)
    card['pointing_game'] = pointing_game(str(weights), test_data.dataset)
  checkpoints.save_checkpoint(weights, state.variables, card)
  print(f'held-out accuracy {card["accuracy"]:.4f} (before rounding the weights {full:.4f})')
  print(weights)


def main(argv: list[str]) -> None:
  """Runs the task; bad input ends with one line on stderr."""
  if len(argv) > 1:
    raise app.UsageError(f'unexpected argument {argv[1]!r}')
  try:
    {'classifier': train_classifier}[FLAGS.task]()
  except InputError as error:
    sys.exit(str(error))


if __name__ == '__main__':
  _train_flags.define_train_flags()
  app.run(main)
