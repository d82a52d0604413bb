"""Shapes, ranges and units, written once: what flows between classifier, interpreter and attack.

Every array that belongs to examples has the batch first and is never reduced over it on the
device: a loss is `[B]`, a success is `[B]`. Means and rates are made on the host, from the rows
that are real (`Batch.is_real`).
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array
PyTree = Any
Image = jax.Array  # f32[B,H,W,C] in [0,1], NHWC; normalisation lives inside the classifier.
Map = jax.Array  # f32[B,h,w] in [0,1]; high = important for the class explained.
Label = jax.Array  # i32[B]
Key = jax.Array  # typed key, shape () or one per example, [B]; see `example_keys`.
Carry = Any  # What an interpreter keeps between attack steps: () or e.g. (mask, Adam moments).


class Outputs(NamedTuple):
  """What a classifier says of a batch.

  Attributes:
    logits: f32[B,K], not probabilities.
    taps: inner activations by name; `taps['features']` f32[B,h,w,F] are the last ones before the
      head, so that `head_fn(params, taps['features']) == logits`.
  """

  logits: Array
  taps: Mapping[str, Array]


class Unrolled(NamedTuple):
  """What an interpreter gives the attack at one step.

  Attributes:
    maps: f32[T,B,h,w] (or a mapping of such, by name), differentiable in x. T is the number of
      differentiable maps in this step: 1 for closed-form interpreters, more where an inner
      optimisation looks ahead. None: no map, `distance` stands for it (MASK).
    carry: the state for the next step.
    extra: f32[B], a further loss term (RTS: cross-entropy of its encoder); zeros otherwise.
    logits: f32[B,K] of the pass that made the maps, so that the prediction loss shares it; None
      makes the attack run the classifier itself.
    distance: f32[B], 0 when the target map is reached; None: the attack's own distance, of the
      maps. For interpreters that know better what stands between them and the map.
  """

  maps: PyTree
  carry: Carry
  extra: Array
  logits: Array | None = None
  distance: Array | None = None


class Perturbation(NamedTuple):
  """A perturbation set P(x0), given by its parameters `delta`.

  Attributes:
    init: (x0, keys[B]) -> delta.
    apply: (x0, delta) -> Image, inside [0,1].
    project: (x0, delta) -> delta, the nearest delta that lies in the set.
    penalty: delta -> f32[B], added to the loss (StAdv: flow smoothness, with its weight).
    price: (x0, x) -> f32[B], added likewise, where the set has no bound (C&W: ‖x − x0‖²).
    invert: (x0, x) -> delta of an image near x0, for sets of differences x − x0.
  """

  init: Callable[[Image, Key], PyTree]
  apply: Callable[[Image, PyTree], Image]
  project: Callable[[Image, PyTree], PyTree]
  penalty: Callable[[PyTree], Array]
  price: Callable[[Image, Image], Array] = lambda x0, x: jnp.zeros(len(x), jnp.float32)
  invert: Callable[[Image, Image], PyTree] = lambda x0, x: x - x0


class Terms(NamedTuple):
  """The loss and its parts, f32[B] each, never reduced over the batch."""

  total: Array
  prediction: Array
  interpretation: Array
  penalty: Array


class Batch(NamedTuple):
  """One batch to attack.

  Attributes:
    example_id: i32[B], index in the data set; seeds the example's random numbers.
    x: the clean images.
    target: i32[B], the class the attack wants; untargeted (`attacks.goals`): the one to leave.
    target_map: f32[B,h,w], the map it wants; a mapping by name where `Unrolled.maps` is one.
    is_real: bool[B]; False marks a padding row, which stays as it is and counts nowhere.
  """

  example_id: Array
  x: Image
  target: Label
  target_map: PyTree
  is_real: Array


class AttackState(NamedTuple):
  """What the next step needs, and nothing else."""

  delta: PyTree
  opt_state: PyTree
  carry: Carry
  done: Array  # bool[B]: held still from here on.
  step: Array  # i32[]
  explained: Array | None = None  # i32[B], the class to explain next; None: the batch's target


class Snapshot(NamedTuple):
  """What the reader of a run needs: the iterate just evaluated and what was found there."""

  step: Array  # i32[]
  x: Image
  terms: Terms
  logits: Array
  gradient: Array  # f32[B], the largest |gradient|: 0 moves nothing, NaN ends the example's attack
  explained: Array | None = None  # i32[B], the class explained; None: the batch's target


class Attack(NamedTuple):
  """An attack as pure functions; nothing in it is jitted.

  Attributes:
    init: (batch, delta | None) -> state; None starts from the perturbation's own start.
    step: (batch, state) -> (state, Snapshot); evaluates the state's iterate, then moves it.
    result: (batch, state) -> delta, what the attack delivers after its last step.
    passes: n -> network passes per example of the first n steps; for the accounts.
    result_passes: those of `result`.
    look_passes: those of a step whose gradient nobody uses.
    evaluations: n -> gradients of a loss by the image in the first n steps; for the accounts.
  """

  init: Callable[[Batch, PyTree | None], Any]
  step: Callable[[Batch, Any], tuple[Any, Snapshot]]
  result: Callable[[Batch, Any], PyTree]
  passes: Callable[[int], int] = lambda n: 2 * n
  result_passes: int = 0
  look_passes: int = 1
  evaluations: Callable[[int], int] = lambda n: n


Schedule = tuple[tuple[Attack, int], ...]  # stages: an attack and its number of steps


class PredictionLoss(Protocol):
  """(logits f32[B,K], target i32[B]) -> f32[B], small when the target is predicted."""

  def __call__(self, logits: Array, target: Label) -> Array: ...


class MapDistance(Protocol):
  """(map f32[B,h,w], target map f32[B,h,w]) -> f32[B], 0 when equal."""

  def __call__(self, maps: Map, target_map: Map) -> Array: ...


def tell_pickle(*functions: Any) -> None:
  """Makes pickle's own message, which shows a local function's qualified name, say what to do.

  Not by `__reduce__`: cloudpickle, which takes local functions as they are, would be refused too.
  """
  for function in functions:
    name = getattr(function, '__qualname__', '')
    if '<locals>' in name and function.__module__.startswith('adv2_jax.'):
      function.__qualname__ = (
        f'{function.__name__} of adv2_jax (local functions do not pickle: pickle the params, and '
        'build the classifier or interpreter anew with the call that made it)'
      )


class InputError(ValueError):
  """Bad input: the message names the value, what was expected, and the remedy."""


def example_keys(key: Key, n: int) -> Key:
  """One key per example: `key` itself when it already has shape [n], else folded with 0…n−1."""
  if not jax.dtypes.issubdtype(getattr(key, 'dtype', None), jax.dtypes.prng_key):
    raise InputError(f'key is {key}; expected a typed key such as jax.random.key(0)')
  if key.shape not in ((), (n,)):
    raise InputError(f'key has shape {key.shape}; expected one key, or one per example, ({n},)')
  if key.ndim:
    return key
  return jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(n, dtype=jnp.int32))


# Streams of random numbers. One of these, beyond any id or step, is folded into a key first: so no
# key of one stream is a key of another, whatever ids and steps follow.
ATTACK_STREAM, JUDGE_STREAM, AGAIN_STREAM = (np.uint32(2**31 + n) for n in range(3))


def step_keys(key: Key, example_id: Array, step: int | Array) -> Key:
  """An example's key at an attack step, [B]; its place in the batch does not matter.

  From one key: fold(fold(fold(key, stream), id), step). Keys [B] are the examples' own already.
  """
  if key.ndim:
    return fold_keys(fold_keys(key, ATTACK_STREAM), step)
  base = jax.random.fold_in(key, ATTACK_STREAM)
  return fold_keys(jax.vmap(lambda i: jax.random.fold_in(base, i))(example_id), step)


def widened(v: Array) -> Array:
  """In float32 at least: half precision loses 1e-10, and squares leave its range."""
  return v.astype(jnp.promote_types(v.dtype, jnp.float32))


def fold_keys(keys: Key, i: int | np.uint32 | Array) -> Key:
  """i folded into each of the keys [B]."""
  return jax.vmap(jax.random.fold_in, (0, None))(keys, i)
