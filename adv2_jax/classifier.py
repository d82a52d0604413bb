"""A classifier as the attack sees it: parameters, a pure apply function, a head, a surrogate.

The library knows no framework. `from_fn` takes plain functions (Equinox: see BUILD.md),
`from_linen` and `from_nnx` adapt Flax modules. Build a classifier once and keep it: its functions
are static under `jit` and are compared by identity.
"""

import contextlib
import dataclasses
import functools
import inspect
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from adv2_jax import images, validate
from adv2_jax.nets.activations import kinks, soft_relu, softened
from adv2_jax.types import Array, Image, InputError, Outputs, PyTree, tell_pickle

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

PLAIN = (
  'no surrogate_fn: GRAD will attack with the plain ReLU derivative, whose own derivative is '
  'zero almost everywhere; give the same net with adv2_jax.nets.soft_relu as activation (a Flax '
  'module: a field act that its layers use)'
)
_RETURNS = (
  "in the call return logits, {'features': a}; in head(a) return the logits of a [B,h,w,F], "
  'such as fc(a.mean((1, 2)))'
)


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

  def __post_init__(self):
    """See `tell_pickle`."""
    tell_pickle(self.apply_fn, self.head_fn, self.surrogate_fn)

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

  `apply_fn` returns `Outputs`, or a pair (logits, taps). Logits become float32 whatever the net
  computes in; NumPy arrays among the parameters are copied. Warns when there is no surrogate,
  because GRAD's map then has the derivative of a ReLU net's gradient, which is almost everywhere
  zero.

  Raises:
    InputError: apply_fn is no function; when traced, one that returns something else.
  """
  if not callable(apply_fn) or isinstance(apply_fn, nn.Module | nnx.Module):
    raise InputError(
      f'apply_fn is {_described(apply_fn)}, or give a function (params, x) -> (logits, taps)'
    )
  if surrogate_fn is None:
    warnings.warn(PLAIN, stacklevel=2)
  name = getattr(apply_fn, '__name__', 'apply_fn')
  clf = _memoised(_from_fn, name, apply_fn, head_fn, surrogate_fn)
  return clf.replace(params=_snapshot(params))


def _snapshot(params: PyTree) -> PyTree:
  """The parameters as they are now: NumPy arrays, which may change in place, are copied."""
  return jax.tree.map(lambda v: jnp.array(v) if isinstance(v, np.ndarray) else v, params)


def _classifier(
  name: str,
  apply_fn: Callable[..., Any],
  head_fn: Callable[..., Any],
  surrogate_fn: Callable[..., Any] | None,
) -> Classifier:
  """The functions, their results checked and in float32; `name` is what a message calls them."""

  def outputs_of(fn: Callable[..., Any], name: str) -> Callable[..., Outputs]:
    def call(params: PyTree, x: Image, **kwargs: Any) -> Outputs:
      out = fn(params, x, **kwargs)
      if not isinstance(out, tuple | list) or len(out) != 2 or not isinstance(out[1], Mapping):
        raise InputError(
          f'{name} returned {_kind(out)}; expected the pair (logits, taps) with taps a dict: '
          f'{_RETURNS}'
        )
      return Outputs(_logits(out[0], x, name), out[1])

    call.__signature__ = inspect.signature(fn)  # type: ignore[attr-defined]  # keeps `act` visible
    return call

  def head(params: PyTree, features: Array) -> Array:
    if not callable(head_fn):
      raise InputError(f'{name} has no head, which makes the logits of the features: {_RETURNS}')
    return _logits(head_fn(params, features), features, f'the head of {name}')

  surrogate = surrogate_fn and outputs_of(
    surrogate_fn, getattr(surrogate_fn, '__name__', 'surrogate_fn')
  )
  return Classifier((), outputs_of(apply_fn, name), head, surrogate)


def _logits(logits: Any, made_of: Array, name: str) -> Array:
  """The logits [B,K] in float32; in float64 only where that is what they were made of."""
  if not isinstance(logits, jax.Array | np.ndarray) or logits.ndim != 2:
    raise InputError(f'{name} returned {_kind(logits)} for logits; expected [B,K]: {_RETURNS}')
  return jnp.asarray(logits, jnp.promote_types(made_of.dtype, jnp.float32))


def _kind(value: Any) -> str:
  if isinstance(value, jax.Array | np.ndarray):
    return f'an array {list(value.shape)}'
  inside = ', '.join(type(v).__name__ for v in value) if isinstance(value, tuple | list) else ''
  return f'({inside})' if inside else f'a {type(value).__name__}'


@functools.lru_cache(maxsize=64)
def _from_fn(*functions: Any) -> Classifier:
  """The same functions give the same static ones, so nothing is traced anew."""
  return _classifier(*functions)


# --- Flax -----------------------------------------------------------------------------------------

# Arguments by which modules are told that they are not being trained.
_EVALUATION = {
  'train': False,
  'training': False,
  'is_training': False,
  'deterministic': True,
  'use_running_average': True,
}
_NAMES_OF_ACT = re.compile('(.*_)?(act|activation|nonlinearity)(_fn|_func|_layer)?')


def _arguments(call: Callable[..., Any], name: str) -> dict[str, bool]:
  """What a module's method is given beside its input: the values for evaluation that it takes."""
  taken = dict([*inspect.signature(call).parameters.items()][2:])  # without self, x
  required = [
    k
    for k, p in taken.items()
    if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
  ]
  if unknown := [k for k in required if k not in _EVALUATION]:
    raise InputError(
      f'{name} needs the argument {unknown[0]!r} beside its input; give it a default, or use '
      'from_fn(params, lambda p, x: …, …)'
    )
  return {k: v for k, v in _EVALUATION.items() if k in taken}


