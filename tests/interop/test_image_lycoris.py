"""Every kind of LyCORIS on whole image models, written by LyCORIS itself, read, merged, and rewritten."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from loratools import dialects
from loratools.adapter.naming.image import rename
from loratools.adapter.naming.image.readings import Reading, leads
from loratools.errors import LossyConversion
from loratools.storage.checkpoint import Checkpoint
from loratools.surgery.convert import convert
from loratools.surgery.merge import merge
from loratools.surgery.unmerge import unmerge
from loratools.surgery.verify import verify

from . import images

pytest.importorskip("diffusers")
kohya: Any = pytest.importorskip("lycoris.kohya")

pytestmark = [pytest.mark.interop, pytest.mark.filterwarnings("ignore")]

ALGORITHMS: dict[str, dict[str, Any]] = {
    "locon": {"algo": "locon"},
    "rslora": {"algo": "locon", "rs_lora": True},
    "locon-tucker": {"algo": "locon", "use_tucker": True},
    "loha": {"algo": "loha"},
    "loha-tucker": {"algo": "loha", "use_tucker": True},
    "lokr": {"algo": "lokr"},
    "lokr-tucker": {"algo": "lokr", "use_tucker": True, "decompose_both": True, "factor": 2, "dim": 1},
    "lokr-whole": {"algo": "lokr", "full_matrix": True},
    "glora": {"algo": "glora"},
    "full": {"algo": "full", "train_norm": True},
    "ia3": {"algo": "ia3"},
    "oft": {"algo": "diag-oft", "constraint": 0.02, "rescaled": True},
    "dora": {"algo": "locon", "dora_wd": True},
    "loha-dora-in": {"algo": "loha", "dora_wd": True, "wd_on_output": False},
    "norms": {"algo": "lokr", "train_norm": True},
}
CASES = [("sd", algorithm) for algorithm in ALGORITHMS]
CASES += [("sdxl", algorithm) for algorithm in ("locon-tucker", "loha", "lokr", "full", "ia3", "oft", "dora")]
COMFY_READS = ALGORITHMS.keys() - {"ia3"}


def names_of(pipe: Any, *, xl: bool) -> nn.Module:
    """Return the layers of a UNet as a model of their own, with the original's names: kohya trains SDXL so."""
    root = nn.Module()
    for name, layer in pipe.unet.named_modules():
        if not list(layer.children()) and name:
            known = Reading("sdxl", "diffusers").fits([name])  # those without weights are not
            *path, last = (images.to_original(name, "sdxl").names[0] if xl and known else name).split(".")
            home = root
            for part in path:
                if not hasattr(home, part):
                    home.add_module(part, nn.Module())
                home = getattr(home, part)
            home.add_module(last, layer)
    return root


def network(pipe: Any, *, xl: bool, dim: int = 4, **options: Any) -> Any:
    """Put LyCORIS' modules on a pipeline, as kohya's trainer does, with random numbers in all their parameters."""
    torch.manual_seed(11)
    encoders = [pipe.text_encoder, pipe.text_encoder_2] if xl else pipe.text_encoder
    kohya.PRESET["some"] = {
        "enable_conv": True,
        "unet_target_module": [],
        "unet_target_name": (
            [r"input_blocks\.[46]\..*", r"output_blocks\.0\..*"] if xl else [r"(down|up)_blocks\.1\..*"]
        ),
        "text_encoder_target_module": ["CLIPAttention", "CLIPMLP"],
        "text_encoder_target_name": [],
    }
    made = kohya.create_network(
        1.0, dim, 3, None, encoders, names_of(pipe, xl=xl), preset="some", conv_dim=dim, conv_alpha=2, **options
    )
    made.apply_to(encoders, names_of(pipe, xl=xl), True, True)
    for name, parameter in made.named_parameters():
        if "dora_scale" in name:
            parameter.data *= 1 + 0.3 * torch.rand(parameter.shape)
        elif options["algo"] == "full" and "norm" not in name:  # it holds the whole weight
            parameter.data += torch.randn(parameter.shape) * 0.05
        else:
            parameter.data = torch.randn(parameter.shape) * 0.3
    return made.eval()


