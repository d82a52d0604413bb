"""The evaluation programme: on what data, and which runs of experiments.attack a table needs."""

import hashlib
import json
import shlex
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from adv2_jax.types import InputError
from adv2_jax.validate import whole_number
from adv2_jax.weights import zoo
from experiments import _flags


class Scale(NamedTuple):
  """How much is run.

  Attributes:
    num: images for GRAD, CAM and RTS.
    num_slow: images where MASK is among the interpreters.
    radii: of the runs with several, in grey levels.
    shares: of the way between target maps.
    steps: instead of the presets'; None: theirs.
    thorough: whether E1 to E4 are made by that preset, too, the latter two in part.
    subsets: sizes of the subsets of interpreters that the joint attack is made on.
    published: other frameworks that are run with their published schedules too, on fewer images.
    names: interpreters of E3, E4, E7; () for all of the subject's.
    joint: interpreters attacked at once; likewise.
  """

  num: int
  num_slow: int
  radii: tuple[int, ...] = (1, 2, 4, 8)
  shares: tuple[float, ...] = (0.25, 0.5, 0.75, 1.0)
  steps: int | None = None
  thorough: bool = True
  subsets: tuple[int, ...] = (2, 3)
  published: tuple[str, ...] = ()
  names: tuple[str, ...] = ()
  joint: tuple[str, ...] = ()


SCALES = {
  'smoke': Scale(
    num=2,
    num_slow=2,
    radii=(2, 8),
    shares=(0.5,),
    steps=4,
    thorough=False,
    subsets=(),
    names=('cam',),
    joint=('cam', 'mask', 'rts'),
  ),
  'cpu': Scale(num=256, num_slow=64, published=('stadv', 'cw')),
  'full': Scale(num=2000, num_slow=500, published=('stadv', 'cw')),
}
JOINT = '+'


class Subject(NamedTuple):
  """What is attacked: its name, the flags that say which data and net, and the interpreters."""

  name: str
  flags: dict[str, str]
  interpreters: tuple[str, ...]
  scale: Scale

  @property
  def names(self) -> tuple[str, ...]:
    """The interpreters of E3, E4 and E7."""
    return self.scale.names or self.interpreters

  @property
  def joint(self) -> tuple[str, ...]:
    """The interpreters that are attacked at once."""
    return self.scale.joint or self.interpreters


def light(names: Sequence[str]) -> list[str]:
  """The interpreters that cost little."""
  return [name for name in names if name != 'mask']


class Run(NamedTuple):
  """A run of experiments.attack: its flags but --workdir, and who is shown its images after it.

  `decoder`: RTS's, for transfer.
  """

  flags: dict[str, str]
  shown_to: tuple[str, ...] = ()
  decoder: str | None = None

  def folder(self, name: str) -> str:
    """Its working directory: the same flags, the same directory."""
    digest = hashlib.sha256(json.dumps(self.flags, sort_keys=True).encode()).hexdigest()
    return f'{name}-{digest[:8]}'


