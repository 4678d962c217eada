"""The networks once more, in plain torch modules: nothing of pipeline's arithmetic is in here."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

import torch
import torch.nn.functional as F
from ranks import SEED, mean_image
from torch import Tensor, nn

from pipeline import randomness
from pipeline.network import Network
from pipeline.training import Images


class Within(nn.Module):
    """The paper's response normalisation, of each column's maps apart."""

    def __init__(
        self, size: int, alpha: float, beta: float = 0.75, k: float = 2.0, columns: int = 2
    ) -> None:
        super().__init__()
        self.columns = columns
        # torch divides alpha by the window, the paper's formula does not.
        self.norm = nn.LocalResponseNorm(size, alpha * size, beta, k)

    def forward(self, x: Tensor) -> Tensor:
        n, maps, height, width = x.shape
        parts = x.reshape(n * self.columns, maps // self.columns, height, width)
        return self.norm(parts).reshape(x.shape)


class Around(nn.Module):
    """Normalisation over size x size positions of the same map."""

    def __init__(self, size: int, alpha: float, beta: float = 0.75, k: float = 1.0) -> None:
        super().__init__()
        self.size, self.alpha, self.beta, self.k = size, alpha, beta, k

    def forward(self, x: Tensor) -> Tensor:
        n, maps, height, width = x.shape
        windows = F.unfold(x.square(), self.size, padding=self.size // 2)
        sums = windows.reshape(n, maps, self.size**2, height, width).sum(2)
        return x / (self.k + self.alpha * sums) ** self.beta


class Halves(nn.Module):
    """A full layer of which each half reads its own half."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs // 2))
        self.bias = nn.Parameter(torch.empty(outputs))

    def forward(self, x: Tensor) -> Tensor:
        mine = -(-len(self.bias) // 2)
        a, b = x.chunk(2, dim=1)
        w, bias = self.weight, self.bias
        first, second = F.linear(a, w[:mine], bias[:mine]), F.linear(b, w[mine:], bias[mine:])
        return torch.cat((first, second), dim=1)


class Drop(nn.Module):
    """Dropout by the masks of step 7 of the whole batch."""

    def __init__(self, layer: str, rate: float) -> None:
        super().__init__()
        self.layer, self.rate = layer, rate

    def forward(self, x: Tensor) -> Tensor:
        key = randomness.key(SEED, "dropout", 7, self.layer)
        rows, units = torch.arange(len(x)), x.shape[1]
        keep = randomness.keep_mask(rows, 0, units, units, self.rate, key)
        return torch.where(keep, x / (1 - self.rate), 0.0)


def _alexnet(
    maps: tuple[int, int, int, int, int], stride: int, flat: int, full: int, classes: int
) -> nn.Sequential:
    a, b, c, d, e = maps
    return nn.Sequential(
        OrderedDict(
            conv1=nn.Conv2d(3, a, 11, stride, padding=2),
            relu1=nn.ReLU(),
            norm1=Within(5, 1e-4),
            pool1=nn.MaxPool2d(3, 2),
            conv2=nn.Conv2d(a, b, 5, padding=2, groups=2),
            relu2=nn.ReLU(),
            norm2=Within(5, 1e-4),
            pool2=nn.MaxPool2d(3, 2),
            conv3=nn.Conv2d(b, c, 3, padding=1),
            relu3=nn.ReLU(),
            conv4=nn.Conv2d(c, d, 3, padding=1, groups=2),
            relu4=nn.ReLU(),
            conv5=nn.Conv2d(d, e, 3, padding=1, groups=2),
            relu5=nn.ReLU(),
            pool5=nn.MaxPool2d(3, 2),
            flat=nn.Flatten(),
            fc6=nn.Linear(flat, full),
            relu6=nn.ReLU(),
            drop6=Drop("fc6", 0.5),
            fc7=nn.Linear(full, full),
            relu7=nn.ReLU(),
            drop7=Drop("fc7", 0.5),
            fc8=nn.Linear(full, classes),
        )
    )


def alexnet(classes: int) -> nn.Sequential:
    return _alexnet((96, 256, 384, 384, 256), 4, 9216, 4096, classes)


def alexnet_mini(classes: int) -> nn.Sequential:
    return _alexnet((32, 64, 96, 96, 64), 3, 64, 1024, classes)


def alexnet_2012(classes: int) -> nn.Sequential:
    layers = alexnet(classes)
    layers.relu1, layers.norm1, layers.pool1 = Within(5, 2e-5), nn.MaxPool2d(3, 2), nn.ReLU()
    layers.conv1 = nn.Sequential(nn.ZeroPad2d((0, 3, 0, 3)), nn.Conv2d(3, 96, 11, 4))
    layers.norm2 = nn.Sequential(Within(5, 2e-5), Around(5, 4e-5))
    layers.relu5, layers.pool5, layers.flat = nn.MaxPool2d(3, 2), nn.ReLU(), nn.Flatten()
    return layers


def cifar(classes: int) -> nn.Sequential:
    return nn.Sequential(
        OrderedDict(
            conv1=nn.Conv2d(3, 64, 5, padding=2),
            relu1=nn.ReLU(),
            norm1=Within(5, 1e-4, k=1.0),
            pool1=nn.MaxPool2d(3, 2),
            conv2=nn.Conv2d(64, 64, 5, padding=2, groups=2),
            relu2=nn.ReLU(),
            norm2=Within(5, 1e-4, k=1.0),
            pool2=nn.MaxPool2d(3, 2),
            conv3=nn.Conv2d(64, 128, 3, padding=1),
            relu3=nn.ReLU(),
            pool3=nn.MaxPool2d(3, 2),
            flat=nn.Flatten(),
            fc4=nn.Linear(128 * 3 * 3, classes),
        )
    )


TABLES: dict[str, Callable[[int], nn.Sequential]] = {
    "alexnet": alexnet,
    "alexnet-2012": alexnet_2012,
    "alexnet-mini": alexnet_mini,
    "cifar": cifar,
}


def from_table(network: Network) -> nn.Sequential:
    """The modules that a table of layers of one's own stands for."""
    modules: list[nn.Module] = []
    for index, layer in enumerate(network.layers):
        inputs = network.inputs(index)
        alone = network.columns == 1 or index == 0 or layer.crosses
        if layer.kind == "conv":
            before, after = layer.padding
            modules.append(nn.ZeroPad2d((before, after, before, after)))
            groups = 1 if alone else 2
            modules.append(
                nn.Conv2d(inputs.maps, layer.maps, layer.kernel, layer.stride, groups=groups)
            )
        else:
            modules.append(nn.Flatten())
            modules.append((nn.Linear if alone else Halves)(inputs.units, layer.maps))
        for step in layer.order:
            if step == "activation" and layer.activation:
                modules.append(nn.ReLU() if layer.activation == "relu" else nn.Tanh())
            if step == "pool" and layer.pool:
                modules.append(nn.MaxPool2d(layer.pool.size, layer.pool.stride))
            if step == "norm":
                for norm in layer.norms:
                    values = norm.size, norm.alpha, norm.beta, norm.k
                    modules.append(
                        Around(*values) if norm.spatial else Within(*values, network.columns)
                    )
        if layer.dropout:
            modules.append(Drop(layer.name, layer.dropout))
    return nn.Sequential(*modules)


def gradients(
    network: Network,
    modules: nn.Sequential,
    weights: dict[str, Tensor],
    images: Images,
    scale: float = 1 / 64,
) -> tuple[float, dict[str, Tensor]]:
    """The mean loss over the images and its gradients, with these weights, in float64.

    `modules` may have been made on the meta device, which saves drawing weights for nothing."""
    modules.double().to_empty(device="cpu")
    parameters = list(modules.parameters())
    with torch.no_grad():
        for parameter, weight in zip(parameters, weights.values(), strict=True):
            parameter.copy_(weight)
    pixels = images.crops.double() - mean_image(network).double()
    pixels = (pixels + images.shifts.double()[:, None, None]) * scale
    logits = modules(pixels.permute(0, 3, 1, 2).contiguous())
    loss = F.cross_entropy(logits, images.labels)
    return loss.item(), dict(zip(weights, torch.autograd.grad(loss, parameters), strict=True))
