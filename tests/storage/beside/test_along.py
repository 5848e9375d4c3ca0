"""What may come along with a model's weights: texts, tokenizers, code, pictures; nothing that may be weights."""

from __future__ import annotations

import pytest

from loratools.storage.beside.along import may_come

WEIGHTS = """
    consolidated.safetensors pytorch_model.bin flax_model.msgpack tf_model.h5 rust_model.ot 64.tflite model.gguf
    model.ckpt weights.npz model.nemo model.pte model.llamafile onnx/model.onnx onnx/model.onnx_data model.onnx.data
    openvino/openvino_model.bin openvino/openvino_model.xml original/consolidated.00.pth coreml/model.mlmodel
    model.pt a.mlpackage/Manifest.json a.mlpackage/Data/weights/weight.bin model.engine model.plan model.trt
    model.pdparams saved_model.pb variables/variables.data-00000-of-00001 variables/variables.index __0_0.distcp
    model.task model.litertlm model.mnn model.rkllm model.dlc model.ggml.q4_0 ggml-model-q4_0 weights.zip
    model.tar.gz model.pkl model.joblib model.xyz model.safetensors.index.json model.safetensors.index.fp16.json
    pytorch_model.bin.index.json model.keras model.npy diffusion_pytorch_model.safetensors.index.json
    checkpoint-500/config.json model.SAFETENSORS model.mar weights 0.0
"""

COMPANIONS = """
    config.json generation_config.json tokenizer.json tokenizer.model tokenizer.model.v3 tokenizer.model.v7m1
    spiece.model source.spm tekken.json vocab.txt merges.txt qwen.tiktoken chat_template.jinja README.md LICENSE
    LICENSE.txt additional_chat_templates/tool_use.jinja modeling_x.py configuration_x.py modules.json
    1_Pooling/config.json index.json unet/config.json scheduler/scheduler_config.json model_index.json
    preprocessor_config.json Notice USE_POLICY.md assets/picture.png sample.wav recipe.yaml
    cache_autogptq_cuda_256.cpp dict.txt bpe.codes README vocab.bpe
"""

OF_TRAINING = """
    optimizer.bin trainer_state.json training_args.json all_results.json runs/x.json .env .cache/x.json
"""


@pytest.mark.parametrize("name", (WEIGHTS + OF_TRAINING).split())
def test_what_stays_behind(name: str) -> None:
    assert not may_come(name)


@pytest.mark.parametrize("name", COMPANIONS.split())
def test_what_comes_along(name: str) -> None:
    assert may_come(name)