@torch.no_grad()
def weight_of(module: Any, layer: nn.Module) -> tuple[Tensor, Tensor | None]:
    """Return the weight and bias with which a layer computes what LyCORIS' `forward()` does: one unit at a time."""
    if isinstance(layer, nn.Linear):
        bias = module(torch.zeros(1, layer.in_features))[0]
        return (module(torch.eye(layer.in_features)) - bias).T, bias if layer.bias is not None else None
    assert isinstance(layer, nn.Conv2d)
    size, stride, padding = layer.kernel_size[0], layer.stride[0], int(layer.padding[0])
    start = stride - padding  # where the patch of output (1, 1) begins
    units = torch.zeros(layer.in_channels * size * size, layer.in_channels, start + size + 1, start + size + 1)
    for i, (channel, y, x) in enumerate(torch.cartesian_prod(*map(torch.arange, (layer.in_channels, size, size)))):
        units[i, channel, start + y, start + x] = 1
    bias = module(torch.zeros_like(units[:1]))[0, :, 1, 1]
    weight = (module(units)[:, :, 1, 1] - bias).T.reshape(layer.weight.shape)
    return weight, bias if layer.bias is not None else None


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Path]]:
    """Return what makes the pipeline folder and the single file of a model, once."""

    @cache
    def made(name: str) -> tuple[Path, Path]:
        folder = tmp_path_factory.mktemp(name)
        pipe = images.pipeline(name)
        pipe.save_pretrained(folder / "pipeline")
        return folder / "pipeline", images.save_original(pipe, folder / "original.safetensors")

    return made


@pytest.mark.sweep(9)
@pytest.mark.parametrize(("name", "algorithm"), CASES)
def test_merged_weights_are_those_of_forward(
    bases: Callable[[str], tuple[Path, Path]], name: str, algorithm: str, tmp_path: Path
) -> None:
    folder, _ = bases(name)
    pipe = images.pipeline(name)
    layers = {id(module): key for key, module in everything(pipe).items()}
    made = network(pipe, xl=name == "sdxl", **ALGORITHMS[algorithm])
    made.save_weights(str(tmp_path / "a.safetensors"), None, {"ss_network_module": "lycoris.kohya"})
    merge(folder, [tmp_path / "a.safetensors"], tmp_path / "merged", keep_residual=True)
    merged = images.reopened(name, tmp_path / "merged")
    modules = made.text_encoder_loras + made.unet_loras
    changed, checked = everything(merged), set[str]()
    plain = everything(images.untouched(name))
    for module in modules:
        key = layers[id(module.org_module[0])]
        checked.add(key)
        if "norm" in key:
            x = torch.randn(2, len(plain[key].weight), *(3,) * (2 * isinstance(plain[key], nn.GroupNorm)))
            with torch.no_grad():
                torch.testing.assert_close(changed[key](x), module(x), rtol=1e-6, atol=1e-6)
            continue
        weight, bias = weight_of(module, plain[key])
        largest = float(weight.abs().max())
        torch.testing.assert_close(changed[key].weight, weight, rtol=0, atol=1e-6 * max(1.0, largest), msg=key)
        assert float((changed[key].weight - plain[key].weight).abs().max()) > 1e-3, key
        if bias is not None:
            torch.testing.assert_close(changed[key].bias, bias, rtol=1e-6, atol=1e-6, msg=key)
    assert len(checked) == len(modules) > 10
    for key in plain.keys() - checked:
        assert torch.equal(plain[key].weight, changed[key].weight), key
    assert images.distance(images.outputs(merged), images.outputs(pipe)) < 1e-5
    assert verify(tmp_path / "merged", folder, [tmp_path / "a.safetensors"]).ok
    assert unmerge(tmp_path / "merged", [tmp_path / "a.safetensors"], tmp_path / "back").proved == "root hash"


def everything(pipe: Any) -> dict[str, Any]:
    return {
        f"{component}.{name}": layer
        for component in images.components(pipe)
        for name, layer in getattr(pipe, component).named_modules()
        if hasattr(layer, "weight")
    }


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Path]:
    """Return what makes the file of a model and an algorithm, once."""

    @cache
    def made(name: str, algorithm: str) -> Path:
        file = tmp_path_factory.mktemp("files") / f"{algorithm}.safetensors"
        trained = network(images.pipeline(name), xl=name == "sdxl", **ALGORITHMS[algorithm])
        trained.save_weights(str(file), None, {"ss_network_module": "lycoris.kohya"})
        return file

    return made


