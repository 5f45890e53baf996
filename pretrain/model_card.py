"""README.md of a model folder: what the model is, how it is loaded, and what is known of its data and its recipe."""

from collections.abc import Mapping
from typing import Any

import yaml


def model_card(card: Mapping[str, Any], *, library: str, usage: str) -> str:
    """Markdown with Hugging Face's front matter, from the card of an export.

    usage: Python lines that load the model; FOLDER stands for its folder.
    """
    model, license = card["model"], card.get("license", "")
    front = {"license": license} if license else {}
    front |= {"library_name": library, "pipeline_tag": "image-feature-extraction"}
    front |= {"tags": ["vision", "self-supervised"]}
    registers = f", {model['num_registers']} registers" if model["num_registers"] else ""
    parts = [
        f"---\n{yaml.safe_dump(front, sort_keys=False)}---",
        f"# Vision transformer, {model['dim']} wide, {model['depth']} blocks, patches of {model['patch_size']} pixels",
        f"A frozen feature extractor written by Troodon: {model['num_heads']} heads, {model['ffn']} feed-forward, "
        f"{model.get('position', 'learned')} positions{registers}. Images of {card['image_size']} pixels, or any other "
        f"multiple of {model['patch_size']} where the format allows it, in RGB from 0 to 1, less the mean "
        f"{_numbers(card['mean'])} and divided by {_numbers(card['std'])}.",
        f"## Use\n\n```python\n{usage}\n```",
        f"## Data\n\n{_data(card)}",
        f"## Recipe\n\n{_recipe(card)}",
        f"## Numbers\n\n{_table(card.get('metrics') or {}) or 'None were measured with this export.'}",
        f"## License of the weights\n\n{license or 'Not stated. Whoever gives these weights away has to fill it in.'}",
        "## Intended use\n\nFeatures of images like those it was trained on: retrieval, k-NN, linear classification, "
        "dense tasks on patch tokens, a start for fine-tuning. Not examined for fairness, nor for images of another "
        "kind; measure it on your own data before you rely on it.",
    ]
    return "\n\n".join(parts) + "\n"


def _data(card: Mapping[str, Any]) -> str:
    data, origin = card.get("data") or {}, card.get("origin") or {}
    lines = []
    if origin:
        source, layout = origin.get("source"), origin.get("layout")
        lines.append(f"- weights began as `{source}` ({layout}; SHA-256 `{origin.get('sha256', 'unknown')}`)")
    if data:
        samples = data.get("samples") or "unknown"
        lines.append(f"- fingerprint of the images `{data.get('fingerprint')}`; samples: {samples}")
        lines += [f"- manifest `{path}`, SHA-256 `{digest}`" for path, digest in data.get("manifests", {}).items()]
    return "\n".join(lines) or "Not recorded."


def _recipe(card: Mapping[str, Any]) -> str:
    if "config" not in card:
        return "Not trained by Troodon; see the data above for where the weights are from."
    config = yaml.safe_dump(card["config"], sort_keys=False)
    return f"Step {card.get('step')} of a training with this config:\n\n```yaml\n{config}```"


def _table(metrics: Mapping[str, Any]) -> str:
    rows = [f"| {name} | {value:.4g} |" for name, value in metrics.items() if isinstance(value, int | float)]
    return "\n".join(["| what | value |", "| --- | --- |", *rows]) if rows else ""


def _numbers(values: Any) -> str:
    return ", ".join(f"{value:g}" for value in values)
