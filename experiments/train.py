r"""Trains a network: `python -m experiments.train --task classifier --dataset scenes`.

In --workdir: state.msgpack (what --resume continues from), log.csv, and at the end
<model>.safetensors (rts: rts.safetensors) with its card, a .json of that name. The built-in
checkpoint was made by

    python -m experiments.train --task classifier --dataset scenes
    cp runs/train-classifier-scene_resnet/scene_resnet.* checkpoints/

and a CIFAR-10 net is made by

    python -m experiments.train --model cifar_resnet20 --dataset packed \
      --data_path cifar10_train.npz --test_path cifar10_test.npz \
      --batch_size 128 --epochs 20 --learning_rate 0.2 --label_smoothing 0
"""

import csv
import functools
import io
import os
import pathlib
import platform
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tqdm
from matplotlib.figure import Figure

from adv2_jax import data, images, interpreters, metrics, nets, validate
from adv2_jax.classifier import IMAGENET_MEAN, IMAGENET_STD, Classifier
from adv2_jax.training import classifier as classifying
from adv2_jax.training import fit as training
from adv2_jax.types import InputError, Key, PyTree
from adv2_jax.weights import zoo
from adv2_jax.workdir import report, store
from experiments import _digests, _flags, _train_rts

LOG = 'log.csv'
NUM_SCENES = 16000
SAVE_EVERY = 250  # steps


class Arrays(NamedTuple):
  """Examples in memory: image u8[N,H,W,3], label i32[N]."""

  dataset: data.Dataset
  ids: np.ndarray
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
  return Arrays(dataset, ids, image, dataset.labels[ids], f'{description}, {len(ids)} images')


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
    # `load` refuses files and other label arrays, which the scenes do not have.
    test = data.load(name, path or config['test_path'], label_key=config['label_key'], **options)
    train = data.scenes('train', limit or NUM_SCENES, **options)
    return Opened(train, train.ids), Opened(test, test.ids)
  options['label_key'] = config['label_key']
  split = 'train' if name in data.TFDS else None
  train = _load(name, path, split=split, **options)
  if config['test_path'] or split:
    test = _load(name, config['test_path'] or path, **options)
    test = test.numbered_for(train.num_classes, train.class_names)
    return Opened(train, train.ids[:limit]), Opened(test, test.ids)
  of_train, held_out = (train.part(split).ids for split in ('train', 'held_out'))
  return Opened(train, of_train[:limit]), Opened(train, held_out)


def _load(*args: Any, **options: Any) -> data.Dataset:
  """`data.load`; says what of the files was left out."""
  dataset = data.load(*args, **options)
  if dataset.omitted:
    print(data.omissions(dataset.omitted), file=sys.stderr)
  return dataset


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


def pointing_game(clf: Classifier, dataset: data.Dataset, n: int = 500) -> dict[str, float]:
  """Interpreter -> share of maps (of the true class) whose maximum lies on the object.

  Beside them, as `chance`, the share that a random pixel would score.
  """
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


class Task(NamedTuple):
  """What is trained.

  Attributes:
    phases: the trainings, one after the other.
    variables: that the first one starts from; None: fresh ones.
    metrics: names of what a step reports.
    figures: names of what `evaluate` reports.
    evaluate: variables -> figures on the held-out data.
    card: (variables as stored, their file) -> what the task knows of its card.
    picture: variables -> a figure to look at, each epoch.
  """

  phases: Sequence[training.Phase]
  variables: PyTree | None
  metrics: tuple[str, ...]
  figures: tuple[str, ...]
  evaluate: Callable[[PyTree], dict[str, float]]
  card: Callable[[PyTree, pathlib.Path], dict[str, Any]]
  picture: Callable[[PyTree], Figure] | None = None


class Job(NamedTuple):
  """A training, ready to start."""

  config: Mapping[str, Any]
  path: pathlib.Path
  train: Arrays
  test: Arrays
  batch_at: Callable[[int], training.TrainBatch]
  per_epoch: int
  task: Task


