"""The one-call front, and the host loop that every command shares: jitted chunks, nothing else."""

import functools
import warnings
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tqdm

from adv2_jax import images, losses, metrics, validate
from adv2_jax.attacks import frameworks, goals, presets
from adv2_jax.attacks.loop import run_chunk
from adv2_jax.classifier import Classifier, require
from adv2_jax.interpreters.base import Interpreter, map_jitted
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
  gradient: np.ndarray  # the largest |gradient| of each example
  before: Any = None  # bool[B], the clean image is taken for the target; None: not looked at
  delta: PyTree = None  # what was delivered, before rounding; StAdv: the flow, f32[B,H,W,2]
  target: Any = None  # i32[B], see `AttackResult.target`

  def of(self, rows: Any) -> 'History':
    """The same of some examples."""
    cut = jax.tree.map(lambda v: v[:, rows], (self.terms, self.success, self.gradient))
    delta = jax.tree.map(lambda v: v[rows], self.delta)
    return History(self.evaluations, self.passes, *cut)._replace(delta=delta)

  def gradients(self) -> tuple[np.ndarray, np.ndarray]:
    """(zero whenever it was looked at, not finite at some time), bool[B] each."""
    return (self.gradient == 0).all(0), ~np.isfinite(self.gradient).all(0)


class Health(NamedTuple):
  """Examples of which success and map figures mean nothing, bool[B] each."""

  already_at_target: Any  # the clean image is taken for the target
  zero_gradient: Any  # at all steps looked at: the image was never moved
  nonfinite_gradient: Any  # from then on it was not moved
  flat_map: Any  # the map of the image delivered is the same everywhere

  def warn(self, stacklevel: int = 3) -> None:
    """One warning for each that occurs, with the first images that it concerns."""
    says = (
      'taken for the target before the attack: nothing is attacked there; choose other targets',
      'without a gradient, and so left as they were: avoid rounding, argmax and stop_gradient on '
      'the way from x to the logits (adv2.check_classifier tells more)',
      'with a gradient that is not finite, and so not moved any further: avoid sqrt, log and '
      'division at 0 (adv2.check_classifier tells more)',
      'with a map that is the same everywhere: it explains nothing, and map figures mean nothing',
    )
    for marked, text in zip(self, says, strict=True):
      if (which := np.flatnonzero(np.asarray(marked))).size:
        some = ', '.join(map(str, which[:8])) + (', …' if which.size > 8 else '')
        warnings.warn(
          f'{which.size} of {len(marked)} images ({some}) are {text}', stacklevel=stacklevel
        )


class AttackResult(NamedTuple):
  """What `attack` delivers, judged on the 8-bit images by the real net and fresh maps.

  Attributes:
    x: f32[B,H,W,C] on the 8-bit grid: x·255 is integral.
    logits: f32[B,K].
    maps: f32[B,h,w], of the target class; of a joint, a mapping of such by name.
    success: bool[B].
    terms: cross-entropy of the target, MSE of the map to the target map (of a joint the mean over
      its maps), and their sum.
    history: losses and success over the steps.
  """

  x: Image
  logits: Array
  maps: Map
  success: Array
  terms: Terms
  history: History

  @property
  def target(self) -> np.ndarray:
    """i32[B], the class that was wanted; untargeted: the most probable wrong one of x."""
    return self.history.target

  @property
  def health(self) -> Health:
    """Examples of which the figures mean nothing."""
    flat = jax.tree.reduce(jnp.logical_or, jax.tree.map(metrics.flat, self.maps))
    return Health(self.history.before, *self.history.gradients(), flat)

  def __repr__(self) -> str:
    """In one line, without the pixels."""
    n, *shape = self.x.shape
    already = int(np.sum(self.health.already_at_target))
    return (
      f'AttackResult({n} images {"×".join(map(str, shape))}: {int(self.success.sum())} taken for '
      f'their target{f", {already} of them before" * bool(already)}; map L2 '
      f'{float(jnp.sqrt(self.terms.interpretation).mean()):.3f}; '
      f'{int(self.history.evaluations[-1])} loss gradients each)'
    )


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
  hit = recipe.goal.success(snapshot.logits, fixed.batch.target)
  seen = snapshot.terms, hit, snapshot.gradient
  return state, (seen, jnp.all(state.done))


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
      state, (found, finished) = _chunk(recipe, stage, fixed, state, n)
      step += n
      evaluations = earlier + attack.evaluations(step)
      terms, hit, gradient = jax.device_get(found)
      seen.append((evaluations, passes + attack.passes(step), terms, hit, gradient))
      if on_chunk:
        on_chunk(evaluations, total, hit)
      if finished:
        break
    delta = _result(recipe, stage, fixed, state)
    earlier += attack.evaluations(step)
    passes += attack.passes(step) + attack.result_passes
  history = History(*jax.tree.map(lambda *v: np.stack(v), *seen))._replace(delta=delta)
  history.passes[-1] = passes
  return _image(recipe, fixed, delta), history


