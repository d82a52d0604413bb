"""`experiments.tables`: what it runs, and how the tables are written."""

import csv
import io
import json
import shlex

import pytest
from cli import FLAGS_OF
from conftest import flag_defaults

from adv2_jax import images
from adv2_jax.types import InputError
from adv2_jax.weights import zoo
from experiments import _programme, tables

SCENES = _programme.subjects({'scale': 'cpu', 'on': None, 'scenes': True})[0]
DEFAULTS = flag_defaults(*FLAGS_OF['tables'])


START = tables._start


def runs_of(name, subject=SCENES):
  return list(tables.TABLES[name].cases(subject))


def test_the_numbers_of_images():
  """E1, E2: 256, of MASK 64; what all four take part in: 64."""
  found = [
    [case, *map(run.flags.get, ('interpreters', 'num_examples', 'preset'))]
    for case, run in runs_of('E1')
  ]
  sizes = [('grad,cam,rts', '256'), ('mask', '64')]
  assert found == [[p or '', *size, p] for p in (None, 'thorough') for size in sizes]
  assert runs_of('E1') == runs_of('E2')
  assert [run.flags['num_examples'] for _, run in runs_of('E3')] == ['64', '16'] * 2


def test_the_joint_attack_is_made_on_all_15_subsets():
  cases = runs_of('joint')
  found = {frozenset(case.split('+')) for case, _ in cases if case != 'radii'}
  assert len(found) == 11  # with the four single ones in the run of all
  assert cases[0][1].flags['interpreters'] == 'grad,cam,mask,rts,joint'
  shared = {run.folder('scenes') for _, run in runs_of('E6')}
  assert len(shared) == 5
  assert shared <= {run.folder('scenes') for _, run in cases}


def test_every_run_is_one_that_the_command_takes():
  for name in tables.TABLES:
    for _, run in runs_of(name):
      flags = flag_defaults(*FLAGS_OF['attack'])
      assert run.flags.keys() <= flags.keys()


def test_a_decoder_goes_where_rts_is(tmp_path):
  """Among the interpreters of an attack, or among those that look on; its classes go everywhere."""
  decoder = tmp_path / 'd.safetensors'
  decoder.touch()
  card = dict.fromkeys(zoo.CARD_FIELDS) | {'classes': [3, 5, 8]}
  decoder.with_suffix('.json').write_text(json.dumps(card))
  config = {'scale': 'cpu', 'on': [f'own 8 --decoder {decoder}'], 'scenes': False}
  (subject,) = _programme.subjects(config)
  found = [run for name in tables.TABLES for _, run in runs_of(name, subject)]
  for run in found:
    has_rts = 'rts' in run.flags['interpreters'].split(',')
    assert run.flags.get('decoder') == (str(decoder) if has_rts else None)
    has_targets = not has_rts and run.flags.get('goal') != 'map_only'
    assert run.flags.get('target_classes') == ('3,5,8' if has_targets else None)
  own = _programme.subjects(config | {'on': [f'own --decoder {decoder} --target_classes 3,5']})[0]
  found_own = [run.flags for name in tables.TABLES for _, run in runs_of(name, own)]
  for flags in found_own:
    expected = None if flags.get('goal') == 'map_only' else '3,5'
    assert flags.get('target_classes') == expected
  least = _programme.subjects(
    config | {'on': [f'own --decoder {decoder} --target_label least_likely']}
  )[0]
  assert not any('target_classes' in run.flags for _, run in runs_of('joint', least))
  onlooking = [run for run in found if 'rts' in run.shown_to and 'decoder' not in run.flags]
  assert onlooking
  assert {run.decoder for run in onlooking} == {str(decoder)}


def test_a_directory_belongs_to_its_flags():
  (_, one), (_, other), *_ = runs_of('E1')
  assert one.folder('scenes') == _programme.Run(dict(reversed(one.flags.items()))).folder('scenes')
  assert one.folder('scenes') != other.folder('scenes')
  assert one.folder('scenes').startswith('scenes-')


