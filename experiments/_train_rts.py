"""`experiments.train --task rts`: the saliency net of RTS for a classifier of the zoo.

First the class selector learns which classes are present, then the decoder learns masks (and the
encoder, if asked). The black box that the masks explain is --model; so is the encoder, unless
--encoder names another net.
"""

import functools
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.figure import Figure

from adv2_jax import images, metrics, overlay
from adv2_jax.classifier import Classifier
from adv2_jax.data import Dataset
from adv2_jax.nets import saliency_unet
from adv2_jax.training import fit as training
from adv2_jax.training import rts as saliency
from adv2_jax.types import InputError, Key, Map, PyTree
from adv2_jax.weights import zoo
from adv2_jax.workdir import figures
from experiments import _flags

METRICS = ('destroyer', 'preserver', 'area', 'smoothness', 'marked', 'marked_fake')
FIGURES = (  # the progress bar shows the first
  'p_kept',
  'p_removed',
  'marked',
  'marked_fake',
  'correlation',
  'presence_accuracy',
  'p_whole',
)
HELD_OUT = 500  # images at most
SELECTOR_RATE = 0.02
_BATCH = 25
_SHOWN = 8
_judge = jax.jit(saliency.judge, static_argnums=0, static_argnames=('mean', 'std'))


class Net(NamedTuple):
  """A saliency net in training.

  Attributes:
    module: encoder, selector and decoder.
    clf: the black box.
    variables: of the module, and the parameters of the black box.
    mean: of the encoder's input.
    std: of the encoder's input.
    classes: those that occur in the training data; None: all of the classifier's.
    digest: of the black box's weights, see `zoo.digest`.
  """

  module: saliency_unet.SaliencyUnet
  clf: Classifier
  variables: PyTree
  mean: tuple[float, ...]
  std: tuple[float, ...]
  classes: tuple[int, ...] | None
  digest: str


def check(c: Mapping[str, Any]) -> None:
  """InputError for flags that are wrong whatever the data."""
  if not 0 <= c['fake'] < 1:
    raise InputError(f'--fake is {c["fake"]}; expected 0 or more, and less than 1')
  if not math.isfinite(c['confidence']):
    raise InputError(f'--confidence is {c["confidence"]}; expected a number')
  _flags.loss_weights(c['loss_weights'])
  _flags.widths(c['widths'])


def black_box(c: Mapping[str, Any]) -> Classifier:
  """The classifier to explain, as `experiments.attack` would load it."""
  mean, std = (_flags.floats(c[name], name) for name in ('mean', 'std'))
  return zoo.load_classifier(c['model'], c['weights'], mean=mean, std=std)


def correct(c: Mapping[str, Any], image: np.ndarray, label: np.ndarray) -> np.ndarray:
  """bool[N]: which images u8[N,H,W,3] the black box gets right."""
  clf = black_box(c)
  predict = jax.jit(lambda clf, x: clf(x).logits.argmax(-1))
  found = []
  for start in range(0, len(label), _BATCH):
    padded = np.resize(np.arange(start, min(start + _BATCH, len(label))), _BATCH)
    found.append(np.asarray(predict(clf, images.from_uint8(image[padded]))))
  return np.concatenate(found)[: len(label)] == label


def numbered(c: Mapping[str, Any], dataset: Dataset) -> Dataset:
  """The data, its labels those of the black box; InputError where that cannot be."""
  card = zoo.read_card(zoo.resolve(c['weights'] or c['model']))
  return dataset.numbered_for(_num_classes(black_box(c)), card.get('class_names'))


def _num_classes(clf: Classifier) -> int:
  return jax.eval_shape(clf, np.zeros((1, 64, 64, 3), np.float32)).logits.shape[-1]


def encoder_of(c: Mapping[str, Any]) -> tuple[str, str]:
  """The encoder's name, and where its weights are."""
  encoder = c['encoder'] or c['model']
  own = c['weights'] if encoder == c['model'] else None
  return encoder, c['encoder_weights'] or own or encoder


