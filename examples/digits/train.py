"""Learn to read handwritten digits: 1,797 real ones that come with scikit-learn.

Prints each epoch as it ends; saves the model, a picture of the confusion matrix and the metrics to
``$MADANG_OUTPUTS``, or to ``outputs/`` when run outside of Madang.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path

import numpy as np
from sklearn.datasets import load_digits
from sklearn.metrics import accuracy_score, confusion_matrix
from sklearn.model_selection import train_test_split
from sklearn.neural_network import MLPClassifier

from picture import confusion_picture

DIGITS = list(range(10))


def main() -> None:
    parser = argparse.ArgumentParser(description="Train a small network on handwritten digits.")
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--hidden", type=int, default=256, help="neurons of the hidden layer")
    options = parser.parse_args()

    begin = time.perf_counter()
    images, labels = load_digits(return_X_y=True)
    images = images / 16.0
    train_x, test_x, train_y, test_y = train_test_split(
        images, labels, test_size=0.25, random_state=7, stratify=labels
    )
    print(
        f"{len(train_x)} digits to learn from, {len(test_x)} to test on, "
        f"{os.cpu_count()} CPU to use",
        flush=True,
    )

    model = MLPClassifier(
        (options.hidden,), batch_size=32, learning_rate_init=0.001, random_state=7
    )
    for epoch in range(1, options.epochs + 1):
        model.partial_fit(train_x, train_y, classes=DIGITS)
        accuracy = accuracy_score(test_y, model.predict(test_x))
        print(
            f"epoch {epoch:2d}/{options.epochs}  loss {model.loss_:.4f}  accuracy {accuracy:.4f}",
            flush=True,
        )

    predicted = model.predict(test_x)
    metrics = {
        "accuracy": round(float(accuracy_score(test_y, predicted)), 4),
        "epochs": options.epochs,
        "seconds": round(time.perf_counter() - begin, 2),
    }
    outputs = Path(os.environ.get("MADANG_OUTPUTS", "outputs"))
    outputs.mkdir(parents=True, exist_ok=True)
    save(outputs, model, metrics, confusion_matrix(test_y, predicted, labels=DIGITS))
    print(f"accuracy {metrics['accuracy']:.4f} after {metrics['seconds']} s", flush=True)


def save(
    outputs: Path, model: MLPClassifier, metrics: dict[str, float], matrix: np.ndarray
) -> None:
    """The model as plain arrays: they need no pickle to be read."""
    arrays = {f"weights{i}": array for i, array in enumerate(model.coefs_)}
    arrays |= {f"biases{i}": array for i, array in enumerate(model.intercepts_)}
    np.savez_compressed(outputs / "model.npz", **arrays)
    title = f"Handwritten digits: accuracy {metrics['accuracy']:.1%}"
    (outputs / "confusion.png").write_bytes(confusion_picture(matrix, title))
    (outputs / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")


if __name__ == "__main__":
    main()
