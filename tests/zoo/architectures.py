"""Small networks of many architectures, built offline from a config, with random weights."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import transformers as hf

SMALL = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
TEXT = {"vocab_size": 200, **SMALL}
PATCHES = {"image_size": 64, "patch_size": 16, **SMALL}

Feeds = dict[str, torch.Tensor]


def tokens() -> Feeds:
    """Two sentences of 12 tokens."""
    return {"input_ids": torch.randint(5, 200, (2, 12)), "attention_mask": torch.ones(2, 12, dtype=torch.long)}


def image(size: int = 64) -> Feeds:
    """Two images."""
    return {"pixel_values": torch.randn(2, 3, size, size)}


@dataclass(frozen=True)
class Architecture:
    """How to build a network, and a batch of inputs for it."""

    build: Callable[[], torch.nn.Module]
    feeds: Callable[[], Feeds]


def _text(model: type, config: type, **options: object) -> Architecture:
    return Architecture(lambda: model(config(**{**TEXT, **options})), tokens)


def _image(model: type, config: type, **options: object) -> Architecture:
    return Architecture(lambda: model(config(**options)), image)


ARCHITECTURES: dict[str, Architecture] = {
    "bert": _text(hf.BertForSequenceClassification, hf.BertConfig),
    "roberta": _text(hf.RobertaForSequenceClassification, hf.RobertaConfig),
    "albert": _text(hf.AlbertForSequenceClassification, hf.AlbertConfig, embedding_size=32),
    "electra": _text(hf.ElectraForSequenceClassification, hf.ElectraConfig, embedding_size=32),
    "mpnet": _text(hf.MPNetForSequenceClassification, hf.MPNetConfig),
    "modernbert": _text(
        hf.ModernBertForSequenceClassification,
        hf.ModernBertConfig,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        cls_token_id=1,
        sep_token_id=2,
    ),
    "mobilebert": _text(
        hf.MobileBertForSequenceClassification, hf.MobileBertConfig, embedding_size=32, intra_bottleneck_size=32
    ),
    "llama": _text(hf.LlamaForCausalLM, hf.LlamaConfig, num_key_value_heads=2, use_cache=False),
    "distilbert": Architecture(
        lambda: hf.DistilBertForSequenceClassification(
            hf.DistilBertConfig(vocab_size=200, dim=64, n_layers=2, n_heads=4, hidden_dim=128)
        ),
        tokens,
    ),
    "gpt2": Architecture(
        lambda: hf.GPT2LMHeadModel(
            hf.GPT2Config(vocab_size=200, n_embd=64, n_layer=2, n_head=4, n_positions=64, use_cache=False)
        ),
        tokens,
    ),
    "t5-encoder": Architecture(
        lambda: hf.T5EncoderModel(
            hf.T5Config(
                vocab_size=200,
                d_model=64,
                d_kv=16,
                d_ff=128,
                num_layers=2,
                num_heads=4,
                use_cache=False,
                attn_implementation="eager",
            )
        ),
        tokens,
    ),
    "vit": _image(hf.ViTForImageClassification, hf.ViTConfig, **PATCHES),
    "deit": _image(hf.DeiTForImageClassification, hf.DeiTConfig, **PATCHES),
    "beit": _image(hf.BeitForImageClassification, hf.BeitConfig, **PATCHES),
    "clip-vision": _image(hf.CLIPVisionModel, hf.CLIPVisionConfig, **PATCHES),
    "dinov2": Architecture(
        lambda: hf.Dinov2ForImageClassification(
            hf.Dinov2Config(image_size=56, patch_size=14, hidden_size=64, num_hidden_layers=2, num_attention_heads=4)
        ),
        lambda: image(56),
    ),
    "swin": _image(
        hf.SwinForImageClassification,
        hf.SwinConfig,
        image_size=64,
        patch_size=4,
        embed_dim=32,
        depths=[1, 1],
        num_heads=[2, 4],
        window_size=4,
        attn_implementation="eager",
    ),
    "mobilenetv1": _image(
        hf.MobileNetV1ForImageClassification, hf.MobileNetV1Config, image_size=64, depth_multiplier=0.25
    ),
    "mobilenetv2": _image(
        hf.MobileNetV2ForImageClassification, hf.MobileNetV2Config, image_size=64, depth_multiplier=0.35
    ),
    "resnet": _image(
        hf.ResNetForImageClassification, hf.ResNetConfig, embedding_size=32, hidden_sizes=[64, 128], depths=[2, 2]
    ),
    "regnet": _image(
        hf.RegNetForImageClassification,
        hf.RegNetConfig,
        embedding_size=32,
        hidden_sizes=[32, 64],
        depths=[1, 1],
        groups_width=16,
    ),
    "convnext": _image(
        hf.ConvNextForImageClassification, hf.ConvNextConfig, hidden_sizes=[32, 64], depths=[2, 2], num_stages=2
    ),
    "efficientnet": _image(
        hf.EfficientNetForImageClassification,
        hf.EfficientNetConfig,
        image_size=64,
        width_coefficient=0.5,
        depth_coefficient=0.3,
        hidden_dim=640,
    ),
    "segformer": _image(
        hf.SegformerForSemanticSegmentation,
        hf.SegformerConfig,
        hidden_sizes=[16, 32, 64, 64],
        depths=[1, 1, 1, 1],
        decoder_hidden_size=64,
        num_attention_heads=[1, 2, 4, 4],
    ),
    "mobilevit": _image(hf.MobileViTForImageClassification, hf.MobileViTConfig, image_size=64),
    "levit": _image(
        hf.LevitForImageClassification,
        hf.LevitConfig,
        image_size=64,
        hidden_sizes=[64, 96, 128],
        num_attention_heads=[2, 3, 4],
        depths=[1, 1, 1],
        key_dim=[16, 16, 16],
    ),
    "poolformer": _image(
        hf.PoolFormerForImageClassification,
        hf.PoolFormerConfig,
        hidden_sizes=[32, 32, 64, 64],
        depths=[1, 1, 1, 1],
    ),
    "cvt": _image(
        hf.CvtForImageClassification, hf.CvtConfig, embed_dim=[32, 32, 64], num_heads=[1, 1, 2], depth=[1, 2, 3]
    ),
    "wav2vec2": Architecture(
        lambda: hf.Wav2Vec2ForSequenceClassification(
            hf.Wav2Vec2Config(
                vocab_size=32,
                conv_dim=(64, 64),
                conv_stride=(5, 2),
                conv_kernel=(10, 3),
                num_feat_extract_layers=2,
                num_conv_pos_embeddings=16,
                num_conv_pos_embedding_groups=4,
                **SMALL,
            )
        ),
        lambda: {"input_values": torch.randn(2, 1600)},
    ),
}