@functools.partial(jax.jit, static_argnames='goal')
def _judge(
  clf: Classifier,
  interpreter: Interpreter,
  batch: Batch,
  x8: Image,
  keys: Key,
  goal: goals.Goal,
) -> tuple[Array, Map, Array, Terms, Label]:
  logits = clf(x8).logits
  target = goal.explained(logits, batch.target)
  maps = interpreter.explain(clf, x8, target, keys)
  l_prd = losses.targeted_xent(logits, target)
  apart = jax.tree.leaves(jax.tree.map(losses.map_mse, maps, batch.target_map))
  l_int = jnp.mean(jnp.stack(apart), axis=0)
  terms = Terms(l_prd + l_int, l_prd, l_int, jnp.zeros_like(l_prd))
  return logits, maps, metrics.success(logits, target), terms, target


_outputs = jax.jit(Classifier.__call__)


def explain(clf: Classifier, interpreter: Interpreter, x: Image, y: Label, keys: Key) -> Map:
  """`interpreter.explain`, jitted, without its checks of input."""
  return map_jitted(interpreter, clf, x, y, keys)


def attack(
  clf: Classifier,
  interpreter: Interpreter,
  x: Image,
  *,
  target: Label | None = None,
  target_map: Map | str | None = None,
  label: Label | None = None,
  goal: str = 'deceive',
  framework: str = 'pgd',
  norm: str = 'linf',
  epsilon: float | Array | None = None,
  preset: str | Recipe = 'fast',
  key: Key | None = None,
  steps: int | None = None,
  pad_to: int | None = None,
  on_step: Callable[[int, int, np.ndarray], None] | None = None,
  progress: bool = False,
) -> AttackResult:
  """Finds images near x that f takes for `target` and that g explains with `target_map`.

  Warns of images that are taken for their target before anything is done, that have no gradient to
  follow, or whose map is flat; `AttackResult.health` marks them.

  Args:
    clf: the classifier.
    interpreter: the interpreter to deceive.
    x: f32[B,H,W,C] in [0,1], NHWC.
    target: i32[B], the class wanted. None: untargeted, any class but the true one, and the map is
      that of the class then predicted; with goal 'map_only' the true class.
    target_map: f32[B,h,w] in [0,1], for a joint a mapping by name; None: the benign one, the map
      of x for `label`. With goal 'map_only' also 'away' (little of the map is to be left where the
      benign one is strongest, `top_mass`) or 'away_centre' (its centre of mass is to move far,
      `centre_kept`); figures are then against the benign map.
    label: i32[B], the true class; None: what the classifier predicts for x.
    goal: 'deceive', class and map; 'map_only', the class stays the true one, and success is that it
      is predicted; 'class_only', plain PGD on the class.
    framework: 'pgd'; 'stadv', pixels move (`history.delta` is the flow, f32[B,H,W,2] in pixels,
      before rounding); or 'cw', the closest image in L2 that succeeds and whose map lies near the
      target map. `frameworks.by_name` makes recipes of other weights and confidence.
    norm: of epsilon: 'linf' or, with 'pgd', 'l2', over all values of the image.
    epsilon: radius, one number or one per image, [B]; only 'pgd' has one. L∞: 0 < ε ≤ 1, None:
      0.031; the image delivered is rounded to 8 bits, and so up to ε + 0.5/255 from an x that lies
      on that grid, ε + 1/255 from one that does not. L2: to be given; rounding adds up to
      0.5/255·√(HWC).
    preset: 'fast', 'authors', one of the literature (`baselines.RECIPES`), or a `presets.Recipe`,
      which has its own framework and norm: say the same ones.
    key: random key, one, or one per image, [B], so that an image's numbers do not depend on its
      place; None: `jax.random.key(0)`.
    steps: steps on the joint loss; None: the preset's.
    pad_to: fill the batch up to so many rows, which change nothing, so that batches of all sizes up
      to that share one compiled program; None: each size is compiled once.
    on_step: called as on_step(evaluations, total, success) after every tenth step and the last one
      of a stage: loss gradients so far, those of the whole attack, and bool[B], which of the images
      succeed as they are. What it raises ends the attack.
    progress: show a bar with the success rate.

  Raises:
    InputError: for input of wrong shape, range or type; the message says what to do.
  """
  if validate.traced(clf, x, target, target_map, label, epsilon, key):
    raise InputError(
      'adv2.attack was called inside jax.jit, vmap or grad; it compiles by itself: call it outside '
      'of them, or compose adv2.adv2 and adv2.run inside, as adv2_jax/attacks/loop.py shows'
    )
  require(clf)
  if not isinstance(interpreter, Interpreter):
    raise InputError(
      f'interpreter is {validate.kind(interpreter)}; expected an Interpreter, such as '
      'adv2.interpreters.cam()'
    )
  x = validate.images(x)
  n = len(x)
  frameworks.check(framework, norm, has_epsilon=epsilon is not None)
  most = 1.0 if norm == 'linf' else float(np.sqrt(x[0].size))
  radius = validate.epsilon(frameworks.EPSILON if epsilon is None else epsilon, n, most)
  key = jax.random.key(0) if key is None else key
  keys = example_keys(key, n)
  if steps is not None and not isinstance(preset, str):
    raise InputError('steps goes with the name of a preset; a recipe has its own number of steps')
  for name, number, least in (('steps', steps, 1), ('pad_to', pad_to, n)):
    if number is not None:
      validate.at_least(number, least, name)
  given = {'framework': framework, 'norm': norm}
  recipe = _recipe(preset, goal, interpreter.name, steps, target, target_map, given)
  # Filled up by the first rows again; all that is jitted below sees one shape.
  rows = np.resize(np.arange(n), pad_to or n)
  x, keys = x[rows], keys[rows]
  # Shapes by way of the jitted functions, which remember them: a second call traces nothing.
  num_classes = jax.eval_shape(_outputs, clf, x).logits.shape[-1]
  drawn = jax.eval_shape(explain, clf, interpreter, x, _zeros(x), keys)
  if target is not None:
    target = validate.labels(target, n, num_classes, 'target')[rows]
    validate.explicable(target, interpreter, 'target')
  label = None if label is None else validate.labels(label, n, num_classes, 'label')[rows]
  if recipe.goal.untargeted:  # any class may come to be explained
    validate.explicable(np.arange(num_classes), interpreter, 'target=None, the class predicted')
  if isinstance(target_map, str):
    target_map = None
  if target_map is not None:
    shapes = jax.tree.map(lambda v: (n, *v.shape[1:]), drawn)
    target_map = jax.tree.map(lambda v: v[rows], validate.target_maps(target_map, shapes))
  seen = jnp.argmax(_outputs(clf, x).logits, axis=-1).astype(jnp.int32)
  label = seen if label is None else label
  if target is None:
    target = label
  elif recipe.goal.holds:
    validate.targets_are_labels(target, label)
  else:
    validate.targets_differ(target, label)
  if target_map is None:
    validate.explicable(label, interpreter, 'label')
    target_map = explain(clf, interpreter, x, label, keys)
  ids = jnp.arange(len(rows), dtype=jnp.int32)
  batch = Batch(ids, x, target, target_map, ids < n)
  if radius.ndim:
    radius = radius[rows]
  with tqdm.tqdm(disable=not progress, unit='gradient', mininterval=1) as bar:

    def on_chunk(evaluations: int, total: int, hit: np.ndarray) -> None:
      bar.total = total
      bar.set_postfix_str(f'success {hit[:n].mean():.2f}', refresh=False)
      bar.update(evaluations - bar.n)
      if on_step:
        on_step(evaluations, total, hit[:n])

    x8, history = attack_batch(
      recipe,
      clf,
      interpreter,
      batch,
      radius,
      key if not key.ndim else keys,
      on_chunk=on_chunk,
    )
  delivered = (x8, *_judge(clf, interpreter, batch, x8, keys, recipe.goal))
  x8, logits, maps, hit, terms, judged = jax.tree.map(lambda v: v[:n], delivered)
  before = (seen == target) != recipe.goal.untargeted
  if recipe.goal.holds:  # that is where it starts
    before = jnp.zeros_like(before)
  history = history.of(slice(n))._replace(before=np.asarray(before[:n]), target=np.asarray(judged))
  result = AttackResult(x8, logits, maps, hit, terms, history)
  result.health.warn()
  return result


