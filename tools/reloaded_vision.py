"""The recipe reloaded-vision: small image classifiers in fp32, b158 and absmedian, on digits.

    python tools/reloaded_vision.py          (configs/recipes/reloaded-vision/settings.yaml)
    python tools/reloaded_vision.py --models mlp --lr 1e-2 1e-3 1e-4 --weight-decay 0 1e-2

BitNet b1.58 Reloaded (arXiv:2407.09527) finds that small vision models of the same size lose
nothing to 1.58 bits, by the mean or by the median, and asks how that depends on learning rate and
weight decay. Verbatim: the two quantizers, by `bitlinearize` on plain PyTorch models. Ours: the
data (1,797 images of 8 x 8 digits that scikit-learn carries; the paper has larger sets), models,
AdamW, a cosine to 0, the number of epochs; every layer is quantized, the first and the last too.

Seeds are paired: of each, every quantizer gets the same split, initial weights and batches.
Needs scikit-learn (pip install 'bitscale[eval]').
"""

import argparse
import itertools
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from bitscale.config import read_yaml
from bitscale.model.bitlinear import set_strength
from bitscale.model.bitlinearize import bitlinearize
from bitscale.quant.schedule import TERNARY
from bitscale.scoring.tasks import mean_stderr
from provenance import provenance

QUANTIZERS = ("fp32", "b158", "absmedian")
TEST_SHARE = 0.25
SETTINGS = Path(__file__).parents[1] / "configs/recipes/reloaded-vision/settings.yaml"


class Images(NamedTuple):
    """N images and their classes, split; pixels in 0 .. 1."""

    train_N1HW: Tensor
    train_classes_N: Tensor
    test_N1HW: Tensor
    test_classes_N: Tensor


class Setting(NamedTuple):
    """One row of the table."""

    model: str
    width: int
    lr: float
    weight_decay: float


def digits(seed: int) -> Images:
    """scikit-learn's digits in an order that `seed` decides."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        sys.exit("error: scikit-learn is not installed; pip install 'bitscale[eval]'")
    pixels, classes = load_digits(return_X_y=True)
    order_N = torch.randperm(len(classes), generator=torch.Generator().manual_seed(seed))
    images_N1HW = torch.tensor(pixels, dtype=torch.float32).view(-1, 1, 8, 8)[order_N] / 16
    classes_N = torch.tensor(classes)[order_N]
    num_test = round(TEST_SHARE * len(classes_N))
    return Images(
        images_N1HW[num_test:], classes_N[num_test:], images_N1HW[:num_test], classes_N[:num_test]
    )


def make_model(name: str, width: int) -> nn.Sequential:
    """mlp: two hidden layers of `width`; cnn: two convolutions of width / 4 and width / 2."""
    if name == "mlp":
        hidden = [nn.Linear(width, width), nn.LayerNorm(width), nn.ReLU()]
        first = [nn.Flatten(), nn.Linear(64, width), nn.LayerNorm(width), nn.ReLU()]
        return nn.Sequential(*first, *hidden, nn.Linear(width, 10))
    narrow, wide = width // 4, width // 2
    return nn.Sequential(
        *(nn.Conv2d(1, narrow, 3, padding=1), nn.BatchNorm2d(narrow), nn.ReLU()),
        *(nn.Conv2d(narrow, wide, 3, padding=1), nn.BatchNorm2d(wide), nn.ReLU()),
        *(nn.MaxPool2d(2), nn.Flatten(), nn.Linear(wide * 16, 10)),
    )


def train(setting: Setting, quantizer: str, seed: int, num_epochs: int, batch_size: int) -> float:
    """Share of the test images that the trained model gets right."""
    images = digits(seed)
    torch.manual_seed(seed)
    model = make_model(setting.model, setting.width)
    if quantizer != "fp32":
        bitlinearize(model, quantizer)
        set_strength(model, TERNARY)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=setting.lr, weight_decay=setting.weight_decay
    )
    num_images = len(images.train_classes_N)
    num_steps = num_epochs * -(-num_images // batch_size)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, num_steps)
    draw = torch.Generator().manual_seed(seed)
    for _ in range(num_epochs):
        for indices_B in torch.randperm(num_images, generator=draw).split(batch_size):
            loss = F.cross_entropy(
                model(images.train_N1HW[indices_B]), images.train_classes_N[indices_B]
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    model.eval()
    with torch.no_grad():
        right_N = model(images.test_N1HW).argmax(dim=1) == images.test_classes_N
    return float(right_N.float().mean())


def table(accuracies: dict[Setting, dict[str, list[float]]]) -> str:
    """Markdown: accuracy over seeds, and the paired difference from fp32; ± standard errors."""
    lines = [
        "| model | width | lr | weight decay | fp32 | b158 | absmedian | b158 - fp32 | "
        "absmedian - fp32 | absmedian - b158 |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for setting, found in accuracies.items():
        cells = [str(value) for value in setting]
        cells += [_percent(found[name]) for name in QUANTIZERS]
        for one, other in (("b158", "fp32"), ("absmedian", "fp32"), ("absmedian", "b158")):
            cells.append(_percent([a - b for a, b in zip(found[one], found[other], strict=True)]))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _percent(values: Sequence[float]) -> str:
    mean, stderr = mean_stderr(values)
    return f"{100 * mean:.2f} ± {100 * stderr:.2f}%"


def measure(args: argparse.Namespace) -> dict[Setting, dict[str, list[float]]]:
    settings = [
        Setting(*each)
        for each in itertools.product(args.models, args.widths, args.lr, args.weight_decay)
    ]
    accuracies: dict[Setting, dict[str, list[float]]] = {}
    with tqdm(total=len(settings) * len(QUANTIZERS) * args.seeds, unit="model") as bar:
        for setting in settings:
            accuracies[setting] = {name: [] for name in QUANTIZERS}
            for seed, name in itertools.product(range(args.seeds), QUANTIZERS):
                accuracy = train(setting, name, seed, args.epochs, args.batch_size)
                accuracies[setting][name].append(accuracy)
                bar.update()
    return accuracies


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", choices=("mlp", "cnn"))
    parser.add_argument("--widths", nargs="+", type=int)
    parser.add_argument("--lr", nargs="+", type=float)
    parser.add_argument("--weight-decay", nargs="+", type=float)
    parser.add_argument("--seeds", type=int)
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--batch-size", type=int)
    parser.set_defaults(**read_yaml(SETTINGS))
    parser.add_argument("--json", type=Path, help="also write figures and provenance there")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    accuracies = measure(args)
    print(table(accuracies))
    results = {
        "provenance": provenance("CPU", ["torch", "scikit-learn"]),
        "rows": [
            {**setting._asdict(), "accuracies": found} for setting, found in accuracies.items()
        ],
    }
    if args.json:
        args.json.write_text(json.dumps(results, indent=2) + "\n")
    return results


if __name__ == "__main__":
    main()
