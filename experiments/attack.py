r"""Attacks a classifier and its interpreters: `python -m experiments.attack`.

Without flags: the built-in scenes and checkpoint. On ImageNet photographs, with a ResNet-50:

    python -m experiments.attack --dataset packed --data_path imagenet_val_500.npz \
      --model resnet50 --weights resnet50_imagenet.npz --interpreters cam --num_examples 32

Per batch of examples and interpreter: the clean image ('benign'; where maps depend on random
numbers, once more with others: 'again', as close as one may hope to keep a benign map), another
image of the same predicted class ('other', the scale of "unrelated"), plain PGD, and ADV². Each is
rounded to 8 bits and judged by the real net and a fresh map. With joint among the interpreters also
one image against all of them at once ('adv2_joint'), judged by each. Results appear batch by batch;
a killed run goes on with --resume. Files and fields: see README.
"""

import functools
import operator
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import tqdm

from adv2_jax import api, images, metrics
from adv2_jax.attacks import frameworks
from adv2_jax.attacks.goals import Goal
from adv2_jax.interpreters.base import Interpreter
from adv2_jax.types import Array, InputError, Key, Map, PyTree
from adv2_jax.workdir import health, report, store
from adv2_jax.workdir.store import (
  Workdir,
  as_records,
  check_workdir,
  default_workdir,
  flow_folder,
  image_folder,
  map_folder,
)
from experiments import _digests, _flags, _judge, _names, _setup, _targets


class Stopwatch:
  """Seconds of work, without the seconds that went into tracing and compiling."""

  def __init__(self):
    self.compiling = 0.0
    jax.monitoring.register_event_duration_secs_listener(self._listen)

  def _listen(self, event: str, duration_secs: float, **_: Any) -> None:
    if event.startswith('/jax/core/compile/'):
      self.compiling += duration_secs

  def start(self) -> tuple[float, float]:
    """A moment to measure from."""
    return time.perf_counter(), self.compiling

  def since(self, moment: tuple[float, float]) -> dict[str, float]:
    """`seconds` and `seconds_compile` since then."""
    compiling = self.compiling - moment[1]
    return {
      'seconds': time.perf_counter() - moment[0] - compiling,
      'seconds_compile': compiling,
    }


SHARED = ('pgd', 'adv2_joint')  # one image for all interpreters


def attacks_on(setup: _setup.Setup, interpreter: Interpreter) -> tuple[str, ...]:
  """The rows of a table for this interpreter."""
  wanted = setup.config['attacks'] or store.ATTACKS
  of_maps = setup.config['goal'] != 'class_only'
  applies = {
    'again': interpreter.random,
    'adv2': of_maps,
    'adv2_joint': of_maps and setup.joint is not None,
  }
  return tuple(a for a in store.ATTACKS if a == 'benign' or (a in wanted and applies.get(a, True)))


def recipe_of(config: dict[str, Any], attack: str, name: str) -> api.Recipe:
  """The schedule of an attack on an interpreter."""
  space = {k: config[k] for k in ('framework', 'norm', 'tau', 'kappa')}
  space['goal'] = _targets.goal_of(config)
  if attack == 'pgd':
    steps = [config['steps_s1'] or 0, config['steps_s2']]
    return frameworks.plain(config['preset'], sum(steps) if config['steps_s2'] else None, **space)
  return frameworks.by_name(config['preset'], name, config['steps_s1'], config['steps_s2'], **space)


def check_recipes(setup: _setup.Setup) -> None:
  """InputError where an attack does not go with an interpreter or a goal, before any is made."""
  wanted = [
    (attack, name, interpreter)
    for name, interpreter in setup.interpreters.items()
    for attack in attacks_on(setup, interpreter)
  ]
  for attack, name, interpreter in wanted:
    if attack == 'adv2_joint':
      recipe_of(setup.config, attack, 'joint')
    elif attack == 'adv2':
      recipe = recipe_of(setup.config, attack, name)
      recipe.schedule(setup.clf, interpreter, recipe.perturbation(0.1), jax.random.key(0))


def ids_done(
  done: Mapping[tuple[str, str], set[int]], attack: str, names: Sequence[str], name: str = ''
) -> set[int]:
  """Ids of which an attack on interpreter `name` is done; `SHARED` ones serve all `names`."""
  return set.intersection(*(done[attack, n] for n in (names if attack in SHARED else [name])))


class Attacked(NamedTuple):
  """What an attack made of a batch, padding rows and examples that are done included.

  Attributes:
    x: the 8-bit images, f32[B,H,W,C].
    columns: more for the records, [B].
    curves: `step` [T], and [T,B] by name.
    spent: evaluations, passes, seconds.
    flow: StAdv's, f32[B,H,W,2].
  """

  x: Array
  columns: dict[str, np.ndarray]
  curves: dict[str, np.ndarray]
  spent: dict[str, Any]
  flow: Array | None = None


