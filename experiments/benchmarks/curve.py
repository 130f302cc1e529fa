"""Draws a run for a README: training loss, held-out accuracy, and the batch it was fed.

python -m experiments.benchmarks.curve RUN OUT.png [--before 0.54]

Accuracy is the classifier's or, without labels, that of k-NN; `--before` is that of first values.
"""

import argparse
import io
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

METRICS = {"val/accuracy": "held-out accuracy (%)", "val/knn_top1": "k-NN accuracy (%)"}


def draw(run: Path, out: Path, before: float | None) -> None:
    """Read the run's TensorBoard events and write a picture of two panels."""
    events = EventAccumulator(str(run), size_guidance={"scalars": 0})
    events.Reload()
    loss = events.Scalars("train/loss")
    metric = next(name for name in METRICS if name in events.Tags()["scalars"])
    accuracy = [(event.step, event.value) for event in events.Scalars(metric)]
    if before is not None:
        accuracy.insert(0, (0, before))
    batch = events.Images("train/augmented_batch")[0]

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 3.6), width_ratios=(3, 2))
    left.plot([e.step for e in loss], [e.value for e in loss], color="tab:gray", linewidth=1)
    left.set(xlabel="optimizer step", ylabel="training loss", ylim=(0, None))
    percent = left.twinx()
    percent.plot(
        [step for step, _ in accuracy],
        [100 * value for _, value in accuracy],
        "o-",
        color="tab:blue",
    )
    percent.margins(x=0.08, y=0.2)
    percent.set_ylabel(METRICS[metric], color="tab:blue")
    for step, value in accuracy:
        percent.annotate(
            f"{100 * value:.1f}",
            (step, 100 * value),
            textcoords="offset points",
            xytext=(0, 8),
            ha="center",
            color="tab:blue",
        )
    right.imshow(Image.open(io.BytesIO(batch.encoded_image_string)))
    right.set_title("the first batch, as the network sees it", fontsize=10)
    right.axis("off")
    figure.tight_layout()
    figure.savefig(out, dpi=110)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--before", type=float, help="accuracy before the first step")
    given = parser.parse_args()
    draw(given.run, given.out, given.before)
