"""The attack step of experiments.bench as an eager PyTorch loop; imports torch (extra `bench`)."""

from collections.abc import Callable, Mapping

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

BLOCKS = {
  'resnet18': (2, 2, 2, 2),
  'resnet34': (3, 4, 6, 3),
  'resnet50': (3, 4, 6, 3),
  'resnet101': (3, 4, 23, 3),
}


class SoftReLU(torch.autograd.Function):
  """max(z, 0) with the derivative h(z) of `adv2_jax.nets.soft_relu`, printed form, τ = 1e-4."""

  @staticmethod
  def forward(ctx, z):
    ctx.save_for_backward(z)
    return z.clamp(min=0)

  @staticmethod
  def backward(ctx, g):
    (z,) = ctx.saved_tensors
    r = z * torch.rsqrt(z * z + 1e-4)
    return g * torch.where(z < 0, 1 + r, r)


def conv_norm(inputs: int, outputs: int, size: int, stride: int = 1) -> tuple[nn.Module, nn.Module]:
  """A convolution without bias and its batch norm."""
  conv = nn.Conv2d(inputs, outputs, size, stride, size // 2, bias=False)
  return conv, nn.BatchNorm2d(outputs)


class Block(nn.Module):
  """Basic or bottleneck block, as torchvision's."""

  def __init__(self, inputs: int, width: int, stride: int, bottleneck: bool):
    super().__init__()
    outputs = 4 * width if bottleneck else width
    layers = [(width, 1, 1), (width, 3, stride), (outputs, 1, 1)]
    layers = layers if bottleneck else [(width, 3, stride), (width, 3, 1)]
    channels = inputs
    for i, (out, size, step) in enumerate(layers, 1):
      conv, norm = conv_norm(channels, out, size, step)
      self.add_module(f'conv{i}', conv)
      self.add_module(f'bn{i}', norm)
      channels = out
    self.layers = [(getattr(self, f'conv{i + 1}'), getattr(self, f'bn{i + 1}'))
                   for i in range(len(layers))]  # fmt: skip
    self.downsample = None
    if stride > 1 or inputs != outputs:
      self.downsample = nn.Sequential(*conv_norm(inputs, outputs, 1, stride))

  def forward(self, x, act):
    y = x
    for conv, norm in self.layers[:-1]:
      y = act(norm(conv(y)))
    conv, norm = self.layers[-1]
    return act(norm(conv(y)) + (x if self.downsample is None else self.downsample(x)))


class ResNet(nn.Module):
  """ResNet with torchvision's names; gives logits and the last features [B,F,h,w]."""

  def __init__(self, name: str, num_classes: int):
    super().__init__()
    bottleneck = name in ('resnet50', 'resnet101')
    self.conv1, self.bn1 = conv_norm(3, 64, 7, 2)
    channels = 64
    for stage, blocks in enumerate(BLOCKS[name]):
      width = 64 * 2**stage
      made = []
      for i in range(blocks):
        made.append(Block(channels, width, 2 if stage and not i else 1, bottleneck))
        channels = 4 * width if bottleneck else width
      self.add_module(f'layer{stage + 1}', nn.ModuleList(made))
    self.fc = nn.Linear(channels, num_classes)

  def forward(self, x, act):
    x = F.max_pool2d(act(self.bn1(self.conv1(x))), 3, 2, 1)
    for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
      for block in stage:
        x = block(x, act)
    return self.fc(x.float().mean((2, 3))), x


def has_cuda() -> bool:
  """Whether PyTorch sees a GPU too."""
  return torch.cuda.is_available()


def make(
  model: str,
  tensors: Mapping[str, np.ndarray],
  mean: tuple[float, ...],
  std: tuple[float, ...],
  dtype: str,
  device: str,
) -> Callable[..., Callable[[int], np.ndarray]]:
  """(step, x0, target, target_map, λ, ε, α) -> a function that does n steps from x0.

  That function returns the first step's gradient, NHWC.
  """
  torch.backends.cudnn.allow_tf32 = False  # float32 means float32 on both sides
  net = ResNet(model, tensors['fc.bias'].shape[0])
  net.load_state_dict({k: torch.tensor(v) for k, v in tensors.items()}, strict=False)
  net.eval().requires_grad_(False).to(device)
  mean_, std_ = (torch.tensor(v, device=device).view(1, -1, 1, 1) for v in (mean, std))
  autocast = torch.autocast(device, torch.bfloat16, enabled=dtype == 'bfloat16')

  def min_max(m):
    low = m.amin((1, 2), keepdim=True)
    return (m - low) / (m.amax((1, 2), keepdim=True) - low)

  def cam(x, target):
    logits, features = net((x - mean_) / std_, F.relu)
    return logits, min_max(torch.einsum('bfhw,bf->bhw', features.float(), net.fc.weight[target]))

  def grad(x, target):
    logits, _ = net((x - mean_) / std_, SoftReLU.apply)
    score = torch.logsumexp(logits.scatter(1, target[:, None], -torch.inf), 1)
    score = score - logits.gather(1, target[:, None])[:, 0]
    (g,) = torch.autograd.grad(score.sum(), x, create_graph=True)
    return logits, min_max(F.avg_pool2d(g.float().abs().amax(1)[:, None], 4)[:, 0])

  def bind(step, x0, target, target_map, weight, epsilon, alpha):
    explain = {'cam': cam, 'grad': grad}[step]
    x0 = torch.tensor(x0.transpose(0, 3, 1, 2).copy(), device=device)
    target, target_map = (torch.tensor(v, device=device) for v in (target, target_map))

    def run(n: int) -> np.ndarray:
      x, first = x0, None
      for _ in range(n):
        x = x.detach().requires_grad_(True)
        with autocast:
          logits, maps = explain(x, target)
        loss = F.cross_entropy(logits.float(), target.long(), reduction='sum')
        loss = loss + weight * ((maps - target_map) ** 2).mean((1, 2)).sum()
        (g,) = torch.autograd.grad(loss, x)
        first = g if first is None else first
        x = (x0 + (x - alpha * g.sign() - x0).clamp(-epsilon, epsilon)).clamp(0, 1)
      return first.float().cpu().numpy().transpose(0, 2, 3, 1)  # waits for the device

    return run

  return bind