class Run(NamedTuple):
  """A run in progress; its bar counts attacks: those `SHARED`, and one per interpreter."""

  setup: _setup.Setup
  workdir: Workdir
  done: dict[tuple[str, str], set[int]]
  given_maps: dict
  bar: tqdm.tqdm
  watch: Stopwatch

  @property
  def goal(self) -> Goal:
    """What the flags ask for."""
    return _targets.goal_of(self.setup.config)

  def one_shard(self, shard: _setup.Shard) -> None:
    """All that is missing of one batch: attacked, judged and written."""
    plain = joint = None  # one image serves all
    clean = functools.cache(
      lambda name: self.maps(shard, name, 'benign', shard.batch.x, shard.keys)
    )
    wanted = functools.cache(lambda name: self.wanted(shard, name, clean(name)))
    for name, interpreter in self.setup.interpreters.items():
      ids = set(shard.id.tolist())
      missing = [a for a in attacks_on(self.setup, interpreter) if not ids <= self.done[a, name]]
      if not missing:
        continue
      judge = functools.partial(self.judge, shard, name, wanted(name), clean(name))
      if 'benign' in missing:
        judge('benign', shard.batch.x, maps=clean(name))
      if 'again' in missing:
        judge('again', shard.batch.x, keys=shard.keys_again)
      if 'other' in missing:
        judge('other', self.others(shard))
      if 'pgd' in missing:
        plain = plain or self.attack(shard, 'pgd', name, None)
        judge('pgd', plain.x, attacked=plain)
      if 'adv2' in missing:
        found = self.attack(shard, 'adv2', name, wanted(name))
        judge('adv2', found.x, attacked=found)
      if 'adv2_joint' in missing:
        of_all = {n: wanted(n) for n in self.setup.interpreters}
        joint = joint or self.attack(shard, 'adv2_joint', 'joint', of_all)
        judge('adv2_joint', joint.x, attacked=joint)

  def wanted(self, shard: _setup.Shard, name: str, clean: Array) -> Array:
    """The map that the attack on interpreter `name` wants."""
    wanted = _setup.target_map(self.setup, shard, name, clean, self.given_maps)
    return jax.device_put(wanted, shard.label.sharding)

  def others(self, shard: _setup.Shard) -> Array:
    """The images of `shard.other`; the example itself where there is none."""
    ids = np.where(shard.other < 0, shard.id, shard.other)
    x = images.from_uint8(self.setup.dataset.images(ids))
    return jax.device_put(x, shard.label.sharding)  # placed otherwise, `score` compiles again

  def maps(
    self,
    shard: _setup.Shard,
    name: str,
    attack: str,
    x8: Array,
    keys: Key,
    target: Array | None = None,
  ) -> Array:
    """Fresh maps for the true class and for the target, [2,B,h,w]; those of MASK take a while."""
    target = shard.batch.target if target is None else target
    self.bar.set_postfix_str(f'{attack} {name}, making the maps to judge')
    return _judge.two_class_maps(
      self.setup.clf,
      self.setup.interpreters[name],
      x8,
      shard.label,
      target,
      keys,
    )

  def attack(self, shard: _setup.Shard, attack: str, name: str, wanted: PyTree) -> Attacked:
    """The 8-bit images of one attack, and what it took."""
    config = self.setup.config
    interpreter = self.setup.interpreters.get(name) or self.setup.joint
    assert interpreter
    is_done = ids_done(self.done, attack, list(self.setup.interpreters), name)
    n, before = len(set(shard.id.tolist()) - is_done), round(self.bar.n)

    def on_chunk(evaluations: int, total: int, hit: np.ndarray) -> None:
      rate = f'{np.mean(hit[shard.is_real]):.2f}'
      self.bar.set_postfix_str(f'{attack} {name} step {evaluations}/{total}, success {rate}')
      self.bar.update(before + n * evaluations / total - self.bar.n)

    start = self.watch.start()
    x8, history = api.attack_batch(
      recipe_of(config, attack, name),
      self.setup.clf,
      interpreter,
      shard.batch._replace(
        target_map=wanted, target=shard.label if self.goal.untargeted else shard.batch.target
      ),
      config['epsilon'] or 0.0,
      jax.random.key(config['seed']),
      on_chunk=on_chunk,
    )
    x8.block_until_ready()
    self.bar.n = before + n  # it may have ended early, and shares do not add up to whole numbers
    zero, nonfinite = history.gradients()
    flow = history.delta if config['framework'] == 'stadv' else None
    figures = {} if flow is None else _judge.flow_figures(flow)
    return Attacked(
      x8,
      {'zero_gradient': zero, 'nonfinite_gradient': nonfinite, **figures},
      {
        'step': history.evaluations,
        **{k: v for k, v in history.terms._asdict().items() if k != 'penalty'},
        'success': history.success * 1.0,
      },
      {
        'gradient_evaluations': int(history.evaluations[-1]),
        'network_passes': int(history.passes[-1]),
        **self.watch.since(start),
      },
      flow,
    )

  def judge(
    self,
    shard: _setup.Shard,
    name: str,
    wanted: Map,
    clean: Map,
    attack: str,
    x8: Array,
    *,
    maps: Array | None = None,
    keys: Key | None = None,
    attacked: Attacked | None = None,
  ) -> None:
    """Scores 8-bit images and writes those examples that are not done yet.

    Untargeted: judged by the most probable wrong class of these very images.
    """
    keys = shard.keys if keys is None else keys
    target = shard.batch.target
    if self.goal.untargeted and attacked:
      target = _judge.runners_up(self.setup.clf, x8, shard.label)
      if (target != shard.batch.target).any():
        clean = self.maps(shard, name, 'benign', shard.batch.x, shard.keys, target)
    if maps is None:
      maps = self.maps(shard, name, attack, x8, keys, target)
    scores = _judge.score(
      self.setup.clf,
      shard.batch.x,
      x8,
      target,
      wanted,
      clean,
      maps,
      **_judge.bounds(self.setup.config),
      attacked=attacked is not None,
      mask=shard.mask,
      patch=_judge.patch_of(self.setup.config, wanted),
    )
    fresh = maps[int(attacked is not None)]
    keep = shard.is_real & ~np.isin(shard.id, list(self.done[attack, name]))
    arrays = {map_folder(attack, name): fresh, image_folder(attack, name): images.to_uint8(x8)}
    if attack == 'benign':
      arrays[map_folder('target', name)] = wanted
      if shard.mask is not None:
        arrays['masks'] = shard.mask * np.uint8(255)
    if attack == 'other':
      keep &= shard.other >= 0
    if attack in _judge.NOT_KEPT:
      arrays = {}
      scores = {k: v for k, v in scores.items() if k not in ('linf', 'l2', 'out_of_set')}
    elif (left := np.asarray(scores['out_of_set']) & shard.is_real).any():
      raise InputError(
        f'{attack} on {name}: the image of example {shard.id[left][0]} is outside of the '
        'perturbation set, so nothing of its batch was written; this is a fault: please report it'
      )
    files = [self.setup.dataset.file(i) for i in shard.id]
    columns = {'id': shard.id, 'label': shard.label, 'target': target, 'file': files}
    extras: dict[str, Any] = {}
    if attacked:
      columns |= attacked.columns
      if attacked.flow is not None:
        arrays[flow_folder(attack, name)] = attacked.flow
      cut = {k: v if k == 'step' else v[:, keep] for k, v in attacked.curves.items()}
      extras = {'curves': cut, **attacked.spent}
    records = as_records(scores, keep, **columns)
    kept = {folder: np.asarray(array)[keep] for folder, array in arrays.items()}
    self.workdir.write_shard(attack, name, records, kept, **extras)
    if attacked and keep.any():
      rate = np.mean(np.asarray(scores['success'])[keep])
      self.bar.set_postfix_str(f'{attack} {name} judged, success {rate:.2f}')