def attack(
  subject: Subject,
  names: Sequence[str],
  more: Mapping[str, str] | None = None,
  *,
  share: int = 1,
  shown_to: tuple[str, ...] = (),
) -> Run:
  """A run on these interpreters with `more` flags; `share`: on how small a part of the images."""
  scale = subject.scale
  n = scale.num_slow if {'mask', 'joint'} & set(names) else scale.num
  flags = {'interpreters': ','.join(names), 'num_examples': str(max(1, n // share))}
  steps = {'steps_s2': str(scale.steps)} if scale.steps else {}
  own = dict(subject.flags)
  decoder = own.get('decoder')
  if (more or {}).get('goal') == 'map_only':  # which has no targets
    own.pop('target_classes', None)
  elif decoder is not None and 'rts' not in names and own.get('target_label', 'random') == 'random':
    own = _same_targets(decoder) | own
  if 'rts' not in names:
    own.pop('decoder', None)
  return Run({**own, **flags, **steps, **(more or {})}, shown_to, decoder)


def _same_targets(decoder: str) -> dict[str, str]:
  """Flags by which a run without RTS has the targets of one with it."""
  classes = zoo.read_card(zoo.resolve(decoder)).get('classes')
  return {'target_classes': ','.join(map(str, classes))} if classes else {}


# The runs of each table, by what is special about them.
Cases = Iterator[tuple[str, Run]]
KEPT = 'benign,pgd,adv2'


def effect(s: Subject) -> Cases:
  """E1, E2."""
  for preset in ('fast', 'thorough') if s.scale.thorough else ('fast',):
    more = {'preset': preset} if preset != 'fast' else {}
    for names in (light(s.interpreters), ['mask'] if 'mask' in s.interpreters else []):
      if names:
        yield more.get('preset', ''), attack(s, names, more)


def speed(s: Subject) -> Cases:
  """Our schedule beside the published one, on the same images."""
  for preset in ('fast', 'thorough', 'authors') if s.scale.thorough else ('fast', 'authors'):
    yield preset, attack(s, s.names, {'preset': preset, 'attacks': KEPT}, share=4)


def other_maps(s: Subject) -> Cases:
  """E3."""
  for kind in ('random_patch', 'random_class'):
    more = {'target_map': kind, 'attacks': KEPT}
    yield kind.replace('_', ' '), attack(s, s.names, more)
    if s.scale.thorough and 'mask' in s.names:
      more |= {'preset': 'thorough'}
      yield f'{kind.replace("_", " ")}, thorough', attack(s, ['mask'], more, share=4)


def other_frameworks(s: Subject) -> Cases:
  """E4."""
  for framework, name in (('stadv', 'StAdv'), ('cw', 'C&W')):
    more = {'framework': framework, 'attacks': KEPT}
    yield f'{name}, fast', attack(s, s.names, more)
    better = {'stadv': [n for n in s.names if n == 'mask'], 'cw': light(s.names)}[framework]
    if s.scale.thorough and better:
      share = 1 if framework == 'stadv' else 4
      yield f'{name}, thorough', attack(s, better, {**more, 'preset': 'thorough'}, share=share)
    if framework in s.scale.published:
      yield f'{name}, authors', attack(s, s.names, {**more, 'preset': 'authors'}, share=4)


def everyone(s: Subject) -> Run:
  """Each interpreter by itself, and all at once."""
  return attack(s, [*s.joint, 'joint'], shown_to=s.joint)


def subsets(s: Subject) -> Cases:
  """The joint attack on some of the interpreters; those without one are shown to it."""
  names = s.joint
  for bits in range(1, 2 ** len(names) - 1):
    part = [name for k, name in enumerate(names) if bits >> k & 1]
    if len(part) in s.scale.subsets or (len(part) == len(names) - 1 > 1):
      shown_to = names if len(part) == len(names) - 1 else ()
      more = {'attacks': 'benign,adv2_joint'}
      run = attack(s, [*part, 'joint'], more, share=2, shown_to=shown_to)
      yield JOINT.join(part), run


def looking_on(s: Subject) -> Cases:
  """E6: all of them, then the joint attack without one each."""
  yield '', everyone(s)
  yield from ((case, run) for case, run in subsets(s) if run.shown_to)


def joint(s: Subject) -> Cases:
  """The joint attack, on fewer interpreters, and within other radii."""
  yield JOINT.join(s.joint), everyone(s)
  yield from subsets(s)
  levels = ','.join(f'{k}/255' for k in s.scale.radii)
  more = {'epsilon': levels, 'attacks': 'benign,pgd,adv2_joint'}
  yield 'radii', attack(s, [*s.joint, 'joint'], more, share=4)


def gap(s: Subject) -> Cases:
  """E7: how far one can be moved while the other is held."""
  levels = ','.join(f'{k}/255' for k in s.scale.radii)
  if names := light(s.names):
    away = {'goal': 'map_only', 'target_map': 'away', 'attacks': 'benign,adv2'}
    yield 'class held', attack(s, names, {**away, 'epsilon': levels}, share=4)
  yield 'map held', attack(s, s.names, {'epsilon': levels, 'attacks': KEPT}, share=2)
  for share in (0.0, *s.scale.shares):
    kind = f'path:{share:g}' if share else 'benign'
    more = {'target_map': kind, 'attacks': 'benign,adv2'}
    yield f'path {share:g}', attack(s, s.names, more, share=2)


def literature(s: Subject) -> Cases:
  """Attacks of the literature, each beside ours with the same aim."""
  cheap = light(s.names)
  away = {'goal': 'map_only', 'target_map': 'away', 'attacks': 'benign,adv2'}
  other = {'goal': 'map_only', 'target_map': 'random_class', 'attacks': 'benign,adv2'}
  for case, names, more, preset in (
    ('deceive', cheap, {'attacks': KEPT}, 'adv_edge'),
    ('another map', ['grad'], other, 'dombrowski'),
    ('away', cheap, away, 'ghorbani'),
  ):
    for name in ('fast', preset):
      yield f'{case}: {name}', attack(s, names, {**more, 'preset': name}, share=4)


def subjects(config: Mapping[str, Any]) -> list[Subject]:
  """The scenes and what --on names; InputError for a line that says too little."""
  scale = SCALES[config['scale']]
  found = [Subject('scenes', {}, ('grad', 'cam', 'mask', 'rts'), scale)]
  for text in config['on'] or ():
    found.append(_subject(text, scale))
  names = [s.name for s in found]
  if len(set(names)) < len(names):
    raise InputError(f'--on names {", ".join(names[1:])}; expected names that differ, not scenes')
  if config['scenes']:
    return found
  if len(found) == 1:
    raise InputError('--noscenes leaves nothing; name data by --on')
  return found[1:]


def _subject(text: str, scale: Scale) -> Subject:
  try:
    name, *words = shlex.split(text)
  except ValueError:
    name, words = '', []
  if not words or name.startswith('-') or not name.replace('_', '').isalnum():
    raise InputError(
      f"--on is {text!r}; expected a name and flags of experiments.attack, such as 'cifar10 200/64 "
      "--dataset cifar10 --model cifar_resnet20 --weights FILE'"
    )
  if not words[0].startswith('-'):
    numbers = [whole_number(v) or 0 for v in words.pop(0).split('/')]
    if min(numbers) < 1 or len(numbers) > 2:
      raise InputError(
        f'--on {name}: expected how many images, and how many of them with MASK, such as 200/64'
      )
    scale = scale._replace(num=numbers[0], num_slow=numbers[-1])
  flags: dict[str, str] = {}
  while words:
    flag, is_joined, value = words.pop(0).partition('=')
    if not flag.startswith('--'):
      raise InputError(f'--on {name}: {flag!r} is no flag; expected --flag value')
    if not is_joined:
      value = words.pop(0) if words and not words[0].startswith('--') else 'true'
    flags[flag[2:]] = value
  if taken := sorted(flags.keys() & {'workdir', 'resume', 'num_examples', 'attacks', 'epsilon'}):
    raise InputError(f'--on {name}: --{taken[0]} is what the tables set; leave it out')
  default = _flags.default_interpreters(
    {'model': 'scene_resnet', 'weights': None, 'decoder': None, 'target_map': 'benign'} | flags
  )
  given = flags.pop('interpreters', None)
  return Subject(name, flags, tuple(given.split(',') if given else default), scale)
