"""What RTS learns from: the losses of Dabkowski & Gal (2017) and the step that minimises them.

A mask [B,h,w] is good when the class is lost without what it marks (destroyer), is kept with it
alone (preserver), and it is small and smooth:

    destroyer + 8·area(power 0.3) + 0.5·smoothness + 0.3·preserver

All losses are per example, [B]; images are f32[B,H,W,3] in [0,1] here, and the published noise
levels, which are in units of [−1,1], are halved.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike

from adv2_jax import images, losses
from adv2_jax.classifier import Classifier
from adv2_jax.nets.saliency_unet import SaliencyUnet
from adv2_jax.training.fit import Augment, Metrics, StepFn, TrainBatch, TrainState, no_augment
from adv2_jax.types import Array, Image, Key, Label, Map, PyTree

# --- losses ---------------------------------------------------------------------------------------


def smoothness(mask: Map, border: float = 0.3) -> Array:
  """½ (Σ dx² + Σ dy² + border · Σ_rim m²), [B]; a corner counts in two rims."""
  dx, dy = mask[:, :, 1:] - mask[:, :, :-1], mask[:, 1:] - mask[:, :-1]
  rim = (mask[:, 0], mask[:, -1], mask[:, :, 0], mask[:, :, -1])
  variation = jnp.sum(dx**2, axis=(1, 2)) + jnp.sum(dy**2, axis=(1, 2))
  return (variation + border * sum(jnp.sum(v**2, axis=1) for v in rim)) / 2


def area(mask: Map, power: float = 0.3) -> Array:
  """Mean of (m + 0.0005)^power, [B]; a power under 1 wants few cells, not faint ones."""
  return jnp.mean((mask + 0.0005) ** power, axis=(1, 2))


def hinge_keep(logits: Array, y: Label, confidence: float | Array = 1.0) -> Array:
  """max(0, max_{j≠y} z_j − z_y + confidence), [B]: y should win by that margin."""
  return jax.nn.relu(losses.margin(logits, y) + confidence)


def hinge_destroy(logits: Array, y: Label, confidence: float | Array = 5.0) -> Array:
  """max(0, z_y − max_{j≠y} z_j + confidence), [B]: y should lose by that margin."""
  return jax.nn.relu(confidence - losses.margin(logits, y))


# --- images with a part taken out -----------------------------------------------------------------


def gaussian_blur(x: Image, width: int = 55, sigma: float = 11.0) -> Image:
  """Gaussian blur of `width` pixels, zero-padded, f32[B,H,W,C].

  As published, the kernel's peak is one pixel off its centre, to the lower right.
  """
  rows, columns = (jnp.asarray(_blur_matrix(n, width, sigma)) for n in x.shape[1:3])
  return jnp.einsum('ih,bhwc,jw->bijc', rows, x, columns)


def _blur_matrix(size: int, width: int, sigma: float) -> np.ndarray:
  offset = np.arange(size) - np.arange(size)[:, None]
  kernel = lambda d: np.exp(-0.5 * ((d - 1) / sigma) ** 2)  # noqa: E731
  total = kernel(np.arange(width) - width // 2).sum()
  return ((abs(offset) <= width // 2) * kernel(offset) / total).astype(np.float32)


class Substitute(NamedTuple):
  """What takes the place of the pixels taken out, per example; see `substitute`."""

  image: Image
  kept: Image


def substitute(x: Image, key: Key) -> Substitute:
  """Random fillings of images [0,1]: a blurred copy (width 55/224 of the image), or coloured noise.

  With probability ½ each, per image: the blur, or N(0, 0.055) + grey + a colour U(±0.165). The
  pixels kept get N(0, 0.015).
  """
  scale = x.shape[1] / 224
  width = 2 * max(1, round(27 * scale)) + 1
  k = jax.random.split(key, 4)
  noise = 0.5 + 0.055 * jax.random.normal(k[0], x.shape, jnp.float32)
  shape = (len(x), 1, 1, x.shape[-1])
  colour = jax.random.uniform(k[1], shape, jnp.float32, -0.165, 0.165)
  kept = x + 0.015 * jax.random.normal(k[3], x.shape, jnp.float32)
  # Blurred about grey, as zero padding is grey in units of [−1,1].
  blurred = 0.5 + gaussian_blur(kept - 0.5, width, 11.0 * scale)
  coin = jax.random.bernoulli(k[2], shape=(len(x), 1, 1, 1))
  return Substitute(jnp.where(coin, blurred, noise + colour), kept)


def blend(keep: Map, kept: Image, filling: Image) -> Image:
  """keep · kept + (1 − keep) · filling; keep f32[B,H,W]."""
  return filling + keep[..., None] * (kept - filling)


def alone_and_without(mask: Map, x: Image, key: Key) -> tuple[Image, Image]:
  """The images with the marked part alone, and without it; mask f32[B,H,W]."""
  a, b = (substitute(x, k) for k in jax.random.split(key))
  return blend(mask, a.kept, a.image), blend(1 - mask, b.kept, b.image)


# --- the training loss ----------------------------------------------------------------------------


class Weights(NamedTuple):
  """Of the terms of the training loss; the published ones."""

  destroyer: float = 1.0
  area: float = 8.0
  smoothness: float = 0.5
  preserver: float = 0.3


PUBLISHED = Weights()


def training_loss(
  logits_fn: Callable[[Image], Array],
  mask: Map,
  x: Image,
  y: Label,
  is_present: Array,
  key: Key,
  weights: Weights = PUBLISHED,
) -> tuple[Array, Metrics]:
  """The loss [B] of masks [B,h,w] for classes y [B], and its terms.

  Args:
    logits_fn: the black box, images in [0,1] -> logits.
    mask: up-sampled to the images before anything else.
    x: f32[B,H,W,3] in [0,1].
    y: the class asked for.
    is_present: bool[B]; where False, y is a fake class, whose mask should be empty.
    key: of the fillings.
    weights: of the terms.

  For a fake class the preserver turns into `hinge_destroy` with confidence 1, which an empty mask
  satisfies, and there is no destroyer. Differs from the authors' code: theirs turns the destroyer
  around as well (y should win without the marked part), which is best served by a mask that takes
  the true object away: on the scenes, maps of fake classes then marked the object.
  """
  mask = images.upsample(mask, (x.shape[1], x.shape[2]))
  preserved, destroyed = (logits_fn(v) for v in alone_and_without(mask, x, key))
  preserver = jnp.where(is_present, hinge_keep(preserved, y), hinge_destroy(preserved, y, 1.0))
  destroyer = jnp.where(is_present, hinge_destroy(destroyed, y), 0.0)
  terms = {
    'destroyer': destroyer,
    'preserver': preserver,
    'area': area(mask),
    'smoothness': smoothness(mask),
  }
  return sum(getattr(weights, name) * term for name, term in terms.items()), terms


# --- training steps -------------------------------------------------------------------------------
# A state's variables: {'params', 'batch_stats'} of the saliency net, encoder included, and
# 'black_box', the parameters of the classifier. What is frozen has no gradient and no optimiser
# state, and is an argument of the jitted step like the rest.


def trained(params: PyTree, train_encoder: bool) -> PyTree:
  """The part of the saliency net's parameters that is trained."""
  return {k: v for k, v in params.items() if train_encoder or k != 'encoder'}


