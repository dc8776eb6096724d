"""A small network that segments road scenes (CamVid, 11 classes), trained on clean images for the joint experiments.

EfficientNet-Lite0's first eleven blocks, as trained on ImageNet, up to 1/16 of the size; then features at 1/4,
1/8 and 1/16 are brought to 64 channels, summed from coarse to fine, and classified at 1/4. Trained by

    python benchmarks/joint/segmenter.py --data ../shared/data/joint/camvid

which writes ``camvid.safetensors`` beside this file and prints the mean IoU on the validation images. In a training
configuration it is ``network: benchmarks/joint/segmenter.py:camvid``.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastden.bench.tables import write
from fastden.training.tasks import Task, load_task, normalise_efficientnet_lite

WEIGHTS = Path(__file__).with_name("camvid.safetensors")
RESULT = Path(__file__).parents[1] / "results" / "joint" / "segmenter.json"
CLASSES = (
    *("sky", "building", "pole", "road", "pavement", "tree"),
    *("sign", "fence", "car", "pedestrian", "bicyclist"),
)
#: Label of pixels that belong to no class.
VOID = 11
#: Last block of each stage whose features are used, and their channels.
TAPS = {2: 24, 4: 40, 10: 112}
WIDTH = 64


class Segmenter(nn.Module):
    """(N, 3, H, W), normalised for EfficientNet-Lite -> logits (N, 11, H / 4, W / 4)."""

    def __init__(self) -> None:
        super().__init__()
        encoder = load_task("efficientnet-lite0").network
        self.stem = nn.Sequential(encoder._conv_stem, encoder._bn0, nn.ReLU6())
        self.blocks = nn.ModuleList(encoder._blocks[: max(TAPS) + 1])
        self.lateral = nn.ModuleList([nn.Conv2d(channels, WIDTH, 1, bias=False) for channels in TAPS.values()])
        self.context = nn.Conv2d(max(TAPS.values()), WIDTH, 1)
        self.smooth = nn.ModuleList(
            [
                nn.Sequential(nn.Conv2d(WIDTH, WIDTH, 3, padding=1, bias=False), nn.BatchNorm2d(WIDTH), nn.ReLU())
                for _ in TAPS
            ]
        )
        self.classify = nn.Conv2d(WIDTH, len(CLASSES), 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        features = []
        for index, block in enumerate(self.blocks):
            x = block(x)
            if index in TAPS:
                features.append(x)
        # The mean of the whole scene tells a road from a wall, for example.
        y = self.context(x.mean((2, 3), keepdim=True)).expand(-1, -1, *x.shape[2:])
        for feature, lateral, smooth in zip(features[::-1], list(self.lateral)[::-1], self.smooth, strict=True):
            y = F.interpolate(y, size=feature.shape[2:], mode="bilinear", align_corners=False)
            y = smooth(y + lateral(feature))
        return self.classify(y)


def camvid(weights: str | None = None) -> Task:
    """The trained network, to train in front of.

    Args:
        weights: a safetensors file; None is the one beside this file.
    """
    from safetensors.torch import load_file

    network = Segmenter()
    state = load_file(weights or WEIGHTS)
    network.load_state_dict(
        {name: value.float() if value.is_floating_point() else value for name, value in state.items()}
    )
    return Task(network, len(CLASSES), "segmentation", normalise_efficientnet_lite, VOID)


def train(data: Path, output: Path, steps: int, batch: int, crop: int, lr: float, seed: int) -> None:
    """Train on clean images, random crops at random scales, and write the weights in half precision."""
    import lightning.pytorch as pl
    from safetensors.torch import save_file
    from torch.utils.data import DataLoader

    from fastden.training.labelled import LabelledCrops, load_segmented

    pl.seed_everything(seed, verbose=False)
    images = load_segmented(data / "train", 360)
    # Crops of the whole height, cut down after scaling.
    loader = DataLoader(LabelledCrops(images, steps * batch, 360, 0.0, seed, 0), batch_size=batch)
    network = Segmenter().train().to(memory_format=torch.channels_last)
    start = time.perf_counter()
    trainer = pl.Trainer(
        max_steps=steps,
        precision="bf16-mixed",
        gradient_clip_val=1.0,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
    )
    trainer.fit(lightning_module(network, steps, crop, lr), loader)
    seconds = time.perf_counter() - start
    state = {
        name: (value.half() if value.is_floating_point() else value).contiguous()
        for name, value in network.state_dict().items()
    }
    save_file(state, output)
    score = evaluate(data, output)
    settings = {"steps": steps, "batch": batch, "crop": crop, "lr": lr, "seed": seed}
    document = {
        "command": "python benchmarks/joint/segmenter.py",
        "settings": settings,
        "seconds": round(seconds),
        "parameters": sum(parameter.numel() for parameter in network.parameters()),
        "torch": torch.__version__,
        "images": {"train": len(images)},
        **score,
    }
    RESULT.parent.mkdir(parents=True, exist_ok=True)
    write(RESULT, document)
    print(json.dumps(document, indent=1))


def lightning_module(network: Segmenter, steps: int, crop: int, lr: float) -> Any:
    """What Lightning trains: the network with its loss, and the schedule of its learning rate."""
    import lightning.pytorch as pl

    from fastden.joint import SegmentationLoss

    class Training(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.network = network
            self.loss = SegmentationLoss(VOID)

        def training_step(self, item: dict[str, Tensor], index: int) -> Tensor:
            images, labels = rescale(item["clean"], item["label"], crop, torch.Generator().manual_seed(index))
            images = images * torch.empty(len(images), 1, 1, 1, device=images.device).uniform_(0.7, 1.3)
            images = normalise_efficientnet_lite(images).contiguous(memory_format=torch.channels_last)
            loss = self.loss(self.network(images), labels)
            self.log("loss", loss, prog_bar=True)
            return loss

        def configure_optimizers(self) -> Any:
            fresh = [p for name, p in self.network.named_parameters() if not name.startswith(("stem", "blocks"))]
            encoder = [p for name, p in self.network.named_parameters() if name.startswith(("stem", "blocks"))]
            # The encoder is trained already: a smaller rate keeps its weights near.
            groups = [{"params": fresh, "lr": lr}, {"params": encoder, "lr": lr / 4}]
            optimizer = torch.optim.AdamW(groups, weight_decay=0.01)
            schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, [lr, lr / 4], total_steps=steps, pct_start=0.1)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    return Training()


def rescale(images: Tensor, labels: Tensor, crop: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Batch (N, 3, S, S) and labels (N, S, S), scaled by one factor and cut to ``crop`` at one random place."""
    side = images.shape[-1]
    low = crop / side
    scaled = round(side * float(low + (1.6 - low) * torch.rand((), generator=generator)))
    scaled = max(scaled, crop)
    images = F.interpolate(images, size=scaled, mode="bilinear", align_corners=False, antialias=True)
    labels = F.interpolate(labels[:, None].float(), size=scaled, mode="nearest-exact")[:, 0].long()
    top, left = (int(torch.randint(scaled - crop + 1, (), generator=generator)) for _ in range(2))
    window = (..., slice(top, top + crop), slice(left, left + crop))
    return images[window], labels[window]


