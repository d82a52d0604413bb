"""What classes are called in a report."""

import json
import types

import pytest

from experiments import _names


def known(tmp_path, class_names=None, data='data.npz'):
  """The names that a setup of weights and data in this folder finds, best first."""
  (tmp_path / 'net.npz').touch()
  config = {'weights': str(tmp_path / 'net.npz'), 'data_path': str(tmp_path / data)}
  dataset = types.SimpleNamespace(class_names=class_names)
  found = _names._known(types.SimpleNamespace(config=config, dataset=dataset))
  return [list(names) for names in found if names]


@pytest.mark.parametrize(
  ('file', 'content', 'names'),
  [
    ('imagenet_class_index.json', json.dumps({'1': ['n2', 'b_c'], '0': ['n1', 'a']}), ['a', 'b c']),
    ('imagenet_class_index.json', '[]', []),
    ('imagenet_class_index.json', '{', []),
    ('classes.txt', '\ufeffa\nb c\n\n', ['a', 'b c']),
  ],
)
def test_a_list_beside_weights_or_data(tmp_path, file, content, names):
  (tmp_path / file).write_text(content, encoding='utf-8')
  assert known(tmp_path)[:1] == ([names] if names else [])


def test_the_data_s_own_names_come_first(tmp_path):
  (tmp_path / 'classes.txt').write_text('a\nb')
  assert known(tmp_path, ('x', 'y'))[0] == ['x', 'y']


@pytest.mark.parametrize(
  ('data', 'n'), [('cifar10_test.npz', 10), ('cifar-10', 10), ('cifar100', 0)]
)
def test_cifar_10_is_known_by_its_file(tmp_path, data, n):
  assert [len(names) for names in known(tmp_path, data=data)] == ([n] if n else [])