def another_class(y: ArrayLike, shift: ArrayLike, classes: Sequence[int]) -> Label:
  """The class `shift` places after y among `classes`, cyclically, [B].

  `classes` are sorted and hold all of y.
  """
  known = jnp.asarray(classes, jnp.int32)
  return known[(jnp.searchsorted(known, y) + shift) % len(known)]


def classes_asked_for(
  key: Key, y: Label, classes: Sequence[int], fake: float
) -> tuple[Label, Array]:
  """(class [B], whether it is the true one [B]): with probability `fake` another of `classes`.

  `classes` are sorted and hold all of y.
  """
  coin_key, shift_key = jax.random.split(key)
  is_fake = jax.random.bernoulli(coin_key, fake, y.shape)
  shift = jax.random.randint(shift_key, y.shape, 1, len(classes), jnp.int32)
  return jnp.where(is_fake, another_class(y, shift, classes), y), ~is_fake


def selector_step(
  module: SaliencyUnet,
  tx: optax.GradientTransformation,
  *,
  mean: tuple[float, ...],
  std: tuple[float, ...],
  augment: Augment = no_augment,
  classes: Sequence[int] | None = None,
) -> StepFn:
  """Pre-training of the class selector: cross-entropy on whether the class asked for is present.

  `classes`: those that occur, sorted; None: all.
  """
  asked = range(module.num_classes) if classes is None else classes

  def step(state: TrainState, batch: TrainBatch, key: Key) -> tuple[TrainState, Metrics]:
    augment_key, class_key = jax.random.split(key)
    x = augment(augment_key, batch.image.astype(jnp.float32) / 255)
    y, is_present = classes_asked_for(class_key, batch.label, asked, 0.5)

    def loss_fn(embedding: Array):
      params = {**state.variables['params'], 'selector_module': {'embedding': embedding}}
      seen = _apply(module, {**state.variables, 'params': params}, x, y, mean, std)
      labels = is_present.astype(jnp.int32)
      loss = optax.softmax_cross_entropy_with_integer_labels(seen.exists, labels).mean()
      return loss, (seen.exists.argmax(-1) == labels).mean()

    embedding = state.variables['params']['selector_module']['embedding']
    (loss, accuracy), grad = jax.value_and_grad(loss_fn, has_aux=True)(embedding)
    updates, opt_state = tx.update(grad, state.opt_state, embedding)
    params = {
      **state.variables['params'],
      'selector_module': {'embedding': optax.apply_updates(embedding, updates)},
    }
    variables = {**state.variables, 'params': params}
    return TrainState(state.step + 1, variables, opt_state), {'loss': loss, 'accuracy': accuracy}

  return step


