r"""Shows the images of a run to others: `python -m experiments.transfer --workdir DIR`.

    python -m experiments.transfer --workdir runs/… --interpreters grad,cam,mask,rts
    python -m experiments.transfer --workdir runs/… --model resnet18 --weights resnet18.npz

Do images that were made to deceive one interpreter deceive one that was not attacked, or another
classifier? Each interpreter that looks is its own measure: its map of the class the analyst sees,
on the attacked image, is compared with its map of the true class on the clean image, the benign
one, whatever map the attack aimed at. The rows of PGD, which attacks no interpreter, are the scale.
Nothing of the attack is run.

Writes transfer/transfer.json, .csv, .md and .png into the working directory. Rows of earlier calls
stay, unless the same interpreter and classifier have looked again.
"""

import hashlib
import json
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tqdm

from adv2_jax import images, metrics, validate
from adv2_jax.classifier import Classifier
from adv2_jax.interpreters.base import Interpreter
from adv2_jax.types import InputError
from adv2_jax.weights import zoo
from adv2_jax.workdir import figures, store
from adv2_jax.workdir.results import Results, read_parts
from experiments import _digests, _flags, _judge, _matrix, _printed, _setup

NOBODY = 'none'  # what PGD attacks, of interpreters
OF_THE_ATTACK = ('zero_gradient', 'nonfinite_gradient')


class Made(NamedTuple):
  """Images of one attack: whose records tell about them, and the interpreters that it attacked."""

  attack: str
  interpreter: str
  attacked: tuple[str, ...]

  def name(self, seen_by: str) -> str:
    """`attacked` of the row of an interpreter that looks."""
    if self.attack == 'adv2_joint':
      return 'joint' if seen_by in self.attacked else f'joint-without-{seen_by}'
    return self.interpreter if self.attacked else NOBODY


class Looking(NamedTuple):
  """Who looks: the flags as if the run had been made with them, and what they stand for."""

  config: dict[str, Any]
  clf: Classifier
  interpreters: dict[str, Interpreter]


def looking(results: Results, flags: Mapping[str, Any]) -> Looking:
  """Loads who looks; InputError where that cannot be compared with the run."""
  own, names = dict(results.config), flags['interpreters'] or results.interpreters
  given = {k: flags[k] for k in ('weights', 'decoder', 'mean', 'std') if flags[k]}
  if flags['model'] or flags['weights']:
    unknown = dict.fromkeys(('weights', 'decoder', 'mean', 'std'))
    config = own | unknown | given | {'model': flags['model'] or own['model']}
    decoder = config['decoder'] or zoo.built_in_decoder(config['model'], config['weights'])
    if not flags['interpreters'] and decoder is None:
      names = [name for name in names if name != 'rts']
  elif flags['mean'] or flags['std']:
    raise InputError('--mean and --std are of another classifier: give --model or --weights, too')
  else:
    config = own | given
    store.check_digests(results.path, own, _digests.of_weights(own))
  _flags.check_interpreters(names, flags['decoder'])
  config['interpreters'] = names
  clf, built = _setup.models(config)
  _setup.check_fit(clf, built, _setup.image_size(own))
  if _matrix.classifier_of(config) != _matrix.classifier_of(own):
    _check_classes(results, config, clf)
  return Looking(config, clf, built)


def _check_classes(results: Results, config: Mapping[str, Any], clf: Classifier) -> None:
  """InputError unless the other classifier's classes are those of the run."""
  own, size = dict(results.config), _setup.image_size(results.config)
  x = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
  attacked, _ = _setup.models(own | {'interpreters': []})
  n, expected = (jax.eval_shape(c, x).logits.shape[-1] for c in (clf, attacked))
  model, weights = _matrix.classifier_of(config)
  remedy = f'give a classifier of the run’s data set, {own["dataset"]}'
  if n != expected:
    raise InputError(
      f'--model {model} with {weights} has {n} classes, the one attacked in {results.path} '
      f'{expected}; {remedy}'
    )
  names = zoo.read_card(zoo.resolve(weights)).get('class_names') or ()
  known = {int(k): name for k, name in results.class_names.items()}
  if len(names) == n and known:
    plain = lambda name: name.lower().partition(',')[0].strip()  # noqa: E731
    others = [k for k, name in known.items() if plain(names[k]) != plain(name)]
    if len(others) > len(known) / 2:  # a few may be synonyms
      k = others[0]
      raise InputError(
        f'--model {model} with {weights} knows class {k} as {names[k]!r}, the run in '
        f'{results.path} as {known[k]!r}; {remedy}'
      )


def made(results: Results) -> list[Made]:
  """All images that a run's attacks have made, each with the same examples; or InputError."""
  of = lambda attack: [r['interpreter'] for r in results.rows if r['attack'] == attack and r['n']]  # noqa: E731
  found = [Made('pgd', name, ()) for name in of('pgd')[:1]]
  found += [Made('adv2', name, (name,)) for name in of('adv2')]
  found += [Made('adv2_joint', name, tuple(of('adv2_joint'))) for name in of('adv2_joint')[:1]]
  if not found:
    raise InputError(f'{results.path} has no attacked images: its rows are of clean ones alone')
  for m in found:
    if _ids(results, m) != _ids(results, found[0]):
      raise _judge.Disagreement(
        f'examples.csv has other examples of {m.attack} on {m.interpreter} than of '
        f'{found[0].attack}; get the run in {results.path} again'
      )
  return found


def _ids(results: Results, m: Made) -> list[int]:
  return results.examples[m.attack, m.interpreter]['id'].astype(int).tolist()