def test_other_data_are_named_with_their_flags():
  text = 'cifar 200/24 --dataset packed --data_path=a.npz --shuffle --model cifar_resnet20'
  config = {'scale': 'cpu', 'on': [text], 'scenes': False}
  (subject,) = _programme.subjects(config)
  assert subject.name == 'cifar'
  assert (subject.scale.num, subject.scale.num_slow) == (200, 24)
  assert subject.interpreters == ('grad', 'cam', 'mask')  # no decoder is built in
  run = runs_of('E1', subject)[0][1]
  command = tables.command_of('attack', run.flags)
  assert shlex.join(command).startswith(
    'python -m experiments.attack --dataset=packed --data_path=a.npz --shuffle --model='
  )
  more = [text + ' --interpreters cam,rts --decoder scene_rts']
  assert _programme.subjects(config | {'on': more})[0].interpreters == ('cam', 'rts')


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'table': ['E99']}, "--table is 'E99'; expected some of E1, E2"),
    ({'table': []}, "--table is ''; expected some of"),
    ({'on': ['cifar']}, "--on is 'cifar'; expected a name and flags"),
    ({'on': ['--dataset scenes']}, 'expected a name and flags'),
    ({'on': ["a 'b"]}, 'expected a name and flags'),
    ({'on': ['a 0/5 --seed 3']}, '--on a: expected how many images'),
    ({'on': ['a x --seed 3']}, '--on a: expected how many images'),
    ({'on': ['a 5 seed 3']}, "--on a: 'seed' is no flag"),
    ({'on': ['a --workdir x']}, '--on a: --workdir is what the tables set'),
    ({'on': ['scenes --seed 3']}, 'expected names that differ'),
    ({'scenes': False}, '--noscenes leaves nothing'),
    ({'jobs': 0}, '--jobs is 0; expected how many runs at a time'),
  ],
)
def test_refusals(tmp_path, changes, message):
  config = DEFAULTS | {'table': ['E1'], 'workdir': str(tmp_path / 'out')} | changes
  with pytest.raises(InputError, match=message):
    tables.run(config)
  assert not (tmp_path / 'out').exists()


def row(interpreter, attack, map_l1, **more):
  figures = {'n': 4, 'asr': 1.0, 'asr_ci95': [0.5, 1.0], 'map_l1': map_l1, 'map_iou': 0.5}
  return {'interpreter': interpreter, 'attack': attack, **figures, 'seconds': 8.0, **more}


@pytest.fixture
def workdir(tmp_path, monkeypatch):
  """A run of every case of E1 that is finished: nothing may be started."""
  monkeypatch.setattr(tables, '_start', lambda *_: pytest.fail('a finished run is used again'))
  for _, run in runs_of('E1'):
    folder = tmp_path / run.folder('scenes')
    folder.mkdir()
    rows = [
      row(name, attack, 0.4 if attack == 'pgd' else 0.1)
      for name in run.flags['interpreters'].split(',')
      for attack in ('benign', 'other', 'pgd', 'adv2')
    ]
    told = {'config': {}, 'rows': rows, 'environment': {'devices': '1 × cpu', 'jax': '0.9'}}
    (folder / 'metrics.json').write_text(json.dumps(told))
    (folder / 'examples.csv').write_text('id,attack,interpreter\n')
  return tmp_path