def _optional(call: Callable[..., Any], argument: str) -> bool:
  return inspect.signature(call).parameters[argument].default is None


def _normaliser(mean: Sequence[float], std: Sequence[float]) -> Callable[[Image], Array]:
  return lambda x: images.normalised(x, mean, std)


def _statistics(mean: Any, std: Any) -> tuple[tuple[float, ...], tuple[float, ...]]:
  mean = validate.per_channel('mean', mean, std=False)
  return mean, validate.per_channel('std', std, len(mean), std=True)


def _memoised(make: Any, *key: Any) -> Any:
  """make(*key) of a `functools.lru_cache`, also where the key has no hash."""
  try:
    return make(*key)
  except TypeError as error:
    if 'unhashable' not in str(error):
      raise
    return make.__wrapped__(*key)


def _softened_of(owner: str, name: str, value: Any, act: Callable[[Array], Array]) -> Any:
  """What stands in the surrogate for an activation that a module has; warns where none can."""
  if getattr(value, 'softened', False):  # handed on by the block around, or called twice
    return value
  makes_layers = isinstance(getattr(value, 'func', value), type)  # a class, or a partial of one
  if makes_layers or isinstance(value, nn.Module | nnx.Module) or kinks(value) is None:
    shown = getattr(value, '__name__', type(value).__name__)
    warnings.warn(
      f'{owner}.{name} is {shown}, whose kinks cannot be told: GRAD will attack with its plain '
      'derivative; take an activation that is linear in pieces, such as leaky_relu, or from_fn',
      stacklevel=2,
    )
    return value
  return softened(value, act)


def _is_elementwise(value: Any) -> bool:
  """Whether a layer of a Sequential is an activation: no module, no pooling."""
  is_module = isinstance(value, nn.Module | nnx.Module)
  return callable(value) and not is_module and kinks(value) is not None


def _is_act(name: str, value: Any) -> bool:
  return callable(value) and _NAMES_OF_ACT.fullmatch(name) is not None


