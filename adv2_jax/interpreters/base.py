"""What interpreters share: building one from a function, normalising and pooling maps."""

import functools
import inspect
from collections.abc import Callable, Hashable
from typing import Any, ParamSpec, TypeVar

import flax.struct
import jax
import jax.numpy as jnp

from adv2_jax import validate
from adv2_jax.classifier import require
from adv2_jax.types import (
  Array,
  Carry,
  Image,
  InputError,
  Key,
  Label,
  Map,
  PyTree,
  Unrolled,
  example_keys,
  tell_pickle,
)

P = ParamSpec('P')
T = TypeVar('T')
# (params, clf, x, y, keys) -> (map [B,h,w], logits [B,K] or None)
MapFn = Callable[[PyTree, Any, Image, Label, Key], tuple[Map, Array | None]]


class Interpreter(flax.struct.PyTreeNode):
  """An attribution method, as pure functions of its own params; `interpreters.from_map` builds one.

  Attributes:
    params: the interpreter's own weights (RTS: the decoder), () otherwise.
    explain_fn: (params, clf, x, y, keys) -> Map. Honest: the real network, what an analyst sees.
    unroll_fn: (params, clf, x, y, carry, keys) -> Unrolled, inside the attack: the same map made
      differentiable in x (GRAD: through the smoothed ReLU derivative).
    begin_fn: (params, clf, x, y, target_map, keys) -> Carry, before the first attack step; x are
      the clean images.
    name: short name, used in files and tables.
    passes: network passes per example of one `explain`, of one `unroll` with its gradient, and of
      one `unroll` alone (a forward pass counts 1, its backward pass 1 more).
    begin_passes: those of `begin`.
    exact: whether `unroll` gives the very map of `explain`, so that its value can be trusted when
      the best iterate is chosen.
    classes: those it can explain, where it was trained for some only; None: all.
    random: whether its maps depend on the key.
    shares_pass: whether `unroll` calls the classifier itself on x, a pass that `joint` shares.
    settings: what it was built with, hashable, for recipes that need to know (MASK: `MaskConfig`).
    draft_fn: as `explain_fn`, about the same map at less cost, by which an attack chooses between
      its iterates; None: `explain_fn`.
    draft_passes: those of a draft; None: of `explain`.
  """

  params: PyTree
  explain_fn: Callable[..., Map] = flax.struct.field(pytree_node=False)
  unroll_fn: Callable[..., Unrolled] = flax.struct.field(pytree_node=False)
  begin_fn: Callable[..., Carry] = flax.struct.field(pytree_node=False)
  name: str = flax.struct.field(pytree_node=False, default='custom')
  passes: tuple[int, int, int] = flax.struct.field(pytree_node=False, default=(1, 2, 1))
  begin_passes: int = flax.struct.field(pytree_node=False, default=0)
  exact: bool = flax.struct.field(pytree_node=False, default=True)
  classes: tuple[int, ...] | None = flax.struct.field(pytree_node=False, default=None)
  random: bool = flax.struct.field(pytree_node=False, default=False)
  shares_pass: bool = flax.struct.field(pytree_node=False, default=False)
  settings: Hashable = flax.struct.field(pytree_node=False, default=None)
  draft_fn: Callable[..., Map] | None = flax.struct.field(pytree_node=False, default=None)
  draft_passes: int | None = flax.struct.field(pytree_node=False, default=None)

  def __post_init__(self):
    """See `tell_pickle`."""
    tell_pickle(self.explain_fn, self.unroll_fn, self.begin_fn)

  def explain(self, clf: Any, x: Image, y: Label, key: Key) -> Map:
    """The map f32[B,h,w] in [0,1] for class y [B] of images x [B,H,W,C]; key: one, or [B].

    Called outside of a trace it checks its input and jits itself.

    Raises:
      InputError: for input of wrong shape, range or type.
    """
    if validate.traced(self, clf, x, y, key):
      return _map(self, clf, x, y, example_keys(key, len(x)))
    require(clf)
    x = validate.images(x)
    keys = example_keys(key, len(x))
    num_classes = jax.eval_shape(_logits, clf, x).shape[-1]
    y = validate.labels(y, len(x), num_classes, 'y')
    validate.explicable(y, self, 'y')
    return map_jitted(self, clf, x, y, keys)

  def draft(self, clf: Any, x: Image, y: Label, key: Key) -> Map:
    """About the map of `explain`, inside an attack."""
    draft_fn = self.draft_fn or self.explain_fn
    return self._checked(draft_fn(self.params, clf, x, y, example_keys(key, len(x))), x)

  @property
  def passes_of_draft(self) -> int:
    """Network passes per example of one `draft`."""
    return self.passes[0] if self.draft_passes is None else self.draft_passes

  def begin(self, clf: Any, x: Image, y: Label, target_map: PyTree, key: Key) -> Carry:
    """The carry before the first attack step; x are the clean images."""
    return self.begin_fn(self.params, clf, x, y, target_map, example_keys(key, len(x)))

  def unroll(self, clf: Any, x: Image, y: Label, carry: Carry, key: Key) -> Unrolled:
    """The maps of this attack step, differentiable in x."""
    seen = self.unroll_fn(self.params, clf, x, y, carry, example_keys(key, len(x)))
    return seen._replace(maps=self._checked(seen.maps, x))

  def _checked(self, maps: PyTree, x: Image) -> PyTree:
    """Maps in float32, whatever the net computes in.

    Raises:
      InputError: other shapes than […,B,h,w]; single cells, where any two maps are the same and
        every attack perfect.
    """

    def check(maps: Array) -> Array:
      if maps.ndim < 3 or maps.shape[-3] != len(x):
        raise InputError(f'{self.name} made maps of {maps.shape}; expected [B,h,w], B={len(x)}')
      if maps.shape[-2:] == (1, 1):
        raise InputError(
          f'{self.name} makes maps of a single cell from images of {x.shape[1]}×{x.shape[2]} '
          'pixels, which show nothing: take larger images (--image_size), a smaller pool, or '
          'another interpreter, such as grad'
        )
      return maps.astype(jnp.float32)

    return jax.tree.map(check, maps)