@pytest.mark.sweep(9)
@pytest.mark.parametrize(("name", "algorithm"), CASES)
def test_round_trips_keep_every_tensor_or_name_the_loss(
    written: Callable[[str, str], Path], name: str, algorithm: str, tmp_path: Path
) -> None:
    start = written(name, algorithm)
    before = load_file(start)
    convert(start, tmp_path / "same.safetensors", to="kohya")
    same(load_file(tmp_path / "same.safetensors"), known_to_kohya(before))
    for through in ("comfy", "loratools"):
        adapter = dialects.open_adapter(start)
        lost = {loss.where for loss in dialects.get(through).losses(adapter)}
        unknown = {"comfy": "ia3", "loratools": ""}[through].split()
        renamed_adapter = rename.to_original(adapter) if through == "comfy" else adapter
        assert lost == {module for module, update in renamed_adapter.updates.items() if update.kind in unknown}
        middle = tmp_path / f"{through}.safetensors"
        if lost:
            with pytest.raises(LossyConversion) as refusal:
                convert(start, middle, to=through)
            assert {problem.partition(":")[0] for problem in refusal.value.problems} == lost
            continue
        convert(start, middle, to=through)
        again = dialects.open_adapter(middle)
        assert again.dialect == through
        convert(again, tmp_path / f"{through}-back.safetensors", to="kohya", allow_loss=through == "loratools")
        renamed = through == "comfy" and name == "sd"  # ComfyUI's are the original's names
        back = load_file(tmp_path / f"{through}-back.safetensors")
        same({ours(name) if renamed else name: tensor for name, tensor in back.items()}, known_to_kohya(before))


def ours(name: str) -> str:
    """Return kohya's name of a module of diffusers, for that of the original."""
    head, _, suffix = name.partition(".")
    flat = head.removeprefix("lora_unet_")
    reading = Reading("sd", "original")
    if place := reading.find(flat, flat=True):
        module = place[0].format(*place[1])
        (diffusers_name,) = leads(reading, [module], "diffusers")[module].names
        return f"lora_unet_{diffusers_name.replace('.', '_')}.{suffix}"
    return f"{head.replace('lora_te1_', 'lora_te_')}.{suffix}"


def known_to_kohya(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors with the level `text_model`: kohya's names have it, though transformers 5 took it out of CLIP."""
    return {re.sub(r"^(lora_te\d?_)encoder_", r"\1text_model_encoder_", name): W for name, W in tensors.items()}


def same(ours: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert ours.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert torch.equal(ours[name].float(), tensor.float()), name


@pytest.mark.sweep(4)
@pytest.mark.parametrize(("name", "algorithm"), CASES)
def test_every_naming_merges_into_every_layout_alike(
    bases: Callable[[str], tuple[Path, Path]],
    written: Callable[[str, str], Path],
    name: str,
    algorithm: str,
    tmp_path: Path,
) -> None:
    folder, file = bases(name)
    files = {"kohya": unet_only(written(name, algorithm), tmp_path / "kohya.safetensors")}
    text = load_file(files["kohya"])
    if name == "sd":
        files["lycoris"] = tmp_path / "lycoris.safetensors"
        save_file({f"lycoris_{key.removeprefix('lora_unet_')}": W for key, W in text.items()}, files["lycoris"])
    if algorithm in COMFY_READS:
        files["comfy"] = tmp_path / "comfy.safetensors"
        convert(files["kohya"], files["comfy"], to="comfy")
    results = []
    for dialect, path in files.items():
        assert dialects.detect(dialects.Listing.of(path))[0] == ("kohya" if dialect == "lycoris" else dialect)
        for layout, checkpoint in (("pipeline", folder), ("file", file), ("component", folder / "unet")):
            merge(checkpoint, [path], tmp_path / f"{dialect}-{layout}")
            assert verify(tmp_path / f"{dialect}-{layout}", checkpoint, [path]).ok
            out = tmp_path / f"{dialect}-{layout}"
            merged = Checkpoint.open(out / file.name if layout == "file" else out)
            tensors = {one: merged.read(one) for one in merged.specs}
            results.append(images.from_original(name, tensors) if layout == "file" else tensors)
    first = {key.removeprefix("unet."): W for key, W in results[0].items() if key.startswith("unet.")}
    plain = images.untouched(name).unet.state_dict()
    assert sum(not torch.equal(first[key], W) for key, W in plain.items()) > 10
    for result in results[1:]:
        state = result if isinstance(result, dict) else result.unet.state_dict()
        for key, W in first.items():
            assert torch.equal(state[f"unet.{key}" if f"unet.{key}" in state else key], W), key


def unet_only(path: Path, target: Path) -> Path:
    save_file({name: W for name, W in load_file(path).items() if name.startswith("lora_unet_")}, target)
    return target