def _recipe(
  preset: str | Recipe,
  goal: str,
  name: str,
  steps: int | None,
  target: Any,
  target_map: Any,
  framework: Mapping[str, Any],
) -> Recipe:
  """The recipe for what is given to `attack`, or InputError where that does not go together."""
  wanted = goals.find(goal, target_map, untargeted=target is None)
  if isinstance(target_map, str) and target_map not in goals.AWAY:
    raise InputError(
      f'target_map is {target_map!r}; expected an array [B,h,w], None for the benign map, or '
      f'{" or ".join(map(repr, goals.AWAY))}'
    )
  if wanted.holds and target_map is None:
    raise InputError(
      "goal 'map_only' without a target_map; expected maps [B,h,w] to come close to, or 'away' or "
      "'away_centre' from the benign one"
    )
  if isinstance(preset, str):
    if wanted.name == 'class_only':
      return frameworks.plain(preset, steps, goal=wanted, **framework)
    return frameworks.by_name(preset, name, steps_s2=steps, goal=wanted, **framework)
  if preset.goal != wanted:
    raise InputError(
      f'the recipe is for {preset.goal}, and goal, target and target_map ask for {wanted}: build '
      "it with that goal, such as presets.by_name('fast', 'cam', goal=…)"
    )
  return preset


def _zeros(x: Image) -> Label:
  return jnp.zeros(len(x), jnp.int32)
