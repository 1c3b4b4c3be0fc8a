"""Add a column `expert_scores` to rows: how close each prompt is to clusters of the data, or to each task.

MoR1E and Glider route by such scores. Their authors embed prompts with a language model; here a prompt is a bag of
hashed words, so that the example needs nothing but numpy. Replace `embed` by your own.

    python examples/expert_scores.py OUT.jsonl IN.jsonl [IN.jsonl ...] --clusters 32   # for mor1e
    python examples/expert_scores.py OUT.jsonl IN.jsonl [IN.jsonl ...]                 # one score a task, for glider
"""

from __future__ import annotations

import argparse
import json
import re
import zlib
from pathlib import Path

import numpy as np

SIZE = 1024


def embed(texts: list[str]) -> np.ndarray:
    """One unit vector a text: hashed words, rare ones counting more."""
    counts = np.zeros((len(texts), SIZE))
    for row, text in zip(counts, texts, strict=True):
        for word in re.findall(r"\w+", text.lower()):
            row[zlib.crc32(word.encode()) % SIZE] += 1
    rarity = np.log((1 + len(texts)) / (1 + (counts > 0).sum(axis=0)))
    return unit(counts * rarity)


def unit(vectors: np.ndarray) -> np.ndarray:
    """Scale each row to length one."""
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-9)


def clusters(vectors: np.ndarray, number: int, steps: int = 30) -> np.ndarray:
    """Spherical k-means: centroids of length one."""
    centroids = vectors[np.random.default_rng(0).choice(len(vectors), number, replace=False)]
    for _ in range(steps):
        nearest = (vectors @ centroids.T).argmax(axis=1)
        sums = np.stack([vectors[nearest == k].sum(axis=0) for k in range(number)])
        centroids = np.where((nearest[:, None] == np.arange(number)).any(axis=0)[:, None], unit(sums), centroids)
    return centroids


def main() -> None:
    """Read, score, write."""
    parser = argparse.ArgumentParser(description="Add expert_scores to the rows of a dataset.")
    parser.add_argument("out")
    parser.add_argument("files", nargs="+")
    parser.add_argument("--clusters", type=int, help="score against so many clusters; default one a task")
    parser.add_argument("--rows", type=int, help="take the first so many rows of each file")
    arguments = parser.parse_args()
    files = [Path(file).read_text(encoding="utf-8").splitlines()[: arguments.rows] for file in arguments.files]
    rows = [json.loads(line) for lines in files for line in lines]
    vectors = embed([row["messages"][0]["content"] for row in rows])
    if arguments.clusters:
        centroids = clusters(vectors, arguments.clusters)
    else:
        tasks = np.array([row["task"] for row in rows])
        centroids = unit(np.stack([vectors[tasks == task].mean(axis=0) for task in dict.fromkeys(tasks)]))
    for row, scores in zip(rows, vectors @ centroids.T, strict=True):
        row["expert_scores"] = [round(float(score), 3) for score in scores]
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    Path(arguments.out).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