def encoder_input(c: Mapping[str, Any]) -> tuple[tuple[float, ...], tuple[float, ...]]:
  """Mean and std of what the encoder sees: as flags say, as the black box where it is that net."""
  source = encoder_of(c)[1]
  path = zoo.resolve(source)
  is_black_box = source == (c['weights'] or c['model'])

  def of(name: str) -> tuple[float, ...] | None:
    given = _flags.floats(c[f'encoder_{name}'], f'encoder_{name}')
    return given or (_flags.floats(c[name], name) if is_black_box else None)

  return zoo.statistics(path, zoo.read_card(path), of('mean'), of('std'))


def build(c: Mapping[str, Any], shape: tuple[int, ...], labels: np.ndarray, key: Key) -> Net:
  """The net with its encoder's weights; InputError where weights or images do not fit."""
  clf = black_box(c)
  encoder, source = encoder_of(c)
  one = np.zeros((1, *shape), np.float32)
  num_classes = _num_classes(clf)
  if len(np.unique(labels)) < 2:
    raise InputError(
      f'all training images are of class {labels[0]}; expected two classes or more, as the net '
      'learns from classes that are not there: the data may be sorted, raise --num_examples'
    )
  widths = _flags.widths(c['widths'])
  module = saliency_unet.build(encoder, num_classes, widths, c['confidence'])
  tensors = zoo.read_tensors(source)
  read = zoo.load_variables(module.encoder, tensors, f'{source} as the encoder {encoder}')
  fresh = jax.jit(module.init)(key, one, np.zeros(1, np.int32))
  variables = {part: {**fresh[part], 'encoder': read[part]} for part in fresh}
  present = tuple(np.unique(labels).tolist())
  return Net(
    module,
    clf,
    {**variables, 'black_box': clf.params},
    *encoder_input(c),
    None if len(present) == num_classes else present,
    zoo.digest(c['weights'] or c['model']),
  )


def phases(
  c: Mapping[str, Any], net: Net, augment: training.Augment, steps: int, selector_steps: int
) -> list[training.Phase]:
  """Selector, then decoder."""
  common: Any = {'mean': net.mean, 'std': net.std, 'augment': augment, 'classes': net.classes}
  rate = optax.cosine_decay_schedule(SELECTOR_RATE, max(selector_steps, 1))
  selector_tx = optax.adam(rate)
  tx = training.optimiser(c['optimiser'], c['learning_rate'], steps, weight_decay=c['weight_decay'])

  def begin(tx: optax.GradientTransformation, part: Any, variables: PyTree) -> training.TrainState:
    return training.TrainState(jnp.int32(0), variables, tx.init(part(variables['params'])))

  embedding = lambda params: params['selector_module']['embedding']  # noqa: E731
  trained = lambda params: saliency.trained(params, c['train_encoder'])  # noqa: E731
  return [
    training.Phase(
      'selector',
      saliency.selector_step(net.module, selector_tx, **common),
      functools.partial(begin, selector_tx, embedding),
      selector_steps,
    ),
    training.Phase(
      'state',
      saliency.rts_step(
        net.module,
        net.clf,
        tx,
        fake=c['fake'],
        weights=_flags.loss_weights(c['loss_weights']),
        train_encoder=c['train_encoder'],
        **common,
      ),
      functools.partial(begin, tx, trained),
      steps,
    ),
  ]


