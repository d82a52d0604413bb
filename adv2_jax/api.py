"""The one-call front, and the host loop that every command shares: jitted chunks, nothing else."""

import functools
import warnings
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from adv2_jax import images, losses, metrics, validate
from adv2_jax.attacks import presets
from adv2_jax.attacks.loop import run_chunk, success
from adv2_jax.classifier import Classifier
from adv2_jax.interpreters.base import Interpreter
from adv2_jax.types import (
  Array,
  Batch,
  Image,
  InputError,
  Key,
  Label,
  Map,
  PyTree,
  Schedule,
  Terms,
  example_keys,
)

Recipe = presets.Recipe


class History(NamedTuple):
  """One entry per chunk of steps: what was spent by then, per example [T], and seen then [T,B]."""

  evaluations: np.ndarray
  passes: np.ndarray
  terms: Terms
  success: np.ndarray


class AttackResult(NamedTuple):
  """What `attack` delivers, judged on the 8-bit images by the real net and fresh maps.

  Attributes:
    x: f32[B,H,W,C] on the 8-bit grid: x·255 is integral.
    logits: f32[B,K].
    maps: f32[B,h,w], of the target class.
    success: bool[B].
    terms: cross-entropy of the target, MSE of the map to the target map, and their sum.
    history: losses and success over the steps.
  """

  x: Image
  logits: Array
  maps: Map
  success: Array
  terms: Terms
  history: History


class _Fixed(NamedTuple):
  """The traced arguments that stay the same through an attack."""

  clf: Classifier
  interpreter: Interpreter
  epsilon: Array
  key: Key
  batch: Batch


def _schedule(recipe: Recipe, fixed: _Fixed) -> Schedule:
  perturbation = recipe.perturbation(fixed.epsilon)
  return recipe.schedule(fixed.clf, fixed.interpreter, perturbation, fixed.key)


@functools.partial(jax.jit, static_argnames=('recipe', 'stage'))
def _init(recipe: Recipe, stage: int, fixed: _Fixed, delta: PyTree) -> PyTree:
  return _schedule(recipe, fixed)[stage][0].init(fixed.batch, delta)


@functools.partial(jax.jit, static_argnames=('recipe', 'stage'), donate_argnames='state')
def _chunk(recipe: Recipe, stage: int, fixed: _Fixed, state: PyTree, n: int) -> tuple:
  attack, _ = _schedule(recipe, fixed)[stage]
  state, snapshot = run_chunk(attack, fixed.batch, state, n)
  return state, (snapshot.terms, success(fixed.batch, snapshot), jnp.all(state.done))


@functools.partial(jax.jit, static_argnames=('recipe', 'stage'))
def _result(recipe: Recipe, stage: int, fixed: _Fixed, state: PyTree) -> PyTree:
  return _schedule(recipe, fixed)[stage][0].result(fixed.batch, state)


@functools.partial(jax.jit, static_argnames='recipe')
def _image(recipe: Recipe, fixed: _Fixed, delta: PyTree) -> Image:
  perturbation = recipe.perturbation(fixed.epsilon)
  return images.quantise(perturbation.apply(fixed.batch.x, delta))


def attack_batch(
  recipe: Recipe,
  clf: Classifier,
  interpreter: Interpreter,
  batch: Batch,
  epsilon: float | Array,
  key: Key,
  *,
  every: int = 10,
  on_chunk: Callable[[int, int, np.ndarray], None] | None = None,
) -> tuple[Image, History]:
  """Runs a recipe on one batch and returns the 8-bit images; no check of the input.

  Chunks of `every` steps run on the device; between them the host sees terms and success, calls
  `on_chunk(evaluations so far, in all, success)`, and ends a stage whose examples are all done.
  """
  fixed = _Fixed(clf, interpreter, jnp.float32(epsilon), key, batch)
  schedule = _schedule(recipe, fixed)
  total = sum(attack.evaluations(steps) for attack, steps in schedule)
  delta, seen, earlier, passes = None, [], 0, 0
  for stage, (attack, steps) in enumerate(schedule):
    if not steps:
      continue
    state, step = _init(recipe, stage, fixed, delta), 0
    while step < steps:
      n = min(every, steps - step)
      state, (terms, hit, finished) = _chunk(recipe, stage, fixed, state, n)
      step += n
      evaluations = earlier + attack.evaluations(step)
      seen.append((evaluations, passes + attack.passes(step), *jax.device_get((terms, hit))))
      if on_chunk:
        on_chunk(evaluations, total, seen[-1][-1])
      if finished:
        break
    delta = _result(recipe, stage, fixed, state)
    earlier += attack.evaluations(step)
    passes += attack.passes(step) + attack.result_passes
  history = History(*jax.tree.map(lambda *v: np.stack(v), *seen))
  history.passes[-1] = passes
  return _image(recipe, fixed, delta), history


