"""The data card of a collection: what the data is, how it was made, and how it looks."""

from typing import Any

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq

from training_lib.collection_folder import CollectionFolder


def count(output: CollectionFolder) -> dict[str, Any]:
    """Problems, roll-outs, shares of the labels in words, and lengths in tokens, from the finished files."""
    columns: dict[str, list[np.ndarray]] = {"labels": [], "roll_in_ids": [], "roll_outs_ids": []}
    rows = 0
    for file in range(output.num_files):
        table = pq.read_table(output.written(file), columns=list(columns))
        rows += table.num_rows
        for name, parts in columns.items():
            items = pc.list_flatten(table[name])
            parts.append((items if name == "labels" else pc.list_value_length(items)).to_numpy())
    labels, roll_ins, roll_outs = (np.concatenate(parts) for parts in columns.values())
    shares = np.bincount(labels, minlength=3) / max(len(labels), 1)
    return {
        "problems": output.num_problems, "rows": rows, "dropped": output.num_problems - rows, "rollouts": len(labels),
        "labels": f"incorrect {shares[0]:.1%}, correct {shares[1]:.1%}, length-limited {shares[2]:.1%}",
        "roll_in_tokens": _lengths(roll_ins), "rollout_tokens": _lengths(roll_outs),
    }  # fmt: skip


def _lengths(lengths: np.ndarray) -> list[float]:
    """Mean, 5 %, median, 95 %, longest; nothing of nothing."""
    return [lengths.mean(), *np.percentile(lengths, (5, 50, 95)), lengths.max()] if len(lengths) else []


def write_card(output: CollectionFolder, figures: dict[str, Any]) -> None:
    """README.md: what the data is, how it was made, and how it looks; a hub or `load_dataset(folder)` finds the files."""
    lengths = "\n".join(
        f"| {name} | " + " | ".join(f"{value:,.0f}" for value in figures[key]) + " |"
        for name, key in (("roll-in, prompt included", "roll_in_tokens"), ("roll-out", "rollout_tokens"))
    )
    settings = output.settings
    cuts = (
        f"Roll-ins are cut after t response tokens with probability proportional to {settings['cut_weight']} of t, without "
        "repetition (the paper says only that positions are square-root weighted; this reading is an assumption)."
    )
    table = "\n".join(f"| {name} | {value} |" for name, value in settings.items())
    text = f"""---
configs:
- config_name: default
  data_files:
  - split: train
    path: data/*.parquet
---

# Roll-outs for training a value model

Made by `collect_rollouts.py`; read by `train_classifier.py --data_path FOLDER`. A row is one problem: `message_id, problem,
solution, answer`, and one entry for each roll-out of `roll_in_ids` (prompt plus a prefix of a trace), `roll_outs_ids` (what
the fixed policy then wrote, its end token included), `processed_answer`, `reward` (1 right, 0 not) and `labels`
(0 incorrect, 1 correct, 2 stopped by the token limit).

{figures["problems"]:,} problems; {figures["dropped"]:,} of them are left out because no roll-out succeeded
{"(none would be: --keep_unsolved)" if settings["keep_unsolved"] else ""}; {figures["rows"]:,} rows, {figures["rollouts"]:,} roll-outs.
Labels: {figures["labels"]}.

| tokens | mean | 5 % | median | 95 % | longest |
|---|---|---|---|---|---|
{lengths}

{cuts if settings["num_roll_ins"] else "Every roll-out starts at the bare prompt."}

## Settings

| setting | value |
|---|---|
{table}
"""
    output.write_card(text)
