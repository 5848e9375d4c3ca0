"""What quantized bases keep of a LoRA, on the real small model: printed by `merge`, measured, and as loss on text.

    python -m tests.make
    python -m tests.benchmarks.retention OUT

OUT takes the quantized models, which the real libraries make, and figures.json; a run goes on where an earlier one was
stopped. It takes about ten minutes of one core. The LoRA is of q_proj and v_proj; *kept* is ⟨W'' − W, ΔW⟩/‖ΔW‖² over
all changed weights, with W'' what the library reads of the output and W what it reads of the base (of the original,
where that was quantized anew), in float64; *error* is ‖W'' − W₀ − ΔW‖/‖W₀‖ with W₀ the original. The loss is that of
Python's documentation which the LoRA was not trained on, by transformers in float32 on those same numbers.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from click.testing import CliRunner
from safetensors.torch import load_file
from torch import Tensor

from loratools.cli._run import group
from tests.make import real_models_folder
from tests.make.quantized import SCHEMES, Scheme, by_module, numbers_of_mlx, of_gguf, stored

ROWS = 32
Numbers = dict[str, Tensor]
VARIANTS: dict[str, list[str]] = {
    "requantize": ["--quantized", "requantize", "--force"],
    "requantize, stochastic": ["--quantized", "requantize", "--rounding", "stochastic", "--force"],
    "requantize, --original": ["--quantized", "requantize", "--force", "--original"],
    "dequantize": ["--quantized", "dequantize", "--retention", "full"],
}
"""The options of each merge; the dequantized one is last, for its other weights are rounded to 16 bit."""
GGUF = {"Q4_0", "Q8_0"}
"""Schemes whose blocks are not rounded at random."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    out = parser.parse_args().out
    torch.set_num_threads(1)
    models = real_models_folder()
    figures = measure(Case(models / "smol-base", models / "smol-lora"), out, Judge(models))
    print("\n".join(lines(figures)))


@dataclass(frozen=True)
class Case:
    """A model in 16 bit, and a LoRA of PEFT for it."""

    base: Path
    adapter: Path

    @cached_property
    def settings(self) -> dict[str, Any]:
        settings: dict[str, Any] = json.loads((self.adapter / "adapter_config.json").read_text())
        return settings

    @cached_property
    def factors(self) -> dict[str, tuple[Tensor, Tensor]]:
        """A and B by the module's path."""
        tensors = load_file(self.adapter / "adapter_model.safetensors")
        start, end = "base_model.model.", ".lora_A.weight"
        paths = [name[len(start) : -len(end)] for name in tensors if name.endswith(end)]
        return {path: tuple(tensors[f"{start}{path}.lora_{side}.weight"] for side in "AB") for path in paths}  # type: ignore[misc]

    @property
    def scaling(self) -> float:
        return float(self.settings["lora_alpha"] / self.settings["r"])

    @cached_property
    def deltas(self) -> Numbers:
        """ΔW = s·B·A in float64, by the name of the weight."""
        return {f"{path}.weight": self.scaling * (B.double() @ A.double()) for path, (A, B) in self.factors.items()}

    @cached_property
    def original(self) -> Numbers:
        return stored(self.base)

    def kept(self, before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> dict[str, float]:
        """Return ⟨W'' − W, ΔW⟩/‖ΔW‖², and the distance from W₀ + ΔW."""
        inner = size = error = norm = 0.0
        for name, delta in self.deltas.items():
            W, W0 = after[name].double(), self.original[name].double()
            inner += float(((W - before[name].double()) * delta).sum())
            size += float(delta.square().sum())
            error += float((W - W0 - delta).square().sum())
            norm += float(W0.square().sum())
        return {"kept": inner / size, "error": (error / norm) ** 0.5}


class Judge:
    """The loss on text of weights, by transformers in float32."""

    def __init__(self, models: Path) -> None:
        from tests.make import real_models

        self.model = real_models.load_smol(models).eval()
        trained = real_models.STEPS * real_models.ROWS
        self.rows = real_models.training_rows(models)[trained : trained + ROWS]

    def __call__(self, weights: Mapping[str, Tensor]) -> float:
        """Put these weights into the model, and return its loss."""
        parameters = dict(self.model.named_parameters())
        with torch.no_grad():
            for name, W in weights.items():
                parameters[name].copy_(W)
            losses = [
                float(self.model(input_ids=rows, labels=rows, use_cache=False).loss) for rows in self.rows.split(8)
            ]
        return sum(losses) / len(losses)


def measure(case: Case, out: Path, loss: Callable[[Mapping[str, Tensor]], float]) -> dict[str, Any]:
    """Measure what figures.json does not have yet, and return what it says then: figures by scheme and merge."""
    out.mkdir(parents=True, exist_ok=True)
    file = out / "figures.json"
    figures: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {}

    def note(scheme: str, merge: str, values: Mapping[str, Any]) -> None:
        figures.setdefault(scheme, {})[merge] = values
        file.write_text(json.dumps(figures, indent=1))

    if "dequantize" not in figures.get("BF16", {}):
        note("BF16", "base", {"loss": loss(case.original)})
        merged = {name: (case.original[name].double() + delta).bfloat16() for name, delta in case.deltas.items()}
        note("BF16", "dequantize", {**case.kept(case.original, merged), "loss": loss(merged)})
    for name, scheme in SCHEMES.items():
        ours = VARIANTS.keys() - ({"requantize, stochastic"} if name in GGUF else set())
        merges = {"base", *ours, *OTHERS.get(name, {})}
        if not merges - figures.get(name, {}).keys():
            continue
        quantized = made(scheme, case, out / "".join(re.findall(r"\w", name)))
        before = scheme.read(quantized, None)
        note(name, "base", {"loss": loss(before)})
        for merge, other in OTHERS.get(name, {}).items():
            if merge not in figures[name]:
                after = other(case, quantized)
                note(name, merge, {**case.kept(before, after), "loss": loss(after)})
        for merge, options in VARIANTS.items():
            if merge in figures[name] or merge not in ours:
                continue
            with_original = merge.endswith("--original")
            original = original_of(quantized, case, out) if with_original else None
            result, printed = merged_by_us(case, quantized, [*options, *([str(original)] if original else [])])
            everything = merge == "dequantize"
            after = scheme.read(result, None if everything else case.deltas)
            values = {"printed": printed, **case.kept(case.original if with_original else before, after)}
            note(name, merge, values | {"loss": loss(after)})
            remove(result)
        remove(quantized)
    return figures


def made(scheme: Scheme, case: Case, model: Path) -> Path:
    """Make a quantized model, which has its name when it is whole."""
    if not model.is_dir():
        part = beside(model, "part")
        remove(part)
        scheme.make(case.base, part)
        part.rename(model)
    return model


def beside(model: Path, suffix: str) -> Path:
    return model.with_name(f"{model.name}.{suffix}")


def remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)


