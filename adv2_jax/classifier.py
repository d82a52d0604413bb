"""A classifier as the attack sees it: parameters, a pure apply function, a head, a surrogate.

The library knows no framework. `from_fn` takes plain functions (Equinox: see BUILD.md),
`from_linen` and `from_nnx` adapt Flax modules. Build a classifier once and keep it: its functions
are static under `jit` and are compared by identity.
"""

import inspect
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from adv2_jax import images
from adv2_jax.nets.activations import soft_relu
from adv2_jax.types import Array, Image, InputError, Outputs, PyTree

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class Classifier(flax.struct.PyTreeNode):
  """A classifier f and what the interpreters need of it.

  Attributes:
    params: a pytree of arrays; an argument of every jitted function, never captured.
    apply_fn: (params, x) -> Outputs, x f32[B,H,W,C] in [0,1]; normalisation is inside.
    head_fn: (params, features) -> logits f32[B,K], with features = taps['features'].
    surrogate_fn: like apply_fn, same parameters and same values, but with a ReLU derivative that is
      smooth, so that GRAD's map can be differentiated; it may take `act=`, the activation to use.
  """

  params: PyTree
  apply_fn: Callable[[PyTree, Image], Outputs] = flax.struct.field(pytree_node=False)
  head_fn: Callable[[PyTree, Array], Array] = flax.struct.field(pytree_node=False)
  surrogate_fn: Callable[..., Outputs] | None = flax.struct.field(pytree_node=False, default=None)

  def __call__(self, x: Image) -> Outputs:
    """Logits f32[B,K] and taps of the images x f32[B,H,W,C] in [0,1]."""
    return self.apply_fn(self.params, x)

  def head(self, features: Array) -> Array:
    """Logits f32[B,K] of the features f32[B,h,w,F]."""
    return self.head_fn(self.params, features)

  @property
  def takes_act(self) -> bool:
    """Whether the surrogate can be told which activation to use."""
    fn = self.surrogate_fn
    return fn is not None and 'act' in inspect.signature(fn).parameters

  def surrogate(self, x: Image, act: Callable[[Array], Array] = soft_relu) -> Outputs:
    """As calling the classifier, with the smoothed ReLU derivative `act` in the backward pass."""
    if self.surrogate_fn is None:
      return self(x)
    if act is soft_relu:
      return self.surrogate_fn(self.params, x)
    if not self.takes_act:
      raise InputError(
        'this surrogate_fn has no `act` argument, so tau and form cannot be changed: '
        'write it as surrogate_fn(params, x, act=soft_relu), or leave tau and form as they are'
      )
    return self.surrogate_fn(self.params, x, act=act)


def from_fn(
  params: PyTree,
  apply_fn: Callable[[PyTree, Image], Any],
  head_fn: Callable[[PyTree, Array], Array],
  surrogate_fn: Callable[..., Any] | None = None,
) -> Classifier:
  """A classifier from plain functions; see `Classifier` for what each must do.

  `apply_fn` returns `Outputs`, or a pair (logits, taps). Warns when there is no surrogate, because
  GRAD's map then has the derivative of a ReLU net's gradient, which is almost everywhere zero.
  """
  if surrogate_fn is None:
    warnings.warn(
      'no surrogate_fn: GRAD will attack with the plain ReLU derivative, whose own derivative is '
      'zero almost everywhere; give the same net with adv2_jax.nets.soft_relu as activation',
      stacklevel=2,
    )

  def as_outputs(fn: Callable[..., Any]) -> Callable[..., Outputs]:
    def call(params: PyTree, x: Image, **kwargs: Any) -> Outputs:
      out = fn(params, x, **kwargs)
      if not isinstance(out, tuple | list) or len(out) != 2 or not isinstance(out[1], Mapping):
        raise InputError(
          f'{getattr(fn, "__name__", "apply_fn")} returned {_kind(out)}; expected the pair '
          "(logits, taps) with taps a dict, such as {'features': …}, as from apply_fn"
        )
      return Outputs(*out)

    call.__signature__ = inspect.signature(fn)  # type: ignore[attr-defined]  # keeps `act` visible
    return call

  return Classifier(
    params, as_outputs(apply_fn), head_fn, surrogate_fn and as_outputs(surrogate_fn)
  )


def _kind(value: Any) -> str:
  inside = ', '.join(type(v).__name__ for v in value) if isinstance(value, tuple | list) else ''
  return f'({inside})' if inside else f'a {type(value).__name__}'


def _normaliser(mean: Sequence[float], std: Sequence[float]) -> Callable[[Image], Array]:
  if not (np.asarray(std) > 0).all():
    raise InputError(f'std is {tuple(std)}; expected positive numbers, one per channel')
  return lambda x: images.normalised(x, mean, std)


def _is_relu(act: Callable[[Array], Array]) -> bool:
  z = np.array([-3.0, -0.5, -1e-3, 0.0, 1e-3, 0.5, 7.0], np.float32)
  with jax.ensure_compile_time_eval():
    return bool((np.asarray(act(jnp.asarray(z))) == np.maximum(z, 0)).all())