def test_runs_that_exist_fill_the_table(workdir, capsys):
  tables.run(DEFAULTS | {'table': ['E1', 'E2'], 'workdir': str(workdir)})
  lines = list(csv.DictReader(io.StringIO((workdir / 'E2.csv').read_text())))
  assert [(r['interpreter'], r['attack']) for r in lines] == [
    (name, attack)
    for name in 2 * ('grad', 'cam', 'rts', 'mask')
    for attack in ('other', 'pgd', 'adv2')
  ]
  assert [float(r['map_l1_of_pgd']) for r in lines[:3]] == pytest.approx([0.25, 1.0, 0.25])
  assert float(lines[0]['seconds_per_image']) == 2.0
  text = (workdir / 'E2.md').read_text()
  assert '| case | interpreter | attack | n | map L1 | L1 / PGD’s | IoU |' in text
  assert '|  | grad | ADV² | 4 | 0.100 | 0.250 | 0.500 |' in text
  assert '| thorough | cam | PGD | 4 | 0.400 | 1.000 | 0.500 |' in text
  assert f'--workdir={workdir}/scenes-' in text
  assert 'Made on 1 × cpu, jax 0.9 by' in text
  assert text in capsys.readouterr().out
  tex = (workdir / 'E1.tex').read_text()
  assert r' & grad & ADV\textsuperscript{2} & 4 & 1.000 & 0.500--1.000 \\' in tex
  assert tex.count(r'\\') == 1 + 16
  assert r'case & interpreter & attack & n & ASR & 95 \% \\' in tex
  assert images.read_image(workdir / 'E1.png').std() > 5


def test_a_run_that_fails_is_told(workdir):
  """And the tables that do not need it are made."""
  (case, one), _, (_, good), _ = runs_of('E3')
  assert case == 'random patch'
  config = DEFAULTS | {'table': ['E3', 'E1'], 'workdir': str(workdir)}
  bad = one._replace(flags=one.flags | {'data_path': 'nowhere.npz', 'dataset': 'npz'})
  table = tables.TABLES['E3']._replace(cases=lambda subject: iter([(case, bad), ('', good)]))
  rows = next(workdir.glob('*/metrics.json')).read_bytes()
  (workdir / good.folder('scenes')).mkdir()
  (workdir / good.folder('scenes') / 'metrics.json').write_bytes(rows)
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(tables, '_start', START)
    patch.setitem(tables.TABLES, 'E3', table)
    with pytest.raises(InputError, match=r'no E3: .*target_map=random_patch.* ended with 1, see'):
      tables.run(config | {'jobs': 2})
  log = (workdir / bad.folder('scenes')).with_suffix('.log')
  assert 'nowhere.npz does not exist' in log.read_text()
  assert not (workdir / 'E3.md').exists()
  assert (workdir / 'E1.md').exists()


def test_data_with_other_interpreters_share_a_matrix():
  """Each number stands under who looked; a dash where nobody did."""
  rows = [
    {'data': d, 'attack': 'adv2', 'attacked': 'cam', 'seen_by': s, 'model': d, 'weights': d}
    | {'map_iou': v}
    for d, s, v in (('a', 'grad', 0.1), ('a', 'cam', 0.2), ('b', 'cam', 0.3), ('b', 'rts', 0.4))
  ]
  found = tables.grid(tables.TABLES['E6'], rows)
  assert found.head == ['data', 'attacked', *(f'IoU, seen by {n}' for n in ('grad', 'cam', 'rts'))]
  assert found.lines == [
    ['a', 'cam', '0.100', '0.200', '–'],
    ['b', 'cam', '–', '0.300', '0.400'],
  ]


@pytest.mark.slow
def test_all_tables_on_a_few_scenes(tmp_path):
  config = DEFAULTS | {'table': ['all'], 'scale': 'smoke', 'workdir': str(tmp_path), 'jobs': 2}
  tables.run(config)
  for name in tables.TABLES:
    for kind in ('csv', 'md', 'tex', 'png'):
      assert (tmp_path / f'{name}.{kind}').stat().st_size > 100
  found = list(csv.DictReader(io.StringIO((tmp_path / 'joint.csv').read_text())))
  assert {r['interpreter'] for r in found if r['attack'] == 'adv2_joint'} == {'cam', 'mask', 'rts'}
  assert {r['out_of_set'] for r in found} == {'0'}
  heat = (tmp_path / 'E6.md').read_text()
  for name in ('cam', 'mask', 'rts'):
    assert f'| joint without {name} |' in heat
  before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob('metrics.json')}
  tables.run(config)
  assert before == {p: p.stat().st_mtime_ns for p in tmp_path.rglob('metrics.json')}