def rows(
  setup: _setup.Setup, workdir: Workdir, num_skipped: int, seen: Sequence[health.Health]
) -> Iterator[dict[str, Any]]:
  """The rows of metrics.json: one per interpreter and attack; `seen` look at their records."""
  goal = _targets.goal_of(setup.config)
  for name, interpreter in setup.interpreters.items():
    for attack in attacks_on(setup, interpreter):
      spent: dict[str, Any] = dict.fromkeys(SPENT)
      found: Iterable[Mapping[str, Any]] = _passing(workdir.shards(attack, name), spent)
      for watching in seen:
        found = watching.watch(attack, found)
      figures = metrics.aggregate(found, attack not in store.NOT_PERTURBED)
      yield {
        'interpreter': name,
        'attack': attack,
        'framework': setup.config['framework'],
        'goal': goal.name,
        'target_map': setup.config['target_map'],
        'epsilon': setup.config['epsilon'],
        'n_skipped': num_skipped,
        **figures,
        **spent,
      }


def _passing(shards: Iterator[dict[str, Any]], spent: dict[str, Any]) -> Iterator[dict[str, Any]]:
  """The records of shards, read one by one; what they took is put together in `spent`."""
  for shard in shards:
    for field, combine in SPENT.items():
      spent[field] = combine(spent[field] or 0, shard.get(field, 0))
    yield from shard['records']