def prepare(config: Mapping[str, Any]) -> Job:
  """Refuses whatever is wrong; makes the working directory last."""
  given = {name: value for name, value in config.items() if value is not None}
  for other, its in DEFAULTS.items():
    for name in sorted(its.keys() & given.keys() - DEFAULTS[config['task']].keys()):
      value = ','.join(v) if isinstance(v := given[name], list) else v
      raise InputError(f'--{name} {value}: only --task {other} has it')
  c = {**dict.fromkeys(config), **DEFAULTS[config['task']], **given}
  for name in ('mean', 'std', 'encoder_mean', 'encoder_std'):
    _flags.floats(c[name], name)
  training.optimiser(c['optimiser'], c['learning_rate'], steps=1)  # refuses what it cannot build
  if c['task'] == 'rts':
    _train_rts.check(c)
  for name in (c['model'], c['encoder'] or c['model']):
    nets.build(name)  # Wrong names are told before anything is decoded.
  for source in filter(None, (c['weights'], c['encoder_weights'])):
    zoo.read_tensors(source)
  path = validate.user_path(c['workdir'] or f'runs/train-{c["task"]}-{c["model"]}')
  store.check_workdir(path, c, c['resume'])
  to_train, held_out = open_data(c)
  datasets = {'data': to_train.dataset}
  if c['test_path']:
    datasets['test_path'] = held_out.dataset
  digests = _digests.of_inputs(c, **datasets)
  store.check_digests(path, c, digests)
  if c['task'] == 'rts':
    to_train, held_out = (
      v._replace(dataset=_train_rts.numbered(c, v.dataset)) for v in (to_train, held_out)
    )
    some = np.random.default_rng(0).permutation(held_out.ids)  # the set may be sorted by class
    held_out = held_out._replace(ids=some[: _train_rts.HELD_OUT])
  train, test = to_train.decode('train'), held_out.decode('held out')
  if c['only_correct']:
    right = _train_rts.correct(c, train.image, train.label)
    if right.sum() < c['batch_size']:
      raise InputError(
        f'--only_correct leaves {right.sum()} of {len(right)} training images; expected at least '
        f'--batch_size, {c["batch_size"]}: check --weights, --mean, --std and --label_key'
      )
    if lost := sorted(set(train.label.tolist()) - set(train.label[right].tolist())):
      raise InputError(
        f'--only_correct leaves no training image of class {", ".join(map(str, lost))}, which the '
        'decoder would never see: leave it out, or take other --weights'
      )
    train = train._replace(
      ids=train.ids[right],
      image=train.image[right],
      label=train.label[right],
      description=f'{train.description}, {right.sum()} of them classified correctly and used',
    )
  batch_at = training.shuffled(train.image, train.label, c['batch_size'], c['seed'])
  per_epoch = len(train.label) // c['batch_size']
  known = c | {'steps': c['steps'] or c['epochs'] * per_epoch}
  task = TASKS[c['task']](known, train, test, per_epoch)
  made = store.Workdir.create(path, c, c['resume'], digests)  # the flags as given, to be compared
  return Job(known, made.path, train, test, batch_at, per_epoch, task)


def _keys(config: Mapping[str, Any]) -> Key:
  """Of the initial weights, and of the steps."""
  return jax.random.split(jax.random.key(config['seed']))


def _augment(c: Mapping[str, Any]) -> training.Augment:
  return training.mirror_and_relight if c['dataset'] == 'scenes' else training.pad_crop_flip


def classifier_task(c: Mapping[str, Any], train: Arrays, test: Arrays, per_epoch: int) -> Task:
  """A classifier, by cross-entropy."""
  del per_epoch
  mean = _flags.floats(c['mean'], 'mean') or IMAGENET_MEAN
  std = _flags.floats(c['std'], 'std') or IMAGENET_STD
  module = nets.build(c['model'], num_classes=train.dataset.num_classes)
  tx = training.optimiser(
    c['optimiser'], c['learning_rate'], c['steps'], weight_decay=c['weight_decay']
  )
  variables = None
  if c['weights']:
    tensors = zoo.read_tensors(c['weights'])
    variables = zoo.load_variables(module, tensors, c['weights'])
  step = classifying.classifier_step(
    module, tx, mean=mean, std=std, augment=_augment(c), label_smoothing=c['label_smoothing']
  )
  accuracy = classifying.make_evaluate(module, test.image, test.label, mean=mean, std=std)

  def begin(variables: PyTree | None) -> training.TrainState:
    state = classifying.init_state(module, tx, train.image.shape[1:], _keys(c)[0])
    return state if variables is None else state.replace(variables=variables)

  def card(stored: PyTree, weights: pathlib.Path) -> dict[str, Any]:
    known = {
      'num_classes': train.dataset.num_classes,
      'mean': mean,
      'std': std,
      'accuracy': accuracy(stored),
      'class_names': train.dataset.class_names,
    }
    if c['dataset'] == 'scenes':
      known['linear_baseline_accuracy'] = linear_baseline(train, test)
      clf = zoo.load_classifier(c['model'], weights, mean=mean, std=std)
      known['pointing_game'] = pointing_game(clf, test.dataset)
    return known

  phase = training.Phase('state', step, begin, c['steps'])
  evaluate = lambda variables: {'accuracy': accuracy(variables)}  # noqa: E731
  return Task([phase], variables, ('accuracy',), ('accuracy',), evaluate, card)


def rts_task(c: Mapping[str, Any], train: Arrays, test: Arrays, per_epoch: int) -> Task:
  """The saliency net of RTS, by its own losses."""
  net = _train_rts.build(c, train.image.shape[1:], train.label, _keys(c)[0])
  judge = _train_rts.Judge(net, test.image, test.label)
  selector_steps = per_epoch if c['selector_steps'] is None else c['selector_steps']

  def card(stored: PyTree, weights: pathlib.Path) -> dict[str, Any]:
    del weights
    whole = {**stored, 'black_box': net.variables['black_box']}
    found = judge.card(whole, test.dataset, test.ids)
    return {
      'model': 'rts',
      'black_box': c['model'],
      'black_box_digest': net.digest,
      'encoder': c['encoder'] or c['model'],
      'widths': net.module.widths,
      'confidence': net.module.confidence,
      'classes': net.classes,
      'num_classes': net.module.num_classes,
      'mean': net.mean,
      'std': net.std,
      'accuracy': found['held_out']['presence_accuracy'],
      **found,
    }

  return Task(
    _train_rts.phases(c, net, _augment(c), c['steps'], selector_steps),
    net.variables,
    ('accuracy', *_train_rts.METRICS),
    _train_rts.FIGURES,
    judge,
    card,
    judge.picture,
  )


