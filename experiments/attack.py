r"""Attacks a classifier and its interpreters: `python -m experiments.attack`.

Without flags: the built-in scenes and checkpoint. On ImageNet photographs, with a ResNet-50:

    python -m experiments.attack --dataset packed --data_path imagenet_val_500.npz \
      --model resnet50 --weights resnet50_imagenet.npz --interpreters cam --num_examples 32

Per batch of examples and interpreter: the clean image ('benign'), another image of the same
predicted class ('other', the scale of "unrelated"), plain PGD, and ADV². Each is rounded to 8 bits
and judged by the real net and a fresh map. Results appear batch by batch; a killed run goes on with
--resume. Files and fields: see README.
"""

import contextlib
import functools
import pathlib
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tqdm
from absl import app, flags

from adv2_jax import api, checkpoints, data, images, interpreters, metrics, nets, presets, report
from adv2_jax.classifier import Classifier
from adv2_jax.store import Workdir, as_records, default_workdir, image_folder, map_folder
from adv2_jax.types import Array, Batch, InputError, Interpreter, Key, Map
from experiments import _flags, _targets

FLAGS = flags.FLAGS
ATTACKS = ('benign', 'other', 'pgd', 'adv2')
NOT_PERTURBED = ('benign', 'other')
score = jax.jit(metrics.score, static_argnames='shown')
two_class_maps = jax.jit(metrics.two_class_maps)


class Setup(NamedTuple):
  """What the flags stand for."""

  config: dict[str, Any]
  clf: Classifier
  interpreters: dict[str, Interpreter]
  dataset: data.Dataset
  target_of: Callable[[int, int], int]  # (id, least likely class) -> target class


class Examples(NamedTuple):
  """The examples to attack, [N]."""

  id: np.ndarray
  label: np.ndarray
  target: np.ndarray
  other: np.ndarray  # id of another image of the same predicted class; −1 where none was met
  donor: np.ndarray  # id of a correctly classified image of the target class; −1 unless asked for
  num_skipped: int


class Shard(NamedTuple):
  """One batch on the device, filled up with padding rows, and what its images are judged with."""

  id: np.ndarray
  other: np.ndarray
  donor: np.ndarray
  is_real: np.ndarray
  batch: Batch  # without a target map: that depends on the interpreter
  label: Array
  keys: Key
  mask: np.ndarray | None


def image_size(config: Mapping[str, Any]) -> int:
  """The side in pixels: the flag, or what the model was designed for."""
  return config['image_size'] or nets.DEFAULTS[config['model']].image_size


def models(config: Mapping[str, Any]) -> tuple[Classifier, dict[str, Interpreter]]:
  """The classifier and the interpreters of a config."""
  clf = checkpoints.load_classifier(
    config['model'],
    config['weights'],
    mean=_flags.floats(config['mean'], 'mean'),
    std=_flags.floats(config['std'], 'std'),
    dtype=config['dtype'],
  )
  size = image_size(config)
  return clf, {name: interpreters.build(name, size) for name in config['interpreters']}


def load(config: dict[str, Any]) -> Setup:
  """Classifier, interpreters and data of a config; InputError before any work is done."""
  size = image_size(config)
  clf, built = models(config)
  dataset = data.load(
    config['dataset'],
    config['data_path'],
    image_size=size,
    split=config['split'],
    label_key=config['label_key'],
    masks=config['masks'],
    skip_corrupt=config['skip_corrupt'],
  )
  shape = jax.eval_shape(clf, jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)).logits.shape
  dataset.check_classes(shape[-1])
  labels = dataset.labels
  target_of = _targets.labels(config['target_label'], config['seed'], labels, shape[-1])
  return Setup(config, clf, built, dataset, target_of)


def devices_of(config: dict[str, Any]) -> list[jax.Device]:
  """The local devices that share a batch."""
  return jax.local_devices()[: config['num_devices']]