def _map(interpreter: Interpreter, clf: Any, x: Image, y: Label, keys: Key) -> Map:
  maps = interpreter.explain_fn(interpreter.params, clf, x, y, keys)
  return interpreter._checked(maps, x)


map_jitted = jax.jit(_map)  # for `attack` too, so that both share a program
_logits = jax.jit(lambda clf, x: clf(x).logits)  # for its shape: jit remembers what it has traced


def one_per_setting(factory: Callable[P, T]) -> Callable[P, T]:
  """The factory, giving the same object for the same settings, however they are written.

  An interpreter's functions are static under jit: a second one would be traced and compiled anew.
  """
  signature, made = inspect.signature(factory), {}

  @functools.wraps(factory)
  def call(*args: P.args, **kwargs: P.kwargs) -> T:
    given = signature.bind(*args, **kwargs)
    given.apply_defaults()
    settings = tuple((type(v), v) for v in given.arguments.values())  # 4.0 is not 4
    try:
      if settings not in made:
        made[settings] = factory(*args, **kwargs)
    except TypeError:  # not hashable: `factory` has something to say of it
      return factory(*args, **kwargs)
    return made[settings]

  return call


def from_map(
  explain: MapFn,
  attacked: MapFn | None = None,
  *,
  params: PyTree = (),
  name: str = 'custom',
  passes: tuple[int, int] | tuple[int, int, int] = (1, 2),
  random: bool = False,
  shares_pass: bool = False,
) -> Interpreter:
  """An interpreter without state between attack steps, from its map function.

  Args:
    explain: (params, clf, x, y, keys[B]) -> (map f32[B,h,w] in [0,1], logits or None). Logits of
      the same pass save the attack a forward pass of its own.
    attacked: the same map made differentiable in x; None when `explain` is so already.
    params: the interpreter's own weights.
    name: short name, used in files and tables.
    passes: of `explain`, and of one attack step with its gradient, see `Interpreter.passes`; third,
      of one without, where that is not as many as `explain` takes.
    random: whether the map depends on the keys.
    shares_pass: whether an attack step calls clf(x), on x itself; see `Interpreter`.
  """
  differentiable = attacked or explain

  def explain_fn(params: PyTree, clf: Any, x: Image, y: Label, keys: Key) -> Map:
    return explain(params, clf, x, y, keys)[0]

  def unroll_fn(params: PyTree, clf: Any, x: Image, y: Label, carry: Carry, keys: Key) -> Unrolled:
    maps, logits = differentiable(params, clf, x, y, keys)
    return Unrolled(maps[None], carry, jnp.zeros(len(x), jnp.float32), logits)

  return Interpreter(
    params,
    explain_fn,
    unroll_fn,
    lambda *_: (),
    name=name,
    passes=passes if len(passes) == 3 else (*passes, passes[0]),
    exact=attacked is None,
    random=random,
    shares_pass=shares_pass,
  )


@one_per_setting
def no_map() -> Interpreter:
  """The interpreter that explains nothing."""

  def unroll(params, clf, x, y, carry, keys) -> Unrolled:
    del params, y, keys
    nothing = jnp.zeros(len(x), jnp.float32)
    return Unrolled(None, carry, nothing, clf(x).logits, nothing)

  explain = lambda params, clf, x, y, keys: jnp.zeros((len(x), 1, 1), jnp.float32)  # noqa: E731
  return Interpreter((), explain, unroll, lambda *_: (), name='none', passes=(0, 2, 1))


def min_max(maps: Array) -> Map:
  """(m − min m) / (max m − min m) per map, [B,h,w] -> [0,1]; a constant map gives zeros."""
  low = jnp.min(maps, axis=(1, 2), keepdims=True)
  spread = jnp.max(maps, axis=(1, 2), keepdims=True) - low
  flat = spread <= 0
  # Clipped, because a compiler may compute `maps` twice, rounded differently, and go below `low`.
  return jnp.where(flat, 0.0, jnp.clip((maps - low) / jnp.where(flat, 1.0, spread), 0, 1))


def avg_pool(maps: Array, size: int) -> Array:
  """Means over size×size cells, [B,H,W] -> [B,H/size,W/size]; a ragged rim is cut off."""
  if not 1 <= size <= min(maps.shape[1:]):
    raise InputError(
      f'pool is {size}; expected 1 to {min(maps.shape[1:])} pixels for images of this size'
    )
  b, h, w = maps.shape[0], maps.shape[1] // size, maps.shape[2] // size
  cells = maps[:, : h * size, : w * size].reshape(b, h, size, w, size)
  return jnp.mean(cells, axis=(2, 4))


def class_logit(logits: Array, y: Label) -> Array:
  """z_y, [B]."""
  return jnp.take_along_axis(logits, y[:, None], axis=-1)[:, 0]


def input_gradient(
  forward: Callable[[Image], Array], x: Image, score: Callable[[Array], Array]
) -> tuple[Array, Array]:
  """∂(Σ_b score(logits)_b)/∂x [B,H,W,C] and the logits, from one forward and one backward pass."""

  def total(x: Image) -> tuple[Array, Array]:
    logits = forward(x)
    return jnp.sum(score(logits)), logits

  return jax.grad(total, has_aux=True)(x)