SPENT: dict[str, Callable[[Any, Any], Any]] = {
  'gradient_evaluations': max,
  'network_passes': max,
  'seconds': operator.add,
  'seconds_compile': operator.add,
}


class Inputs(NamedTuple):
  """What a run works with, whatever its radius."""

  setup: _setup.Setup
  examples: _setup.Examples
  given_maps: dict
  watch: Stopwatch


def run(config: dict[str, Any]) -> Workdir:
  """The whole command, once the flags are known."""
  _flags.check(config)
  path, resume = config['workdir'] or default_workdir(config), config['resume']
  check_workdir(path, config, resume)
  setup = _setup.load(config)
  digests = _digests.of_inputs(config, data=setup.dataset)
  store.check_digests(path, config, digests)
  given = {}
  if _targets.is_file(config['target_map']):
    given = _targets.read_maps(config['target_map'], _flags.parts(config['interpreters']))
  examples = _setup.select(setup)
  _setup.check_given_maps(setup, examples, given)
  if len(examples.id) < config['num_examples']:
    few = f'{len(examples.id)} examples instead of --num_examples {config["num_examples"]}'
    print(f'{few}: the classifier gets no more right', file=sys.stderr)
  check_recipes(setup)
  inputs = Inputs(setup, examples, given, Stopwatch())
  workdir = Workdir.create(path, config, resume, digests)
  seen = health.Health(stays=_targets.goal_of(config).holds)
  if isinstance(config['epsilon'], list):
    found = []
    for epsilon in config['epsilon']:
      where = workdir.path / store.part_name(epsilon)
      part = config | {'epsilon': epsilon, 'workdir': str(where), 'resume': True}
      own = health.Health(stays=_targets.goal_of(config).holds)
      found += within(inputs, Workdir.create(where, part, True, digests), part, (seen, own))
      report.write_report(where)
  else:
    found = within(inputs, workdir, config, (seen,))
  told = seen.found(examples.num_seen, examples.num_correct, examples.omitted)
  if isinstance(config['epsilon'], list):
    workdir.write_metrics(found, _judge.environment(config), {}, told)
  page = report.write_report(workdir.path)
  # All is on disk before anything is said: whoever reads it may have gone.
  for line in health.sentences(told):
    print(line, file=sys.stderr)
  print(_judge.table(found))
  print(page)
  return workdir


def within(
  inputs: Inputs, workdir: Workdir, config: dict[str, Any], seen: Sequence[health.Health]
) -> list[dict[str, Any]]:
  """All that is missing of a run with one radius, and its rows; the run is finished then."""
  examples, setup = inputs.examples, inputs.setup._replace(config=config)
  done = {
    (attack, name): workdir.done(attack, name)
    for name, interpreter in setup.interpreters.items()
    for attack in attacks_on(setup, interpreter)
  }
  # 'other' is left out: an example without another of its class never gets that record.
  whole = set.intersection(*(ids for (a, _), ids in done.items() if a != 'other'))
  for attack, name in done:
    if attack == 'other':
      done[attack, name] |= whole | set(examples.id[examples.other < 0].tolist())
  left = np.flatnonzero(~np.isin(examples.id, list(whole)))
  names, ids = list(setup.interpreters), set(examples.id.tolist())
  units = [(a, '') for a in SHARED if (a, names[0]) in done]
  units += [('adv2', name) for name in names if ('adv2', name) in done]
  with tqdm.tqdm(
    desc=f'ε {config["epsilon"]:.4g}' if len(seen) > 1 else None,
    total=len(ids) * len(units),
    initial=sum(len(ids & ids_done(done, attack, names, name)) for attack, name in units),
    unit='img',
    mininterval=1,
    dynamic_ncols=True,
    bar_format='{desc}{percentage:3.0f}%|{bar}| {elapsed}<{remaining}, {rate_fmt}{postfix}',
  ) as bar:
    progress = Run(setup, workdir, done, inputs.given_maps, bar, inputs.watch)
    for shard in _setup.shards(setup, examples, left):
      progress.one_shard(shard)
  found = list(rows(setup, workdir, examples.num_skipped, seen))
  told = seen[-1].found(examples.num_seen, examples.num_correct, examples.omitted)
  workdir.finish(found, _judge.environment(config), _names.of(setup), told)
  return found


if __name__ == '__main__':
  _flags.define_data_flags()
  _flags.define_attack_flags()
  _flags.start(run)