TASKS = {'classifier': classifier_task, 'rts': rts_task}
DEFAULTS: dict[str, dict[str, Any]] = {
  'classifier': {'optimiser': 'sgd', 'learning_rate': 0.1, 'label_smoothing': 0.02},
  'rts': {
    'optimiser': 'adamw',
    'learning_rate': 2e-3,
    'encoder': None,
    'encoder_weights': None,
    'encoder_mean': None,
    'encoder_std': None,
    'train_encoder': False,
    'selector_steps': None,
    'widths': None,
    'confidence': 0.0,
    'fake': 0.3,
    'only_correct': False,
    'loss_weights': None,
  },
}


def fit(job: Job) -> PyTree:
  """Runs the phases, each from its last saved state if there is one; returns the variables."""
  c, task, variables = job.config, job.task, job.task.variables
  columns = ('phase', 'step', 'loss', *task.metrics, 'seconds', 'images_per_second')
  columns = (*columns, *(f'held_out_{name}' for name in task.figures))

  def look(state: training.TrainState) -> dict[str, float]:
    if task.picture:
      name = f'maps-{int(state.step):06d}'
      report.save_figure(job.path, name, task.picture(state.variables))
    return task.evaluate(state.variables)

  for number, phase in enumerate(task.phases):
    state, checkpoint = phase.begin(variables), job.path / f'{phase.name}.msgpack'
    if c['resume'] and checkpoint.exists():
      state = training.load_state(checkpoint, state)
    cut_log(job.path / LOG, columns, phase.name, int(state.step))
    with (job.path / LOG).open('a', newline='', buffering=1) as file:
      writer = csv.DictWriter(file, columns, restval='', lineterminator='\n')
      log = functools.partial(_log, writer, phase.name)
      is_last = phase is task.phases[-1]
      key = jax.random.fold_in(_keys(c)[1], number) if number else _keys(c)[1]
      variables = training.fit(
        phase.step, state, job.batch_at, phase.steps, key,
        checkpoint=checkpoint, save_every=SAVE_EVERY, log=log,
        evaluate=look if is_last else None, evaluate_every=job.per_epoch,
      ).variables  # fmt: skip
  return variables


def cut_log(path: pathlib.Path, columns: Sequence[str], phase: str, step: int) -> None:
  """Leaves of this phase's rows those up to that step, as what followed is done again."""
  rows = csv.DictReader(io.StringIO(path.read_text() if path.exists() else ''))
  text = io.StringIO()
  writer = csv.DictWriter(text, columns, lineterminator='\n')
  writer.writeheader()
  writer.writerows(r for r in rows if r['phase'] != phase or int(r['step']) <= step)
  images.write_atomic(path, text.getvalue().encode())


def _log(writer: csv.DictWriter, phase: str, row: Mapping[str, float]) -> None:
  writer.writerow({'phase': phase, **row})


def write_card(job: Job, variables: PyTree) -> None:
  """Writes the weights and their card; the figures on it are those of the file, read back."""
  c, task = job.config, job.task
  weights = job.path / f'{c["model"] if c["task"] == "classifier" else c["task"]}.safetensors'
  with (job.path / LOG).open(newline='') as file:
    seconds = sum(float(row['seconds'] or 0) for row in csv.DictReader(file))
  arguments = [a for a in sys.argv[1:] if a.lstrip('-') != 'resume']
  # The order in which a reader wants them; the task fills the blanks.
  card: dict[str, Any] = {
    'model': c['model'],
    **dict.fromkeys(['num_classes', 'mean', 'std', 'accuracy']),
    'command': shlex.join(['python', '-m', 'experiments.train', *arguments]),
    'data': {'train': job.train.description, 'held_out': job.test.description},
    'seed': c['seed'],
    'steps': c['steps'],
    'seconds': round(seconds),
    'machine': f'{platform.machine()}, {os.cpu_count()} cores, jax {jax.__version__} on '
    f'{jax.default_backend()}',
  }
  net = {part: variables[part] for part in variables if part != 'black_box'}
  zoo.save_checkpoint(weights, net, card)
  stored = zoo.from_tensors(net, zoo.read_tensors(weights), str(weights))
  card |= task.card(stored, weights)
  zoo.save_checkpoint(weights, net, card)
  print(f'held-out accuracy {card["accuracy"]:.4f}')
  print(weights)


def run(config: Mapping[str, Any]) -> None:
  """The whole command."""
  job = prepare(config)
  with store.writing(job.path):
    write_card(job, fit(job))


if __name__ == '__main__':
  _flags.define_train_flags()
  _flags.start(run)