@jax.jit
def _judge(
  clf: Classifier, interpreter: Interpreter, batch: Batch, x8: Image, keys: Key
) -> tuple[Array, Map, Array, Terms]:
  logits = clf(x8).logits
  maps = interpreter.explain(clf, x8, batch.target, keys)
  l_prd = losses.targeted_xent(logits, batch.target)
  l_int = losses.map_mse(maps, batch.target_map)
  terms = Terms(l_prd + l_int, l_prd, l_int, jnp.zeros_like(l_prd))
  return logits, maps, metrics.success(logits, batch.target), terms


_outputs = jax.jit(Classifier.__call__)


@jax.jit
def explain(clf: Classifier, interpreter: Interpreter, x: Image, y: Label, keys: Key) -> Map:
  """`interpreter.explain`, jitted."""
  return interpreter.explain(clf, x, y, keys)


def attack(
  clf: Classifier,
  interpreter: Interpreter,
  x: Image,
  *,
  target: Label,
  target_map: Map | None = None,
  label: Label | None = None,
  epsilon: float = 0.031,
  preset: str | Recipe = 'fast',
  key: Key | None = None,
  steps: int | None = None,
) -> AttackResult:
  """Finds images near x that f takes for `target` and that g explains with `target_map`.

  Args:
    clf: the classifier.
    interpreter: the interpreter to deceive.
    x: f32[B,H,W,C] in [0,1], NHWC.
    target: i32[B], the class wanted.
    target_map: f32[B,h,w] in [0,1]; None: the benign one, the map of x for `label`. MASK under
      'fast' keeps the benign one whatever is given, and says so in a warning.
    label: i32[B], the true class; None: what the classifier predicts for x.
    epsilon: L∞ radius, 0 < ε ≤ 1; the image delivered is rounded to 8 bits, and so up to
      ε + 0.5/255 from an x that lies on that grid, ε + 1/255 from one that does not.
    preset: 'fast', 'authors', or a `presets.Recipe`.
    key: random key; None: `jax.random.key(0)`.
    steps: steps on the joint loss; None: the preset's.

  Raises:
    InputError: for input of wrong shape, range or type; the message says what to do.
  """
  if not isinstance(interpreter, Interpreter):
    raise InputError(
      f'interpreter is {interpreter!r}; expected an Interpreter, such as adv2.interpreters.cam()'
    )
  x = validate.images(x)
  if not 0 < epsilon <= 1:
    raise InputError(f'epsilon is {epsilon}; expected 0 < epsilon ≤ 1, such as 0.031 (8/255)')
  key = jax.random.key(0) if key is None else key
  keys = example_keys(key, len(x))
  if key.ndim:
    raise InputError(f'key has shape {key.shape}; expected one key, such as jax.random.key(0)')
  if steps is not None and not isinstance(preset, str):
    raise InputError('steps goes with the name of a preset; a recipe has its own number of steps')
  if steps is not None and steps < 1:
    raise InputError(f'steps is {steps}; expected a positive number of steps')
  # Shapes by way of the jitted functions, which remember them: a second call traces nothing.
  num_classes = jax.eval_shape(_outputs, clf, x).logits.shape[-1]
  map_shape = jax.eval_shape(explain, clf, interpreter, x, _zeros(x), keys).shape
  target = validate.labels(target, len(x), num_classes, 'target')
  label = (
    jnp.argmax(_outputs(clf, x).logits, axis=-1).astype(jnp.int32)
    if label is None
    else validate.labels(label, len(x), num_classes, 'label')
  )
  validate.targets_differ(target, label)
  validate.explicable(target, interpreter, 'target')
  if interpreter.name == 'mask' and preset == 'fast':
    seen = jnp.argmax(_outputs(clf, x).logits, axis=-1)
    if target_map is None and (other := np.flatnonzero(np.asarray(seen != label))).size:
      warnings.warn(
        "MASK under preset 'fast' keeps the map of the class predicted for x: for image "
        f'{other[0]} that is {int(seen[other[0]])}, not its label {int(label[other[0]])}',
        stacklevel=2,
      )
  if target_map is None:
    validate.explicable(label, interpreter, 'label')
    target_map = explain(clf, interpreter, x, label, keys)
  elif interpreter.name == 'mask' and preset == 'fast':
    warnings.warn(
      "MASK under preset 'fast' keeps the benign map; the target_map given is not aimed at: take "
      "preset 'authors' for that",
      stacklevel=2,
    )
  target_map = validate.target_map(target_map, map_shape)
  recipe: Recipe = (
    presets.by_name(preset, interpreter.name, steps_s2=steps) if isinstance(preset, str) else preset
  )
  ids = jnp.arange(len(x), dtype=jnp.int32)
  batch = Batch(ids, x, target, target_map, jnp.ones(len(x), bool))
  x8, history = attack_batch(recipe, clf, interpreter, batch, epsilon, key)
  logits, maps, hit, terms = _judge(clf, interpreter, batch, x8, keys)
  return AttackResult(x8, logits, maps, hit, terms, history)


def _zeros(x: Image) -> Label:
  return jnp.zeros(len(x), jnp.int32)