def rts_step(
  module: SaliencyUnet,
  black_box: Classifier,
  tx: optax.GradientTransformation,
  *,
  mean: tuple[float, ...],
  std: tuple[float, ...],
  augment: Augment = no_augment,
  classes: Sequence[int] | None = None,
  fake: float = 0.3,
  weights: Weights = PUBLISHED,
  train_encoder: bool = False,
) -> StepFn:
  """One step on the decoder (and the encoder, if asked); metrics are the batch means of the terms.

  The loss is `training_loss` plus the selector's cross-entropy on whether the class is present, so
  that it stays right when the encoder moves, or was not pre-trained.

  Args:
    module: the saliency net.
    black_box: the attacked classifier; its parameters are those in the state's 'black_box'.
    tx: over `trained(params, train_encoder)`.
    mean: of the encoder's input.
    std: of the encoder's input.
    augment: (key, images) -> images.
    classes: those that occur, sorted; None: all.
    fake: share of examples that are asked for a class they do not show.
    weights: of the loss terms.
    train_encoder: train it too, its running statistics held.
  """
  asked = range(module.num_classes) if classes is None else classes

  def step(state: TrainState, batch: TrainBatch, key: Key) -> tuple[TrainState, Metrics]:
    augment_key, class_key, loss_key = jax.random.split(key, 3)
    x = augment(augment_key, batch.image.astype(jnp.float32) / 255)
    y, is_present = classes_asked_for(class_key, batch.label, asked, fake)
    clf = black_box.replace(params=state.variables['black_box'])
    everything = state.variables['params']

    def loss_fn(params: PyTree):
      variables = {**state.variables, 'params': {**everything, **params}}
      seen, changed = _apply(module, variables, x, y, mean, std, train=True)
      loss, terms = training_loss(
        lambda v: clf(v).logits, seen.map, x, y, is_present, loss_key, weights
      )
      presence = optax.softmax_cross_entropy_with_integer_labels(
        seen.exists, is_present.astype(jnp.int32)
      )
      shown = {k: v.mean() for k, v in terms.items()}
      shown['marked'] = jnp.mean(seen.map, where=is_present[:, None, None])
      shown['marked_fake'] = jnp.mean(seen.map, where=~is_present[:, None, None])
      return jnp.mean(loss + presence), (shown, changed)

    params = trained(everything, train_encoder)
    (loss, (shown, changed)), grads = jax.value_and_grad(loss_fn, has_aux=True)(params)
    updates, opt_state = tx.update(grads, state.opt_state, params)
    params = {**everything, **optax.apply_updates(params, updates)}
    variables = {**state.variables, **changed, 'params': params}
    return TrainState(state.step + 1, variables, opt_state), {'loss': loss, **shown}

  return step


class Judged(NamedTuple):
  """What masks are worth, per example; `judge`."""

  map: Map
  marked: Array  # f32[B], mean of the map
  p_kept: Array  # f32[B], p_y with the marked part alone, the rest substituted
  p_removed: Array  # f32[B], p_y with the marked part substituted
  p_whole: Array  # f32[B], p_y of the image as it is
  correct: Array  # bool[B], whether y is what the classifier predicts for it
  exists: Array  # bool[B], whether the selector says that y is present


def judge(
  module: SaliencyUnet,
  variables: PyTree,
  clf: Classifier,
  x: Image,
  y: Label,
  key: Key,
  *,
  mean: tuple[float, ...],
  std: tuple[float, ...],
) -> Judged:
  """Masks of classes y on held-out images, and what the classifier sees with and without them.

  Substitutes are drawn as in training. Differs from it: one key, no augmentation.
  """
  seen = _apply(module, variables, x, y, mean, std)
  mask = images.upsample(seen.map, (x.shape[1], x.shape[2]))
  logits = [clf(v).logits for v in (*alone_and_without(mask, x, key), x)]
  kept, removed, whole = (jax.nn.sigmoid(-losses.log_odds(v, y)) for v in logits)
  return Judged(
    seen.map,
    jnp.mean(mask, axis=(1, 2)),
    kept,
    removed,
    whole,
    logits[-1].argmax(-1) == y,
    seen.exists[:, 1] > seen.exists[:, 0],
  )


def _apply(
  module: SaliencyUnet,
  variables: PyTree,
  x: Image,
  y: Label,
  mean: tuple[float, ...],
  std: tuple[float, ...],
  train: bool = False,
) -> Any:
  net = {k: variables[k] for k in ('params', 'batch_stats')}
  mutable = ['batch_stats'] if train else False
  return module.apply(net, images.normalised(x, mean, std), y, train=train, mutable=mutable)