@jax.jit
def _predict(clf: Classifier, x: Array) -> tuple[Array, Array]:
  logits = clf(x).logits
  return jnp.argmax(logits, axis=-1), jnp.argmin(logits, axis=-1)


def predictions(setup: Setup, ids: np.ndarray) -> Iterator[tuple[int, int, int]]:
  """(id, predicted class, least likely class) one after the other, computed in batches."""
  size = setup.config['batch_size']
  for start in range(0, len(ids), size):
    some = ids[start : start + size]
    x = images.from_uint8(setup.dataset.images(np.resize(some, size)))
    best, worst = (np.asarray(v)[: len(some)].tolist() for v in _predict(setup.clf, x))
    yield from zip(some.tolist(), best, worst, strict=True)


def select(setup: Setup) -> Examples:
  """The first N examples, in data-set order, that are classified correctly and have a target.

  An example whose class is the `--target_label` is passed over, and counted as skipped.
  """
  c, true, target_of = setup.config, setup.dataset.labels, setup.target_of
  chosen: list[int] = []
  targets: list[int] = []
  met: dict[int, list[int]] = {}  # predicted class -> ids
  seen = 0
  for i, best, worst in predictions(setup, setup.dataset.ids):
    met.setdefault(best, []).append(i)
    seen += 1
    if best == true[i] and (target := target_of(i, worst)) != true[i]:
      chosen.append(i)
      targets.append(target)
    if len(chosen) == c['skip_examples'] + c['num_examples']:
      break
  if len(chosen) <= c['skip_examples']:
    raise InputError(
      f'the classifier gets {len(chosen)} of {seen} images right, none beyond --skip_examples '
      f'{c["skip_examples"]}: check --weights, --mean, --std and --label_key'
    )
  chosen, targets = chosen[c['skip_examples'] :], targets[c['skip_examples'] :]
  others = [_next(met[int(true[i])], i) for i in chosen]
  donors = [-1] * len(chosen)
  if c['target_map'] == 'random_class':
    of_class = {target: _donor(setup, target) for target in sorted(set(targets))}
    donors = [of_class[target] for target in targets]
  ints = functools.partial(np.array, dtype=np.int32)
  columns = ints(chosen), true[chosen], ints(targets), ints(others), ints(donors)
  return Examples(*columns, seen - c['skip_examples'] - len(chosen))


def _next(ids: list[int], i: int) -> int:
  """The id after i, cyclically; −1 when there is no other."""
  return ids[(ids.index(i) + 1) % len(ids)] if len(ids) > 1 else -1


def _donor(setup: Setup, target: int) -> int:
  candidates = setup.dataset.ids[setup.dataset.labels[setup.dataset.ids] == target]
  for i, best, _ in predictions(setup, candidates):
    if best == target:
      return i
  raise InputError(
    f'--target_map random_class: no correctly classified image of class {target} in the data set; '
    'choose other targets with --target_label, or --target_map random_patch'
  )