def from_linen(
  module: Any,
  variables: PyTree,
  *,
  mean: Sequence[float] = IMAGENET_MEAN,
  std: Sequence[float] = IMAGENET_STD,
) -> Classifier:
  """A classifier from a Linen module whose call gives Outputs and which has a `head` method.

  The surrogate is the same module with its field `act` replaced by `soft_relu` where that is ReLU
  (another activation, such as GELU, stays as it is); a module without such a field has none (and
  `from_fn`'s warning is given).
  """
  normalise = _normaliser(mean, std)

  def apply_fn(params: PyTree, x: Image) -> Outputs:
    return Outputs(*module.apply(params, normalise(x)))

  def head_fn(params: PyTree, features: Array) -> Array:
    return module.apply(params, features, method='head')

  def surrogate_fn(params: PyTree, x: Image, act: Callable[[Array], Array] = soft_relu) -> Outputs:
    smooth = module.clone(act=act) if _is_relu(module.act) else module
    return Outputs(*smooth.apply(params, normalise(x)))

  return from_fn(variables, apply_fn, head_fn, surrogate_fn if hasattr(module, 'act') else None)


def from_nnx(
  model: Any,
  *,
  mean: Sequence[float] = IMAGENET_MEAN,
  std: Sequence[float] = IMAGENET_STD,
) -> Classifier:
  """A classifier from an NNX module: split once here, merged inside the pure functions.

  `model(x)` gives Outputs, `model.head(features)` logits; a field `act`, when there is one, makes
  the surrogate, as in `from_linen`.
  """
  from flax import nnx

  model.eval()
  graph, state = nnx.split(model)
  normalise = _normaliser(mean, std)

  def apply_fn(params: PyTree, x: Image) -> Outputs:
    return Outputs(*nnx.merge(graph, params)(normalise(x)))

  def head_fn(params: PyTree, features: Array) -> Array:
    return nnx.merge(graph, params).head(features)

  def surrogate_fn(params: PyTree, x: Image, act: Callable[[Array], Array] = soft_relu) -> Outputs:
    smooth = nnx.merge(graph, params)
    for _, node in nnx.iter_graph(smooth):  # inner blocks hold the activation too
      if hasattr(node, 'act') and _is_relu(node.act):
        node.act = act
    return Outputs(*smooth(normalise(x)))

  return from_fn(state, apply_fn, head_fn, surrogate_fn if hasattr(model, 'act') else None)


def check_classifier(clf: Classifier, x: Image, *, tolerance: float = 1e-3) -> None:
  """Finds out whether a classifier can be attacked; run it once on a few images of your own.

  Checks, in this order: the range of x, that the output is finite logits and not probabilities,
  that two calls agree, that an example's logits do not depend on the others in its batch, that
  `head` makes the logits from the features, and that the gradient by the image is not zero.

  Args:
    clf: the classifier.
    x: f32[B,H,W,C] in [0,1], B ≥ 2.
    tolerance: of the comparisons, relative to the largest logit.

  Raises:
    InputError: the first check that fails, and what to do.
  """
  from adv2_jax import validate

  x = validate.images(x)
  if len(x) < 2:
    raise InputError('check_classifier needs at least 2 images, to see whether examples interact')
  fresh = lambda fn: jax.jit(lambda *args: fn(*args))  # noqa: E731  # traced anew
  forward = fresh(Classifier.__call__)
  out = forward(clf, x)
  logits = np.asarray(out.logits)
  if logits.ndim != 2 or len(logits) != len(x):
    raise InputError(f'logits have shape {logits.shape}; expected [B,K] with B={len(x)}')
  if not np.isfinite(logits).all():
    raise InputError(
      'logits are not finite; check the weights, and that x in [0,1] is what apply_fn expects'
    )
  if logits.min() >= 0 and np.abs(logits.sum(-1) - 1).max() < 1e-3:
    raise InputError('the output is probabilities; return the logits, before the softmax')
  scale = tolerance * max(1.0, float(np.abs(logits).max()))
  again = [call(clf, x).logits for call in (forward, fresh(Classifier.__call__))]
  if np.abs(np.asarray(again) - logits).max() > scale:
    raise InputError(
      'two calls on the same images differ; switch dropout and other randomness off (eval mode)'
    )
  alone = np.concatenate([np.asarray(forward(clf, x[i : i + 1]).logits) for i in range(len(x))])
  if np.abs(alone - logits).max() > scale:
    raise InputError(
      'the logits of an example depend on the others in its batch; use running statistics in batch '
      'norm (eval mode)'
    )
  if 'features' not in out.taps:
    raise InputError(f"taps hold {sorted(out.taps)}; expected 'features', the head's input")
  if np.abs(np.asarray(clf.head(out.taps['features'])) - logits).max() > scale:
    raise InputError("head_fn(params, taps['features']) differs from the logits; it must make them")
  for name, call in (('apply_fn', Classifier.__call__), ('surrogate_fn', Classifier.surrogate)):

    def total(clf: Classifier, x: Image, call: Callable = call) -> tuple[Array, Array]:
      logits = call(clf, x).logits
      return jnp.sum(logits[:, 0]), logits

    g, values = jax.jit(jax.grad(total, argnums=1, has_aux=True))(clf, x)
    if np.abs(np.asarray(values) - logits).max() > scale:
      raise InputError(f'the logits of {name} differ from those of apply_fn; only derivatives may')
    g = np.asarray(g)
    if not np.isfinite(g).all() or not np.abs(g).max(axis=(1, 2, 3)).all():
      raise InputError(
        f'the gradient of {name} by the image is zero or not finite; avoid rounding, argmax and '
        'stop_gradient on the way from x to the logits'
      )
