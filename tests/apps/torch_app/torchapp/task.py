"""The model, the data, training and testing."""

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

DATA: dict[str, torch.Tensor] = {}


class Net(nn.Module):
    """A network with batch normalisation, whose counters are integers."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = nn.Linear(64, 32)
        self.norm = nn.BatchNorm1d(32)
        self.out = nn.Linear(32, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(torch.relu(self.norm(self.hidden(x))))


def digits() -> tuple[torch.Tensor, torch.Tensor]:
    """Returns images and labels, loaded once in a process."""
    if not DATA:
        images, labels = load_digits(return_X_y=True)
        DATA["x"] = torch.tensor(images / 16, dtype=torch.float32)
        DATA["y"] = torch.tensor(labels)
    return DATA["x"], DATA["y"]


def load_data(partition_id: int, num_partitions: int) -> tuple[DataLoader, DataLoader]:
    """Returns a node's batches for training, shuffled, and for testing."""
    x, y = digits()
    rows = torch.arange(partition_id, len(x), num_partitions)
    cut = int(0.8 * len(rows))
    train = TensorDataset(x[rows[:cut]], y[rows[:cut]])
    test = TensorDataset(x[rows[cut:]], y[rows[cut:]])
    return DataLoader(train, batch_size=32, shuffle=True), DataLoader(test, batch_size=32)


def train(net: Net, batches: DataLoader, epochs: int, lr: float) -> float:
    """Trains in place and returns the mean loss."""
    optimizer = torch.optim.SGD(net.parameters(), lr=lr, momentum=0.9)
    net.train()
    losses = []
    for _ in range(epochs):
        for x, y in batches:
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(net(x), y)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    return sum(losses) / len(losses)


def test(net: Net, batches: DataLoader) -> tuple[float, float]:
    """Returns the loss and the accuracy."""
    net.eval()
    loss = correct = count = 0.0
    with torch.no_grad():
        for x, y in batches:
            outputs = net(x)
            loss += nn.functional.cross_entropy(outputs, y, reduction="sum").item()
            correct += (outputs.argmax(1) == y).sum().item()
            count += len(y)
    return loss / count, correct / count