def shards(setup: Setup, examples: Examples, rows: np.ndarray) -> Iterator[Shard]:
  """These rows of the examples in batches of equal shape; the last is filled by padding rows."""
  config, devices = setup.config, devices_of(setup.config)
  per_device = min(config['batch_size'], -(-len(examples.id) // len(devices)))
  size = per_device * len(devices)
  auto = (jax.sharding.AxisType.Auto,)
  mesh = jax.make_mesh((len(devices),), ('data',), axis_types=auto, devices=devices)
  over_data = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec('data'))
  place = functools.partial(jax.device_put, device=over_data)
  for start in range(0, len(rows), size):
    some = rows[start : start + size]
    padded = np.resize(some, size)
    is_real = np.arange(size) < len(some)
    ids = examples.id[padded]
    x = images.from_uint8(setup.dataset.images(ids))
    batch = Batch(place(ids), place(x), place(examples.target[padded]), None, place(is_real))
    yield Shard(
      ids,
      examples.other[padded],
      examples.donor[padded],
      is_real,
      batch,
      place(examples.label[padded]),
      place(metrics.judge_keys(config['seed'], ids)),
      _masks(setup.dataset, ids, x.shape[1:3]),
    )


def _masks(dataset: data.Dataset, ids: np.ndarray, shape: tuple[int, ...]) -> np.ndarray | None:
  """bool[B,H,W], empty where an example has none; None when no example of the set has any."""
  if dataset.mask_of is None:
    return None
  masks = [dataset.mask(i) for i in ids]
  return np.stack([np.zeros(shape, bool) if m is None else m for m in masks])


def target_map(setup: Setup, shard: Shard, name: str, clean: Map, given: dict) -> Map:
  """The map that the attack on interpreter `name` wants, f32[B,h,w]; `clean` is the benign one."""
  kind = setup.config['target_map']
  if kind == 'benign':
    return clean
  if kind == 'random_patch':
    seed, shape = setup.config['seed'], clean.shape[1:]
    return jnp.asarray([_targets.random_patch(seed, int(i), shape) for i in shard.id])
  if kind == 'random_class':
    x = images.from_uint8(setup.dataset.images(shard.donor))
    return api.explain(setup.clf, setup.interpreters[name], x, shard.batch.target, shard.keys)
  return jnp.asarray(np.stack([given[name][int(i)] for i in shard.id]))


def check_given_maps(setup: Setup, examples: Examples, given: dict) -> None:
  """InputError where a map of FILE.npz is missing or does not fit."""
  file, size = setup.config['target_map'], image_size(setup.config)
  x = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
  y = jax.ShapeDtypeStruct((1,), jnp.int32)
  for name, maps in given.items():
    shape = jax.eval_shape(
      setup.interpreters[name].explain, setup.clf, x, y, jax.random.key(0)
    ).shape[1:]
    for i in examples.id.tolist():
      if i not in maps:
        raise InputError(f'{file} has no target map for example {i}; add it to `id` and `{name}`')
      if maps[i].shape != shape:
        raise InputError(f'{file}: maps of {name} are {maps[i].shape}; expected {shape}')


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


def recipe_of(config: dict[str, Any], attack: str, name: str) -> api.Recipe:
  """The schedule of an attack on an interpreter."""
  if attack == 'pgd':
    steps = [config['steps_s1'] or 0, config['steps_s2']]
    return presets.plain_pgd(config['preset'], sum(steps) if config['steps_s2'] else None)
  return presets.by_name(config['preset'], name, config['steps_s1'], config['steps_s2'])


class Run(NamedTuple):
  """A run in progress."""

  setup: Setup
  workdir: Workdir
  done: dict[tuple[str, str], set[int]]
  given_maps: dict
  bar: tqdm.tqdm
  watch: Stopwatch

  def one_shard(self, shard: Shard) -> None:
    """All that is missing of one batch: attacked, judged and written."""
    plain = None  # PGD does not depend on the interpreter: one image serves all
    for name, interpreter in self.setup.interpreters.items():
      missing = [a for a in ATTACKS if not set(shard.id.tolist()) <= self.done[a, name]]
      if not missing:
        continue
      clean = two_class_maps(
        self.setup.clf, interpreter, shard.batch.x, shard.label, shard.batch.target, shard.keys
      )
      wanted = target_map(self.setup, shard, name, clean[0], self.given_maps)
      wanted = jax.device_put(wanted, shard.label.sharding)
      judge = functools.partial(self.judge, shard, name, wanted, clean)
      judge('benign', shard.batch.x)
      judge('other', self.others(shard))
      if 'pgd' in missing:
        plain = plain or self.attack(shard, 'pgd', name, None)
        judge('pgd', *plain)
      if 'adv2' in missing:
        judge('adv2', *self.attack(shard, 'adv2', name, wanted))

  def others(self, shard: Shard) -> Array:
    """The images of `shard.other`; the example itself where there is none."""
    ids = np.where(shard.other < 0, shard.id, shard.other)
    x = images.from_uint8(self.setup.dataset.images(ids))
    return jax.device_put(x, shard.label.sharding)  # placed otherwise, `score` compiles again

  def attack(
    self, shard: Shard, attack: str, name: str, wanted: Map | None
  ) -> tuple[Array, dict[str, Any]]:
    """The 8-bit images of one attack, and what it took."""
    config, n = self.setup.config, int(shard.is_real.sum())
    before = 0

    def on_chunk(evaluations: int, total: int, hit: np.ndarray) -> None:
      nonlocal before
      rate = f'{np.mean(hit[shard.is_real]):.2f}'
      self.bar.set_postfix_str(f'{attack} {name} step {evaluations}/{total}, success {rate}')
      self.bar.update(n * (evaluations - before) / total)
      before = evaluations

    start = self.watch.start()
    x8, history = api.attack_batch(
      recipe_of(config, attack, name),
      self.setup.clf,
      self.setup.interpreters[name],
      shard.batch._replace(target_map=wanted),
      config['epsilon'],
      jax.random.key(config['seed']),
      on_chunk=on_chunk,
    )
    x8.block_until_ready()
    keep = shard.is_real
    curves = {k: v[:, keep] for k, v in history.terms._asdict().items() if k != 'penalty'}
    return x8, {
      'curves': {'step': history.evaluations, **curves, 'success': history.success[:, keep] * 1.0},
      'gradient_evaluations': int(history.evaluations[-1]),
      'network_passes': float(history.passes[-1]),
      **self.watch.since(start),
    }

  def judge(
    self,
    shard: Shard,
    name: str,
    wanted: Map,
    clean: Map,
    attack: str,
    x8: Array,
    extras: dict[str, Any] | None = None,
  ) -> None:
    """Scores 8-bit images and writes those examples that are not done yet."""
    scores, maps = score(
      self.setup.clf,
      self.setup.interpreters[name],
      shard.batch.x,
      x8,
      shard.label,
      shard.batch.target,
      wanted,
      shard.keys,
      epsilon=self.setup.config['epsilon'],
      mask=shard.mask,
      clean_maps=clean,
      shown='label' if attack in NOT_PERTURBED else 'target',
    )
    keep = shard.is_real & ~np.isin(shard.id, list(self.done[attack, name]))
    arrays = {map_folder(attack, name): maps, image_folder(attack, name): images.to_uint8(x8)}
    if attack == 'benign':
      arrays[map_folder('target', name)] = wanted
      if shard.mask is not None:
        arrays['masks'] = shard.mask * np.uint8(255)
    if attack == 'other':
      keep &= shard.other >= 0
      arrays = {}
      scores = {k: v for k, v in scores.items() if k not in ('linf', 'l2', 'out_of_set')}
    elif np.asarray(scores['out_of_set'])[shard.is_real].any():
      raise AssertionError(f'{attack} {name}: an image left the declared perturbation set')
    columns = {'id': shard.id, 'label': shard.label, 'target': shard.batch.target}
    records = as_records(scores, keep, **columns)
    kept = {folder: np.asarray(array)[keep] for folder, array in arrays.items()}
    self.workdir.write_shard(attack, name, records, kept, **(extras or {}))


def rows(setup: Setup, workdir: Workdir, num_skipped: int) -> Iterator[dict[str, Any]]:
  """The rows of metrics.json: one per interpreter and attack."""
  for name in setup.interpreters:
    for attack in ATTACKS:
      found = workdir.shards(attack, name)
      spent = {
        field: combine(shard.get(field, 0) for shard in found) if found else None
        for field, combine in (
          ('gradient_evaluations', max),
          ('network_passes', max),
          ('seconds', sum),
          ('seconds_compile', sum),
        )
      }
      yield {
        'interpreter': name,
        'attack': attack,
        'framework': setup.config['framework'],
        'target_map': setup.config['target_map'],
        'n_skipped': num_skipped,
        **metrics.aggregate(workdir.records(attack, name), attack not in NOT_PERTURBED),
        **spent,
      }


def environment(config: dict[str, Any]) -> dict[str, Any]:
  """What ran the attack."""
  command, here = ['git', 'rev-parse', '--short', 'HEAD'], pathlib.Path(__file__).parent
  commit = ''
  with contextlib.suppress(OSError):  # no git on this machine
    commit = subprocess.run(command, cwd=here, capture_output=True, text=True, check=False).stdout
  devices = devices_of(config)
  return {
    'jax': jax.__version__,
    'devices': f'{len(devices)} × {devices[0].device_kind}',
    'commit': commit.strip() or None,
  }


TABLE = {
  'asr': 'ASR',
  'mc': 'MC',
  'map_l1': 'map L1',
  'map_iou': 'IoU',
  'map_spearman': 'Spearman',
  'out_of_set': 'outside',
  'gradient_evaluations': 'evals',
  'seconds': 'seconds',
}


def table(found: list[dict[str, Any]]) -> str:
  """The rows as a markdown table."""
  lines = ['| interpreter | attack | n | ' + ' | '.join(TABLE.values()) + ' |']
  lines.append('|---' * (len(TABLE) + 3) + '|')
  for row in found:
    values = [row.get(field) for field in TABLE]
    cells = ['–' if v is None else f'{v:.3f}' if isinstance(v, float) else str(v) for v in values]
    lines.append(f'| {row["interpreter"]} | {row["attack"]} | {row["n"]} | {" | ".join(cells)} |')
  return '\n'.join(lines)


def run(config: dict[str, Any], workdir_flag: str | None, resume: bool) -> Workdir:
  """The whole command, once the flags are known."""
  setup = load(config)
  given = {}
  if config['target_map'] not in _targets.MAPS:
    given = _targets.read_maps(config['target_map'], config['interpreters'])
  workdir = Workdir.create(workdir_flag or default_workdir(config), config, resume)
  examples = select(setup)
  check_given_maps(setup, examples, given)
  done = {(a, name): workdir.done(a, name) for a in ATTACKS for name in setup.interpreters}
  # 'other' is left out: an example without another of its class never gets that record.
  whole = set.intersection(*(ids for (a, _), ids in done.items() if a != 'other'))
  for name in setup.interpreters:
    done['other', name] |= whole | set(examples.id[examples.other < 0].tolist())
  left = np.flatnonzero(~np.isin(examples.id, list(whole)))
  total = len(left) * (1 + len(setup.interpreters))
  with tqdm.tqdm(total=total, unit='img', mininterval=1, dynamic_ncols=True) as bar:
    bar.bar_format = '{percentage:3.0f}%|{bar}| {elapsed}<{remaining}, {rate_fmt}{postfix}'
    progress = Run(setup, workdir, done, given, bar, Stopwatch())
    for shard in shards(setup, examples, left):
      progress.one_shard(shard)
  found = list(rows(setup, workdir, examples.num_skipped))
  workdir.finish(found, environment(config), setup.dataset.class_names)
  print(table(found))
  print(report.write_report(workdir.path))
  return workdir


def main(argv: list[str]) -> None:
  """Runs the command; bad input ends with one line on stderr and exit code 1."""
  if len(argv) > 1:
    raise app.UsageError(f'unexpected argument {argv[1]!r}')
  config = _flags.config()
  try:
    _flags.check(config)
    run(config, FLAGS.workdir, FLAGS.resume)
  except InputError as error:
    sys.exit(str(error))


if __name__ == '__main__':
  _flags.define_data_flags()
  _flags.define_attack_flags()
  _flags.start(main)
