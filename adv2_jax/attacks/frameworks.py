"""Every framework's recipes by name: where an attack searches, and how.

pgd: the L∞ ball, or with norm 'l2' the L2 ball. stadv: flows (`stadv`). cw: the closest image in L2
(`cw`).
"""

import math

from adv2_jax.attacks import baselines, cw, presets, stadv
from adv2_jax.attacks.goals import DECEIVE, Goal
from adv2_jax.attacks.presets import Recipe
from adv2_jax.types import InputError

NAMES = ('pgd', 'stadv', 'cw')
NORMS = ('linf', 'l2')
PRESETS = ('fast', 'thorough', 'authors', *baselines.RECIPES)
EPSILON = 0.031  # of the L∞ ball, where none is given


def has_radius(framework: str) -> bool:
  """Whether ε says how far it may go."""
  return framework == 'pgd'


def check(
  framework: str = 'pgd',
  norm: str = 'linf',
  *,
  tau: float | None = None,
  kappa: float | None = None,
  has_epsilon: bool | None = None,
) -> None:
  """InputError for settings that do not go together; `has_epsilon` None: not asked."""
  if framework not in NAMES:
    raise InputError(f'framework is {framework!r}; expected one of {", ".join(NAMES)}')
  if norm not in NORMS:
    raise InputError(f'norm is {norm!r}; expected one of {", ".join(NORMS)}')
  if norm == 'l2' and framework != 'pgd':
    said = 'is in L2 by itself' if framework == 'cw' else 'moves pixels, which has no norm'
    raise InputError(f"norm 'l2' goes with framework 'pgd'; {framework} {said}: leave norm out")
  if tau is not None and (framework != 'stadv' or not 0 < tau < math.inf):
    raise InputError(
      f'tau is {tau} for framework {framework!r}; expected a positive weight of the roughness of '
      'flows, such as 0.0005, with stadv alone'
    )
  if kappa is not None and (framework != 'cw' or not 0 <= kappa < math.inf):
    raise InputError(
      f'kappa is {kappa} for framework {framework!r}; expected a confidence of 0 or more, in '
      'logits, with cw alone'
    )
  if has_epsilon and not has_radius(framework):
    bound = 'the roughness of its flow, weighted by tau' if framework == 'stadv' else 'its price'
    raise InputError(
      f'epsilon is the radius of pgd; {framework} has none, only {bound} holds it back: leave '
      'epsilon out'
    )
  if has_epsilon is False and norm == 'l2':
    raise InputError(
      "norm 'l2' without epsilon; expected an L2 radius of the image in [0,1], such as 1.0 at 64 px"
    )


def by_name(
  preset: str,
  name: str,
  steps_s1: int | None = None,
  steps_s2: int | None = None,
  *,
  goal: Goal = DECEIVE,
  framework: str = 'pgd',
  norm: str = 'linf',
  tau: float | None = None,
  kappa: float | None = None,
) -> Recipe:
  """The recipe of that preset and framework for an interpreter's name.

  Args:
    preset: 'fast', 'thorough' or 'authors', or with pgd in L∞ one of the literature's, see
      `baselines`.
    name: the interpreter's.
    steps_s1: warm-up steps; None: the preset's. cw has no warm-up, they are added to the others.
    steps_s2: steps on the joint loss; None: the preset's.
    goal: what it is after.
    framework: 'pgd', 'stadv' or 'cw'.
    norm: 'linf' or, with pgd, 'l2'.
    tau: weight of the flow's roughness; None: the preset's.
    kappa: confidence of cw; None: 0.

  Raises:
    InputError: an unknown name, or settings that make no sense.
  """
  check(framework, norm, tau=tau, kappa=kappa)
  _check_preset(preset)
  if preset in baselines.RECIPES:
    presets.check_steps(steps_s1, steps_s2)
    if (framework, norm) != ('pgd', 'linf'):
      raise InputError(f"preset {preset!r} goes with framework 'pgd' and norm 'linf' alone")
    return baselines.RECIPES[preset](name, steps_s1, steps_s2, goal)
  linf = presets.by_name(preset, name, steps_s1, steps_s2, goal=goal)  # checks what they share
  if name == 'joint' and framework != 'pgd':
    raise InputError(
      f"framework {framework!r} has no joint attack so far: take framework 'pgd', or attack one "
      'interpreter after the other'
    )
  if framework == 'cw':
    return cw.by_name(preset, name, _sum(steps_s1, steps_s2), goal, kappa or 0.0)
  if framework == 'stadv' and preset == 'authors':
    return stadv.authors(name, steps_s1, steps_s2, goal, tau)
  if (framework, norm) == ('pgd', 'linf'):
    return linf
  if preset == 'authors':
    return presets.authors(name, steps_s1, steps_s2, goal, presets.L2)
  space = presets.L2 if norm == 'l2' else stadv.space(tau)
  return presets.fast(name, steps_s1, steps_s2, goal, space, thorough=preset == 'thorough')


def plain(
  preset: str,
  steps: int | None = None,
  *,
  goal: Goal = DECEIVE,
  framework: str = 'pgd',
  norm: str = 'linf',
  tau: float | None = None,
  kappa: float | None = None,
) -> Recipe:
  """The same on the classifier alone; arguments and errors as in `by_name`."""
  check(framework, norm, tau=tau, kappa=kappa)
  _check_preset(preset)
  preset = 'fast' if preset in baselines.RECIPES else preset
  if framework == 'cw':
    return cw.plain(preset, steps, goal, kappa or 0.0)
  if framework == 'stadv':
    return stadv.plain(preset, steps, goal, tau)
  return presets.plain_pgd(preset, steps, goal, presets.L2 if norm == 'l2' else presets.LINF)


def _check_preset(preset: str) -> None:
  if preset not in PRESETS:
    raise InputError(f'preset {preset!r} is unknown; expected one of {", ".join(PRESETS)}')


def _sum(steps_s1: int | None, steps_s2: int | None) -> int | None:
  return None if steps_s2 is None else (steps_s1 or 0) + steps_s2
