"""Training: one loop, `fit`, around one pure step function per task.

A step is (state, batch, key) -> (state, metrics). `classifier_step` makes the one for plain
classification; other tasks bring their own and share the loop, its checkpoints and its exact
resume: batch and key are functions of the step's number alone, so that a run that was stopped and
resumed ends bit-equal to one that was not.
"""

import pathlib
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.serialization
import flax.struct
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import optax
import tqdm

from adv2_jax import images as image_lib
from adv2_jax.types import Array, Image, InputError, Key, PyTree

Metrics = Mapping[str, Array]
Augment = Callable[[Key, Image], Image]


class TrainState(flax.struct.PyTreeNode):
  """What the next training step needs.

  Attributes:
    step: i32[], number of steps done.
    variables: of the net, {'params': …, 'batch_stats': …}.
    opt_state: optax's.
  """

  step: Array
  variables: PyTree
  opt_state: PyTree


class TrainBatch(NamedTuple):
  """image u8[B,H,W,3] and label i32[B]."""

  image: Any
  label: Any


SHOWN = ('loss', 'accuracy', 'marked', 'marked_fake')  # of a step's metrics, in the progress bar
StepFn = Callable[[TrainState, TrainBatch, Key], tuple[TrainState, Metrics]]


class Phase(NamedTuple):
  """One of the trainings that follow each other.

  Attributes:
    name: of its state file.
    step: its step function.
    begin: variables -> state.
    steps: how many.
  """

  name: str
  step: StepFn
  begin: Callable[[PyTree], TrainState]
  steps: int


# --- batches --------------------------------------------------------------------------------------


def shuffled(
  images: np.ndarray, labels: np.ndarray, batch_size: int, seed: int
) -> Callable[[int], TrainBatch]:
  """A function step -> TrainBatch: a fresh permutation for each epoch, the odd rest dropped.

  Raises:
    InputError: fewer images than one batch.
  """
  per_epoch = len(images) // batch_size
  if not per_epoch:
    raise InputError(f'batch_size {batch_size} is more than the {len(images)} training images')

  def batch_at(step: int) -> TrainBatch:
    epoch, position = divmod(step, per_epoch)
    order = np.random.default_rng([seed, epoch]).permutation(len(images))
    ids = order[position * batch_size : (position + 1) * batch_size]
    return TrainBatch(images[ids], labels[ids])

  return batch_at


# --- augmentation: (key, f32[B,H,W,3] in [0,1]) -> the same shape ---------------------------------


def no_augment(key: Key, x: Image) -> Image:
  """The images as they are."""
  del key
  return x


def pad_crop_flip(key: Key, x: Image, pad: int = 4) -> Image:
  """CIFAR's usual: shift by up to `pad` pixels (zeros come in), mirror half of the images."""
  shift_key, flip_key = jax.random.split(key)
  shifts = jax.random.randint(shift_key, (len(x), 2), 0, 2 * pad + 1, jnp.int32)
  flip = jax.random.bernoulli(flip_key, shape=(len(x), 1, 1, 1))
  padded = jnp.pad(x, ((0, 0), (pad, pad), (pad, pad), (0, 0)))

  def crop(image: Array, shift: Array) -> Array:
    return jax.lax.dynamic_slice(image, (*shift, jnp.zeros_like(shift[0])), x.shape[1:])

  x = jax.vmap(crop)(padded, shifts)
  return jnp.where(flip, x[:, :, ::-1], x)


def mirror_and_relight(key: Key, x: Image, gain: float = 0.2) -> Image:
  """For the scenes, whose classes know no up or down: the square's 8 symmetries, and brightness."""
  keys = jax.random.split(key, 4)
  coin = [jax.random.bernoulli(k, shape=(len(x), 1, 1, 1)) for k in keys[:3]]
  x = jnp.where(coin[0], x[:, :, ::-1], x)
  x = jnp.where(coin[1], x[:, ::-1], x)
  x = jnp.where(coin[2], x.swapaxes(1, 2), x)
  factor = jax.random.uniform(keys[3], (len(x), 1, 1, 1), jnp.float32, 1 - gain, 1 + gain)
  return jnp.clip(x * factor, 0, 1)


# --- optimisers -----------------------------------------------------------------------------------


def optimiser(
  name: str, peak: float, steps: int, *, warmup: float = 0.15, weight_decay: float = 5e-4
) -> optax.GradientTransformation:
  """'sgd' (Nesterov momentum 0.9) or 'adamw', with one cycle of linear warm-up and cosine decay.

  Args:
    name: 'sgd' or 'adamw'.
    peak: the highest learning rate.
    steps: length of the cycle.
    warmup: the share of steps in which the rate rises.
    weight_decay: on convolution and dense kernels only.

  Raises:
    InputError: unknown name, or a rate that is not positive.
  """
  if not peak > 0:
    raise InputError(f'learning_rate is {peak}; expected a positive number')
  rise = max(1, round(warmup * steps))
  rate = optax.warmup_cosine_decay_schedule(0.0, peak, rise, max(steps, rise + 1), 1e-3 * peak)
  if name == 'sgd':
    decay = optax.add_decayed_weights(weight_decay, mask=_kernels)
    return optax.chain(decay, optax.sgd(rate, momentum=0.9, nesterov=True))
  if name == 'adamw':
    return optax.adamw(rate, weight_decay=weight_decay, mask=_kernels)
  raise InputError(f'unknown optimiser {name!r}; expected sgd or adamw')