@contextlib.contextmanager
def _softened_linen(act: Callable[[Array], Array]) -> Iterator[list[str]]:
  """Within, modules have their activations softened by `act`; gives the names of those met."""
  met: list[str] = []

  def soften(call: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
    module = context.module  # a clone made for this call
    for field in dataclasses.fields(module):
      value = getattr(module, field.name, None)
      if _is_act(field.name, value):
        met.append(field.name)
        new = _softened_of(type(module).__name__, field.name, value, act)
        object.__setattr__(module, field.name, new)  # modules are frozen
    if isinstance(module, nn.Sequential):
      layers = [v if isinstance(v, nn.Module) else softened(v, act) for v in module.layers]
      met.extend('layers' for v in module.layers if _is_elementwise(v))
      object.__setattr__(module, 'layers', tuple(layers))
    return call(*args, **kwargs)

  with nn.intercept_methods(soften):
    yield met


def from_linen(
  module: Any,
  variables: PyTree,
  *,
  mean: Sequence[float] = IMAGENET_MEAN,
  std: Sequence[float] = IMAGENET_STD,
) -> Classifier:
  """A classifier from a Linen module whose call gives Outputs and which has a `head`.

  The surrogate is the same module with every activation's kinks smoothed (`nets.activations.
  softened`): of the fields `act`, `activation`, `act_fn` and the like, inner blocks' included, and
  of the functions in `nn.Sequential`. One without kinks, such as GELU, stays as it is; one whose
  kinks cannot be told is warned of. What a module calls without a field, such as `nn.relu(x)`,
  cannot be seen: where there is nothing else, there is no surrogate (and `from_fn`'s warning is
  given). Arguments `train`, `training`, `deterministic` and the like are given their values for
  evaluation. The same module gives the same static functions, so nothing is traced anew; for new
  parameters of the same kind, `clf.replace(params=variables)` does as well.

  Args:
    module: unbound.
    variables: {'params': …} and further collections, such as 'batch_stats'.
    mean: per channel, of images in [0,1].
    std: as mean.

  Raises:
    InputError: not a Linen module; one that needs further arguments; mean or std out of range; when
      traced, one that returns something else.
  """
  if not isinstance(module, nn.Module):
    raise InputError(f'module is {_described(module)}')
  clf = _memoised(_from_linen, module, *_statistics(mean, std))
  if clf.surrogate_fn is None:
    warnings.warn(PLAIN, stacklevel=2)
  return clf.replace(params=_snapshot(variables))


@functools.lru_cache(maxsize=64)
def _from_linen(module: Any, mean: tuple[float, ...], std: tuple[float, ...]) -> Classifier:
  normalise = _normaliser(mean, std)
  name = type(module).__name__
  evaluation = _arguments(type(module).__call__, name)
  fields = {f.name: getattr(module, f.name) for f in dataclasses.fields(module)}
  # `nn.merge_param` takes a field or an optional argument of the same name, never both.
  optional = {k for k in evaluation if _optional(type(module).__call__, k)}
  modes = {k for k in fields.keys() & _EVALUATION if k not in optional or fields[k] is not None}
  module = module.clone(**{k: _EVALUATION[k] for k in modes})
  evaluation = {k: v for k, v in evaluation.items() if k not in optional & modes}
  head = getattr(type(module), 'head', None)
  of_head = _arguments(head, f'{name}.head') if callable(head) else {}

  def apply_fn(params: PyTree, x: Image) -> Any:
    return module.apply(params, normalise(x), **evaluation)

  def head_fn(params: PyTree, features: Array) -> Array:
    def call(module: Any, features: Array) -> Array:
      if not callable(getattr(module, 'head', None)):
        raise InputError(f'{name} has no head, which makes the logits of the features: {_RETURNS}')
      return module.head(features, **of_head)

    return module.apply(params, features, method=call)

  def surrogate_fn(params: PyTree, x: Image, act: Callable[[Array], Array] = soft_relu) -> Any:
    with _softened_linen(act):
      return module.apply(params, normalise(x), **evaluation)

  surrogate = surrogate_fn if _has_activations(module, evaluation, len(mean)) else None
  return _classifier(name, apply_fn, head_fn, surrogate)


def _has_activations(module: nn.Module, evaluation: dict[str, Any], channels: int) -> bool:
  """Whether there is a field to soften; warns of those that cannot be."""
  own = {f.name: getattr(module, f.name, None) for f in dataclasses.fields(module)}
  if acts := {k: v for k, v in own.items() if _is_act(k, v)}:
    for name, value in acts.items():
      _softened_of(type(module).__name__, name, value, soft_relu)
    return True
  x = jax.ShapeDtypeStruct((1, 224, 224, channels), jnp.float32)
  # A module that takes no such image shows what is wrong when it is used.
  with _softened_linen(soft_relu) as met, contextlib.suppress(Exception):
    jax.eval_shape(lambda key, x: module.init(key, x, **evaluation), jax.random.key(0), x)
  return bool(met)


def from_nnx(
  model: Any,
  *,
  mean: Sequence[float] = IMAGENET_MEAN,
  std: Sequence[float] = IMAGENET_STD,
) -> Classifier:
  """A classifier from a copy of an NNX module as it is now, in evaluation mode.

  `model(x)` gives Outputs, `model.head(features)` logits. The model stays as it was, and what
  happens to it later does not reach the classifier. Surrogate, arguments, errors: as `from_linen`.
  """
  if not isinstance(model, nnx.Module):
    raise InputError(f'model is {_described(model)}')
  statistics = _statistics(mean, std)
  copy = nnx.clone(model)
  copy.eval()
  graph, state = nnx.split(copy)
  has_activations = _soften_nnx(copy, soft_relu)
  clf = _memoised(_from_nnx, type(model), graph, *statistics, has_activations)
  if clf.surrogate_fn is None:
    warnings.warn(PLAIN, stacklevel=2)
  return clf.replace(params=_snapshot(state))


def _soften_nnx(model: Any, act: Callable[[Array], Array]) -> bool:
  """Softens the activations of an NNX module in place; says whether it has any."""
  found = False
  for _, node in [*nnx.iter_graph(model)]:
    if isinstance(node, nnx.List):  # of nnx.Sequential
      for i, value in enumerate(node):
        if _is_elementwise(value):
          found, node[i] = True, softened(value, act)
    elif isinstance(node, nnx.Module):
      for name, value in [*vars(node).items()]:
        if _is_act(name, value):
          found = True
          setattr(node, name, _softened_of(type(node).__name__, name, value, act))
  return found


@functools.lru_cache(maxsize=64)
def _from_nnx(
  kind: type, graph: Any, mean: tuple[float, ...], std: tuple[float, ...], has_activations: bool
) -> Classifier:
  normalise = _normaliser(mean, std)
  name = kind.__name__
  evaluation = _arguments(kind.__call__, name)
  head = getattr(kind, 'head', None)
  of_head = _arguments(head, f'{name}.head') if callable(head) else {}

  def apply_fn(params: PyTree, x: Image) -> Any:
    return nnx.merge(graph, params)(normalise(x), **evaluation)

  def head_fn(params: PyTree, features: Array) -> Array:
    model = nnx.merge(graph, params)
    if not callable(getattr(model, 'head', None)):
      raise InputError(f'{name} has no head, which makes the logits of the features: {_RETURNS}')
    return model.head(features, **of_head)

  def surrogate_fn(params: PyTree, x: Image, act: Callable[[Array], Array] = soft_relu) -> Any:
    model = nnx.merge(graph, params)
    _soften_nnx(model, act)
    return model(normalise(x), **evaluation)

  return _classifier(name, apply_fn, head_fn, surrogate_fn if has_activations else None)


# --- checks ---------------------------------------------------------------------------------------


def require(clf: Any) -> Classifier:
  """The classifier itself; InputError with the remedy for anything else."""
  if isinstance(clf, Classifier):
    return clf
  raise InputError(f'the classifier is {_described(clf)}')


def _described(value: Any) -> str:
  """What a thing is, never its contents, and which function makes a classifier of it."""
  name = type(value).__name__
  if isinstance(value, type):
    return f'the class {value.__name__}; give an instance of it'
  if isinstance(value, nn.Module):
    return f'a Linen module, {name}; make a classifier of it: from_linen(module, variables)'
  if isinstance(value, nnx.Module):
    return f'an NNX module, {name}; make a classifier of it: from_nnx(model)'
  if callable(value):
    return 'a function; make a classifier of it: from_fn(params, apply_fn, head_fn, surrogate_fn)'
  return f'of type {name}; expected what load_classifier, from_linen, from_nnx or from_fn gives'


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
  require(clf)
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
