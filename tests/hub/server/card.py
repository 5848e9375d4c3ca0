"""The Hub's checks of a model card's front matter, and what it reads from a card and an adapter's config."""

import json
from typing import Any

import yaml  # type: ignore[import-untyped]  # comes with huggingface_hub, which these tests drive anyway

from tests.hub.server.store import Commit

# fmt: off
LICENSES = frozenset((
    "apache-2.0", "mit", "openrail", "bigscience-openrail-m", "creativeml-openrail-m", "bsd", "bsd-2-clause",
    "bsd-3-clause", "gpl-3.0", "agpl-3.0", "lgpl-3.0", "cc0-1.0", "cc-by-4.0", "cc-by-sa-4.0", "cc-by-nc-4.0",
    "cc-by-nc-sa-4.0", "unlicense", "gemma", "llama2", "llama3", "llama3.1", "llama3.2", "llama3.3", "llama4",
    "other", "unknown",
))
# fmt: on
RELATIONS = frozenset({"adapter", "merge", "quantized", "finetune"})


def front_matter(text: str) -> dict[str, Any]:
    """Return the YAML block at the top of a card, {} without one; yaml.YAMLError or ValueError when malformed."""
    lines = text.splitlines()
    if not lines or lines[0].strip() != "---":
        return {}
    end = next((at for at, line in enumerate(lines[1:], start=1) if line.strip() == "---"), None)
    if end is None:
        raise ValueError("The metadata block is not closed by ---.")
    data = yaml.safe_load("\n".join(lines[1:end]))
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise ValueError("The metadata must be a mapping.")
    return data


def check(text: str) -> tuple[list[str], list[str]]:
    """Return the errors and the warnings the Hub has about a card."""
    try:
        data = front_matter(text)
    except (yaml.YAMLError, ValueError) as error:
        return [f"Invalid YAML metadata: {error}"], []
    if not data:
        return [], ["empty or missing yaml metadata in repo card"]
    errors = [message for message in (_license(data), _relation(data), _tags(data)) if message]
    models = data.get("base_model", [])
    for model in models if isinstance(models, list) else [models]:
        # A local path here is the commonest fault of adapter cards.
        if not isinstance(model, str) or model.count("/") > 1 or model[:1] in "/." or "\\" in model:
            errors.append(f'"base_model" with value "{model}" is not valid. Use a model id from https://hf.co/models.')
    return errors, []


def _license(data: dict[str, Any]) -> str | None:
    names = data.get("license", [])
    if all(name in LICENSES for name in (names if isinstance(names, list) else [names])):
        return None
    return f'"license" must be one of [{", ".join(sorted(LICENSES))}]'


def _relation(data: dict[str, Any]) -> str | None:
    if data.get("base_model_relation", "adapter") in RELATIONS:
        return None
    return f'"base_model_relation" must be one of [{", ".join(sorted(RELATIONS))}]'


def _tags(data: dict[str, Any]) -> str | None:
    tags = data.get("tags", [])
    return None if isinstance(tags, list) and all(isinstance(tag, str) for tag in tags) else '"tags" must be an array'


def described(commit: Commit) -> dict[str, Any]:
    """Return the model info fields the Hub derives from README.md and adapter_config.json at a commit."""
    fields: dict[str, Any] = {}
    readme = commit.files.get("README.md")
    if readme is not None and readme.data is not None:
        card = front_matter(readme.data.decode())
        fields = {"cardData": card, "tags": list(card.get("tags", []))}
        fields |= {name: card[name] for name in ("library_name", "pipeline_tag") if name in card}
    config = commit.files.get("adapter_config.json")
    if config is not None and config.data is not None:
        peft = json.loads(config.data)
        names = ("base_model_name_or_path", "task_type")
        fields["config"] = {"peft": {name: peft[name] for name in names if peft.get(name) is not None}}
    return fields