@torch.inference_mode()
def evaluate(data: Path, weights: Path) -> dict[str, Any]:
    """Mean IoU, that of each class, and the share of right pixels on the clean validation images."""
    from torchmetrics.classification import MulticlassConfusionMatrix

    from fastden.joint import resize_prediction
    from fastden.training.labelled import LabelledImages, load_segmented

    task = camvid(str(weights))
    network = task.network.eval().to(memory_format=torch.channels_last)
    matrix = MulticlassConfusionMatrix(len(CLASSES), ignore_index=VOID)
    images = LabelledImages(load_segmented(data / "val", 360), None)
    for index in range(len(images)):
        item = images[index]
        logits = network(normalise_efficientnet_lite(item["clean"][None]).contiguous(memory_format=torch.channels_last))
        matrix.update(resize_prediction(logits, item["label"].shape), item["label"][None])
    counts = matrix.compute().double()
    iou = counts.diagonal() / (counts.sum(0) + counts.sum(1) - counts.diagonal())
    return {
        "validation_images": len(images),
        "miou": round(iou.mean().item(), 4),
        "pixel_accuracy": round((counts.diagonal().sum() / counts.sum()).item(), 4),
        "iou": {name: round(value, 4) for name, value in zip(CLASSES, iou.tolist(), strict=True)},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the CamVid segmentation network on clean images.")
    parser.add_argument("--data", type=Path, required=True, help="folder with train/ and val/")
    parser.add_argument("--output", type=Path, default=WEIGHTS)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--crop", type=int, default=256)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    train(**vars(parser.parse_args()))


if __name__ == "__main__":
    main()