def rows(
  results: Results, who: Looking, found: Sequence[Made], bar: tqdm.tqdm
) -> Iterator[dict[str, Any]]:
  """One per interpreter that looks, and attack whose images it looks at."""
  ids = _ids(results, found[0])
  size = min(len(ids), results.config['batch_size'])
  model, weights = _matrix.classifier_of(who.config)
  for name, interpreter in who.interpreters.items():
    records: list[list[dict[str, Any]]] = [[] for _ in found]
    right: list[bool] = []
    for batch in _judge.batches(ids, size):
      told, is_right = _judged(results, who.clf, name, interpreter, found, batch, size, bar)
      right += is_right
      for one, more in zip(records, told, strict=True):
        one += more
    for m, one in zip(found, records, strict=True):
      told_of = metrics.aggregate(one)
      yield {
        'attack': m.attack,
        'attacked': m.name(name),
        'seen_by': name,
        'model': model,
        'weights': weights,
        'clean_accuracy': sum(right) / len(right),
        **{k: v for k, v in told_of.items() if k not in OF_THE_ATTACK},
      }


def _judged(
  results: Results,
  clf: Classifier,
  name: str,
  interpreter: Interpreter,
  found: Sequence[Made],
  ids: list[int],
  size: int,
  bar: tqdm.tqdm,
) -> tuple[list[list[dict[str, Any]]], list[bool]]:
  """A batch's records, attack by attack; whether its clean images are classified correctly."""
  padded = np.resize(ids, size).tolist()
  is_real = np.arange(size) < len(ids)
  column = lambda m, field: jnp.array(  # noqa: E731
    [int(results.example(m.attack, m.interpreter, i)[field]) for i in padded]
  )
  label = column(found[0], 'label')
  validate.explicable(label, interpreter, 'label', padded)
  keys = metrics.judge_keys(results.config['seed'], np.array(padded))
  clean = _judge.read_images(results, 'benign', name, padded)
  mask = _judge.read_masks(results, padded, clean.shape[1:3])
  right = np.asarray(_judge.predictions(clf, clean) == label)[is_real].tolist()
  told, before = [], None
  for m in found:
    x8 = _judge.read_images(results, m.attack, m.interpreter, padded)
    if results.config.get('target_label') == 'untargeted':
      target = _judge.runners_up(clf, x8, label)  # any wrong class counts
    else:
      target = column(m, 'target')
    if before is None or (target != before).any():
      bar.set_postfix_str(f'{name} looks at clean images')
      validate.explicable(target, interpreter, 'target', padded)
      clean_maps = _judge.two_class_maps(clf, interpreter, clean, label, target, keys)
      before = target
    bar.set_postfix_str(f'{name} looks at {m.attack}{f" on {m.name(name)}" * bool(m.attacked)}')
    scores = _judge.score(
      clf,
      clean,
      x8,
      target,
      clean_maps[0],
      clean_maps,
      _judge.two_class_maps(clf, interpreter, x8, label, target, keys),
      **_judge.bounds(results.config),
      attacked=True,
      mask=mask,
    )
    told.append(store.as_records(scores, is_real, id=padded))
    bar.update(len(ids))
  return told, right


def _csv(found: Sequence[Mapping[str, Any]]) -> bytes:
  flat = [{k: v for k, v in row.items() if k != 'asr_ci95'} for row in found]
  for row, line in zip(found, flat, strict=True):
    line['asr_low'], line['asr_high'] = row['asr_ci95'] or (None, None)
  return _printed.to_csv(flat)


def run(flags: dict[str, Any]) -> list[pathlib.Path]:
  """The whole command, once the flags are known; a folder for each radius of the run."""
  return [show(results, flags) for results in read_parts(flags['workdir'])]


def show(results: Results, flags: dict[str, Any]) -> pathlib.Path:
  """Shows the images of one radius."""
  found = made(results)
  who = looking(results, flags)
  total = len(_ids(results, found[0])) * len(found) * len(who.interpreters)
  with tqdm.tqdm(total=total, unit='img', mininterval=1, dynamic_ncols=True) as bar:
    new = list(rows(results, who, found, bar))
  folder = results.path / 'transfer'
  digest = hashlib.sha256((results.path / 'examples.csv').read_bytes()).hexdigest()
  told = [*_earlier(folder / 'transfer.json', digest, new), *new]
  report = {
    'config': flags,
    'environment': _judge.environment(who.config),
    'run': digest,
    'compared_with': 'the benign map of the interpreter that looks, on the classifier that looks',
    'rows': told,
  }
  own = _matrix.classifier_of(results.config)
  text = _matrix.markdown(told, own)
  with figures.style():
    drawing = figures.png(_matrix.draw(told, own))
  files = {
    'png': drawing,
    'md': text.encode(),
    'csv': _csv(told),
    'json': (json.dumps(store.plain(report), indent=1, allow_nan=False) + '\n').encode(),
  }
  with store.writing(folder, 'make room, then start it again'):
    for kind, content in files.items():
      images.write_atomic(folder / f'transfer.{kind}', content)
  if isinstance(epsilon := results.config.get('epsilon'), float):
    print(f'ε {epsilon:.4g}\n')
  print(text)
  print(folder / 'transfer.json')
  return folder


def _earlier(
  file: pathlib.Path, digest: str, new: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
  """Rows of earlier calls on the same images, by others than those who look now."""
  if not file.exists():
    return []
  known = store.read_json(file, 'is damaged; remove it')
  who = lambda row: [row.get(k) for k in ('seen_by', 'model', 'weights')]  # noqa: E731
  fresh = [who(row) for row in new]
  return [r for r in known['rows'] if known.get('run') == digest and who(r) not in fresh]


if __name__ == '__main__':
  _flags.define_transfer_flags()
  _flags.start(run)