def is_gguf(model: Path) -> bool:
    return (model / "model.gguf").is_file()


def original_of(model: Path, case: Case, out: Path) -> Path:
    """Return the original of a quantized model; that of a GGUF file is one."""
    return made(of_gguf("BF16"), case, out / "original") / "model.gguf" if is_gguf(model) else case.base


def merged_by_us(case: Case, model: Path, options: Sequence[str]) -> tuple[Path, float]:
    """Merge by the command line; return the output, and the retention that it prints."""
    base, result = (model / "model.gguf", model / "merged.gguf") if is_gguf(model) else (model, beside(model, "merged"))
    remove(result)
    command = map(str, ["--no-progress", "merge", base, case.adapter, "-o", result, *options, "--threads", "1"])
    done = CliRunner().invoke(group(), list(command), catch_exceptions=False)
    printed = re.search(r"retention +about (-?[\d.]+)% of the change survives", done.stdout)
    if done.exit_code or printed is None:
        raise RuntimeError(f"exit code {done.exit_code}: {done.output}")
    return result, float(printed[1]) / 100


def merged_by_peft(case: Case, model: Path) -> Numbers:
    """Return what `merge_and_unload` makes of the changed weights of an NF4 model."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from tests.storage.codecs.bnb_models import exact

    loaded = AutoModelForCausalLM.from_pretrained(model, device_map="cpu")
    wrapped: Any = PeftModel.from_pretrained(loaded, case.adapter)
    modules = dict(wrapped.merge_and_unload().named_modules())
    numbers = {}
    for path in case.factors:
        weight = modules[path].weight
        state = {f"weight.{key}": value for key, value in weight.quant_state.as_dict(packed=True).items()}
        numbers[f"{path}.weight"] = exact({"weight": weight.data, **state}, "weight")
    return numbers


def merged_by_mlx(case: Case, model: Path) -> Numbers:
    """Return what the layers' `fuse`, which `mlx_lm.fuse` calls, makes of the changed weights of an MLX model."""
    import mlx.core as mx
    from mlx.utils import tree_flatten
    from mlx_lm.tuner.utils import load_adapters
    from mlx_lm.utils import load_model

    loaded, config = load_model(model)
    folder = beside(model, "adapter")
    folder.mkdir(exist_ok=True)
    arrays = {}
    for path, (A, B) in case.factors.items():
        arrays |= {f"{path}.lora_a": mx.array(A.T.float().numpy()), f"{path}.lora_b": mx.array(B.T.float().numpy())}
    mx.save_safetensors(str(folder / "adapters.safetensors"), arrays)
    keys = sorted({path.split(".", 3)[3] for path in case.factors})
    parameters = {"rank": case.settings["r"], "scale": case.scaling, "dropout": 0.0, "keys": keys}
    stated = {"fine_tune_type": "lora", "num_layers": config["num_hidden_layers"], "lora_parameters": parameters}
    (folder / "adapter_config.json").write_text(json.dumps(stated))
    adapted = dict(load_adapters(loaded, str(folder)).named_modules())
    remove(folder)
    tensors = {
        f"{path}.{part}": array
        for path in case.factors
        for part, array in tree_flatten(adapted[path].fuse(dequantize=False).parameters())
    }
    return {f"{path}.weight": numbers_of_mlx(parts) for path, parts in by_module(tensors).items()}


OTHERS: dict[str, dict[str, Callable[[Case, Path], Numbers]]] = {
    "NF4, double quantization": {"PEFT merge_and_unload": merged_by_peft},
    "MLX affine, 4 bits": {"mlx_lm.fuse": merged_by_mlx},
}
"""What others make of the same models."""


def lines(figures: Mapping[str, Any]) -> Iterator[str]:
    """Yield the table."""
    yield "| scheme | merge | printed | kept | error | loss |"
    yield "|---|---|---|---|---|---|"
    for scheme, merges in figures.items():
        for merge, values in merges.items():
            cells = [
                f"{values[key]:{form}}" if key in values else ""
                for key, form in (("printed", ".4f"), ("kept", ".4f"), ("error", ".4f"), ("loss", ".4f"))
            ]
            yield f"| {scheme} | {merge} | {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