def _kernels(params: PyTree) -> PyTree:
  return flax.traverse_util.path_aware_map(lambda path, _: path[-1] == 'kernel', params)


# --- the loop -------------------------------------------------------------------------------------


def save_state(path: pathlib.Path, state: PyTree) -> None:
  """Writes a state (msgpack, no pickle) by atomic rename."""
  image_lib.write_atomic(path, flax.serialization.to_bytes(jax.device_get(state)))


def load_state(path: pathlib.Path, template: PyTree) -> PyTree:
  """Reads a state saved by `save_state` into the structure of `template`.

  Raises:
    InputError: damaged, or of another net or optimiser.
  """
  try:
    state = flax.serialization.from_bytes(template, path.read_bytes())
  except (ValueError, KeyError, TypeError, AttributeError) as error:
    raise InputError(f'{path} is damaged or of another model ({error}): start anew') from None
  shapes = jax.tree.map(lambda a, b: np.shape(a) == np.shape(b), template, state)
  if not all(jax.tree.leaves(shapes)):
    raise InputError(f'{path} is the state of a net of other sizes: start in a new --workdir')
  return jax.tree.map(jnp.asarray, state)


def all_finite(tree: PyTree) -> bool:
  """Whether no leaf holds NaN or infinity."""
  return all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(tree))


def fit(
  step_fn: StepFn,
  state: TrainState,
  batch_at: Callable[[int], TrainBatch],
  num_steps: int,
  key: Key,
  *,
  checkpoint: pathlib.Path | None = None,
  save_every: int = 500,
  evaluate: Callable[[TrainState], Mapping[str, float]] | None = None,
  evaluate_every: int = 0,
  log: Callable[[dict[str, float]], None] = lambda row: None,
  log_every: int = 25,
  progress: bool = True,
) -> TrainState:
  """Trains from `state.step` to `num_steps`.

  Args:
    step_fn: (state, batch, key) -> (state, metrics); jitted here, with the state donated.
    state: where to start, see `init_state` and `load_state`.
    batch_at: step -> batch, a function of the step alone.
    num_steps: the step to stop after.
    key: folded with the step's number for each step.
    checkpoint: file the state is saved to, every `save_every` steps and at the end.
    save_every: steps between saves; one that is not finite is never saved.
    evaluate: state -> figures on held-out images, every `evaluate_every` steps (0: never) and
      at the end; logged as held_out_<name>, the first one shown in the bar.
    evaluate_every: steps between evaluations.
    log: gets one row per `log_every` steps, and one per evaluation.
    log_every: steps between readings of the metrics; a reading waits for the device.
    progress: show a bar with the metrics and images per second.

  Raises:
    InputError: the loss or the weights are no longer finite.
  """

  def counted(state: TrainState, batch: TrainBatch, key: Key) -> tuple[TrainState, Metrics]:
    return step_fn(state, batch, jax.random.fold_in(key, state.step))

  jitted = jax.jit(counted, donate_argnums=0)
  # A copy, because the caller's state must survive the donation of ours.
  state = jax.tree.map(jnp.copy, state)
  start = int(state.step)
  images, since, held_out = 0, time.perf_counter(), '-'
  bar = tqdm.tqdm(total=num_steps, initial=start, disable=not progress, unit='step', mininterval=1)
  with bar:
    for step in range(start + 1, num_steps + 1):
      batch = batch_at(step - 1)
      state, metrics = jitted(state, batch, key)
      images += len(batch.label)
      last = step == num_steps
      save = last or step % save_every == 0
      if save or step % log_every == 0:
        row = {name: float(value) for name, value in metrics.items()}
        # The loss is that before the update, so the weights are looked at too before a save.
        if not np.isfinite(row['loss']) or (save and not all_finite(state.variables)):
          raise InputError(
            f'training diverged at step {step}, loss {row["loss"]:.3g}: lower --learning_rate and '
            'start again in a new --workdir'
          )
        row['seconds'] = time.perf_counter() - since
        row['images_per_second'] = images / row['seconds']
        images, since = 0, time.perf_counter()
        log({'step': step, **row})
        shown = {name: f'{row[name]:.3f}' for name in SHOWN if name in row}
        bar.set_postfix(shown, held_out=held_out, images_per_s=f'{row["images_per_second"]:.0f}')
      # Before the save: a run killed while it evaluates does the steps since the last one again.
      if evaluate is not None and (last or (evaluate_every and step % evaluate_every == 0)):
        figures = evaluate(state)
        log({'step': step, **{f'held_out_{name}': value for name, value in figures.items()}})
        held_out = f'{next(iter(figures.values())):.4f}'
        since = time.perf_counter()
      if checkpoint is not None and save:
        save_state(checkpoint, state)
      bar.update(1)
  return state
