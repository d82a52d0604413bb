"""Joint: several interpreters at once, as one; the attack on an ensemble that compares maps."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from adv2_jax import losses, validate
from adv2_jax.interpreters.base import Interpreter
from adv2_jax.types import (
  Array,
  Carry,
  Image,
  InputError,
  Key,
  Label,
  Map,
  Outputs,
  PyTree,
  Unrolled,
)

# w_k, found on the built-in scenes: GRAD and CAM yield last, MASK's distance is the largest.
WEIGHTS = {'grad': 4 / 3, 'cam': 2.0, 'mask': 0.1, 'unrolled_mask': 1.0, 'rts': 1.0}


class JointCarry(NamedTuple):
  """What the parts keep between attack steps, and the maps that they are to come close to."""

  parts: dict[str, Carry]
  target_map: dict[str, Map]


class _SeenOnce:
  """A classifier that has seen x: asked for this very x again, it gives the same outputs.

  So all parts share one forward pass, and their gradients one backward pass.
  """

  def __init__(self, clf: Any, x: Image):
    self._clf, self._x = clf, x
    self._outputs: Outputs | None = None

  def __call__(self, x: Image) -> Outputs:
    if x is not self._x:
      return self._clf(x)
    if self._outputs is None:
      self._outputs = self._clf(x)
    return self._outputs

  @property
  def logits(self) -> Array | None:
    """f32[B,K] of x; None if nobody asked."""
    return None if self._outputs is None else self._outputs.logits

  def __getattr__(self, name: str) -> Any:
    return getattr(self._clf, name)


def joint(
  parts: Mapping[str, Interpreter], weights: Mapping[str, float] | None = None
) -> Interpreter:
  """All of `parts` at once, itself an interpreter: params, maps and target maps go by name.

      l_int = Σ_k w_k · d_k(g_k(x; f, t), m_t^k)

  d_k is the part's own distance (MASK), else √mse of its maps. One forward pass, and one backward
  pass, serve all parts that look at the real net; each keeps its own way besides: GRAD its
  surrogate, MASK its looks, RTS its further loss term.

  Args:
    parts: interpreters by a name of your choice; `target_map` is a mapping with these names, or
      None for the benign maps.
    weights: w_k by name, above 0; None: `WEIGHTS` by the interpreters' own names, 1 for others.

  Raises:
    InputError: fewer than two parts, something else among them, or a weight that makes no sense.
  """
  if not isinstance(parts, Mapping) or len(parts) < 2:
    what = ', '.join(parts) or 'nothing' if isinstance(parts, Mapping) else validate.kind(parts)
    raise InputError(
      f'joint of {what}; expected a mapping of two interpreters or more, such as '
      "{'grad': adv2.interpreters.grad(), 'cam': adv2.interpreters.cam()}; attack one by itself"
    )
  for name, part in parts.items():
    if not isinstance(part, Interpreter) or isinstance(part.settings, _Parts):
      what = 'a joint itself' if isinstance(part, Interpreter) else validate.kind(part)
      raise InputError(f'joint: {name!r} is {what}; expected an Interpreter, such as grad()')
  given = {} if weights is None else dict(weights)
  for name, weight in given.items():
    if name not in parts:
      raise InputError(f'joint: a weight for {name!r}; the parts are {", ".join(parts)}')
    if not 0 < weight < float('inf'):
      raise InputError(f'joint: the weight of {name!r} is {weight}; expected a number above 0')
  names = sorted(parts)  # as jax orders a mapping's leaves
  chosen = tuple(
    float(given.get(n, 1.0 if weights else WEIGHTS.get(parts[n].name, 1.0))) for n in names
  )
  settings = _Parts(tuple((n, parts[n].replace(params=())) for n in names), chosen)
  saved = max(0, sum(p.shares_pass for p in parts.values()) - 1)
  looked, unrolled, alone = (sum(p.passes[k] for p in parts.values()) for k in range(3))
  known = [set(p.classes) for p in parts.values() if p.classes is not None]
  if known and not set.intersection(*known):
    raise InputError(f'joint of {", ".join(parts)}: there is no class that all of them know')
  explain, unroll, begin, draft = _functions(settings)
  return Interpreter(
    {n: parts[n].params for n in names},
    explain,
    unroll,
    begin,
    name='joint',
    passes=(looked, unrolled - 2 * saved, alone - saved),
    begin_passes=sum(p.begin_passes for p in parts.values()),
    exact=all(p.exact for p in parts.values()),
    classes=tuple(sorted(set.intersection(*known))) if known else None,
    random=any(p.random for p in parts.values()),
    settings=settings,
    # Else a part that is random and has none would be drawn as often as the others.
    draft_fn=draft if all(p.draft_fn or not p.random for p in parts.values()) else None,
    draft_passes=sum(p.passes_of_draft for p in parts.values()),
  )


def with_parts(
  interpreter: Interpreter, change: Callable[[Interpreter], Interpreter]
) -> Interpreter:
  """The joint of the changed parts, whose usual weights go with them; others stay as they are."""
  if not isinstance(interpreter.settings, _Parts):
    return interpreter
  made, weights = {}, {}
  for (n, part), weight in zip(
    interpreter.settings.parts, interpreter.settings.weights, strict=True
  ):
    made[n] = change(part.replace(params=interpreter.params[n]))
    weights[n] = weight * WEIGHTS.get(made[n].name, 1.0) / WEIGHTS.get(part.name, 1.0)
  return joint(made, weights)


class _Parts(NamedTuple):
  """The parts without their params, and their weights; hashable."""

  parts: tuple[tuple[str, Interpreter], ...]
  weights: tuple[float, ...]


@functools.cache
def _functions(settings: _Parts) -> tuple[Callable[..., Any], ...]:
  """Memoised because an interpreter's functions are static: new ones would trace all anew."""

  def parts(params: PyTree) -> dict[str, Interpreter]:
    return {name: part.replace(params=params[name]) for name, part in settings.parts}

  def explain(params: PyTree, clf: Any, x: Image, y: Label, keys: Key) -> dict[str, Map]:
    seen = _SeenOnce(clf, x)
    return {n: p.explain_fn(p.params, seen, x, y, keys) for n, p in parts(params).items()}

  def draft(params: PyTree, clf: Any, x: Image, y: Label, keys: Key) -> dict[str, Map]:
    seen = _SeenOnce(clf, x)
    return {n: p.draft(seen, x, y, keys) for n, p in parts(params).items()}

  def begin(
    params: PyTree, clf: Any, x: Image, y: Label, target_map: Mapping[str, Map], keys: Key
  ) -> JointCarry:
    seen = _SeenOnce(clf, x)
    begun = {n: p.begin(seen, x, y, target_map[n], keys) for n, p in parts(params).items()}
    return JointCarry(begun, dict(target_map))

  def unroll(
    params: PyTree, clf: Any, x: Image, y: Label, carry: JointCarry, keys: Key
  ) -> Unrolled:
    seen_once = _SeenOnce(clf, x)
    seen = {n: p.unroll(seen_once, x, y, carry.parts[n], keys) for n, p in parts(params).items()}
    distances = [_distance(v, carry.target_map[n]) for n, v in seen.items()]
    distance = sum(w * d for w, d in zip(settings.weights, distances, strict=True))
    extra = sum(v.extra for v in seen.values())
    after = JointCarry({n: v.carry for n, v in seen.items()}, carry.target_map)
    logits = seen_once.logits
    if logits is None:  # no part looked at the real net
      logits = next((v.logits for v in seen.values() if v.logits is not None), None)
    return Unrolled(None, after, jnp.asarray(extra), logits, jnp.asarray(distance))

  return explain, unroll, begin, draft


def _distance(seen: Unrolled, target_map: Map) -> Array:
  """A part's own, else √mse, the mean over its look-ahead maps, [B]."""
  if seen.distance is not None:
    return seen.distance
  return jax.vmap(losses.map_rms, in_axes=(0, None))(seen.maps, target_map).mean(0)