class Judge:
  """What a saliency net is worth on held-out images, and a picture of its maps."""

  def __init__(self, net: Net, image: np.ndarray, label: np.ndarray):
    self.image, self.label = image, label
    known = net.classes or range(net.module.num_classes)
    shift = np.random.default_rng(0).integers(1, len(known), len(self.label))
    self.fake = np.asarray(saliency.another_class(self.label, shift, known))
    self.clf = net.clf
    self.run = functools.partial(_judge, net.module, mean=net.mean, std=net.std)

  def judged(self, variables: PyTree, label: np.ndarray) -> saliency.Judged:
    """The first images, as many as labels, asked for these classes."""
    clf = self.clf.replace(params=variables['black_box'])
    net = {k: v for k, v in variables.items() if k != 'black_box'}
    found: list[Any] = []
    for start in range(0, len(label), _BATCH):
      rows = np.arange(start, min(start + _BATCH, len(label)))
      padded = np.resize(rows, _BATCH)
      x = images.from_uint8(self.image[padded])
      seen = self.run(net, clf, x, label[padded], jax.random.key(start))
      found.append(jax.tree.map(np.asarray, seen))
    return jax.tree.map(lambda *v: np.concatenate(v)[: len(label)], *found)

  def both(self, variables: PyTree) -> tuple[saliency.Judged, saliency.Judged]:
    """All images, asked for the class that they show, and for another."""
    return self.judged(variables, self.label), self.judged(variables, self.fake)

  def __call__(self, variables: PyTree) -> dict[str, float]:
    """Means over the held-out images."""
    return means(*self.both(variables))

  def card(
    self, variables: PyTree, dataset: Dataset, ids: np.ndarray
  ) -> dict[str, dict[str, float]]:
    """Means over the held-out images, and over those of them that the black box gets right.

    The latter are left out where they are fewer than two: `correlation` is between images.
    """
    both = self.both(variables)
    right = both[0].correct
    found = {'held_out': means(*both) | localisation(both[0].map, dataset, ids)}
    if right.sum() > 1:
      found['held_out_correct'] = {'n': int(right.sum())} | means(
        *jax.tree.map(lambda v: v[right], both)
      )
    return found

  def picture(self, variables: PyTree) -> Figure:
    """The first held-out images, their maps, and their maps for a class they do not show."""
    true, fake = (self.judged(variables, y[:_SHOWN]).map for y in (self.label, self.fake))
    x = self.image[: len(true)]
    rows = (('image', x), ('its class', overlay(x, true)), ('another', overlay(x, fake)))
    with figures.style():
      figure = Figure(figsize=(1.4 * len(x), 4.4), layout='constrained')
      for axes, (title, shown) in zip(figure.subplots(3, len(x), squeeze=False), rows, strict=True):
        axes[0].set_ylabel(title)
        for axis, picture in zip(axes, shown, strict=True):
          axis.imshow(picture)
          axis.set(xticks=[], yticks=[])
    return figure


def means(true: saliency.Judged, fake: saliency.Judged) -> dict[str, float]:
  """FIGURES, of images asked for the class that they show, and for another.

  p_kept, p_removed, p_whole: probability of the class shown with the marked part alone, without
  it, and of the whole image; marked, marked_fake: share of the image marked for the class shown,
  for the other; presence_accuracy: how often the selector is right about the two.
  """
  return {
    'p_kept': float(true.p_kept.mean()),
    'p_removed': float(true.p_removed.mean()),
    'marked': float(true.marked.mean()),
    'marked_fake': float(fake.marked.mean()),
    'correlation': metrics.mean_correlation(np.asarray(true.map)),
    'presence_accuracy': float((true.exists.mean() + (~fake.exists).mean()) / 2),
    'p_whole': float(true.p_whole.mean()),
  }


def localisation(maps: Map, dataset: Dataset, ids: np.ndarray) -> dict[str, float]:
  """Pointing game and energy inside the object; {} where the data has no masks."""
  if dataset.mask_of is None:
    return {}
  masks = jnp.asarray(np.stack([np.asarray(dataset.mask(i)) for i in ids]))
  return {
    'pointing_game': float(np.mean(metrics.pointing_game(maps, masks))),
    'energy_inside': float(np.mean(metrics.energy_inside(maps, masks))),
  }
